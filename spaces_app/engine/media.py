"""What pictures and recordings may be: told by their headers, before anything is decoded."""

from dataclasses import dataclass

import soundfile
from PIL import Image

# The others have decoders that nobody needs here; PostScript's starts a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")
MILLION = 1_000_000
SAMPLES_PER_SECOND = 2 * 48_000  # of a stereo recording as most are made


class UnusableFile(ValueError):
    """A picture or recording that nobody can use.

    Attributes:
        path: of the file.
    """

    def __init__(self, message: str, path: str):
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class MediaLimits:
    """The largest files that are decoded.

    Attributes:
        pixels: of a picture.
        seconds: of a recording.
    """

    pixels: int = 64 * MILLION
    seconds: int = 600

    def check_picture(self, path: str) -> None:
        """Looks at a picture's header.

        Raises:
            ValueError: it is too large, or none.
        """
        limit = f"expected at most {self.pixels / MILLION:g} million pixels: make it smaller"
        try:
            with Image.open(path, formats=FORMATS) as picture:
                width, height = picture.size
        except Image.DecompressionBombError:
            raise ValueError(f"got the image {path!r}, too large to be opened, {limit}") from None
        except Exception as error:  # broken files raise errors of any kind
            raise ValueError(
                f"got the image {path!r}, expected a picture that can be opened "
                f"({', '.join(FORMATS)}): {error}"
            ) from error
        if width * height > self.pixels:
            raise ValueError(f"got the image {path!r} of {width} × {height} pixels, {limit}")

    def check_recording(self, path: str) -> None:
        """Looks at a recording's header, whose numbers are those that decoding takes memory by;
        what cannot be opened is left to the processor.

        Raises:
            ValueError: it is too long, or has too many samples.
        """
        try:
            about = soundfile.info(path)
            seconds = about.frames / about.samplerate
        except Exception:  # broken files raise errors of any kind
            return
        if seconds > self.seconds:
            raise ValueError(
                f"got the audio {path!r} of {seconds:.0f} s, expected at most {self.seconds} s: "
                "record or cut a shorter one"
            )
        most = self.seconds * SAMPLES_PER_SECOND
        if about.frames * about.channels > most:
            raise ValueError(
                f"got the audio {path!r} of {about.frames} samples in {about.channels} channels, "
                f"expected at most {most} in all: save it in stereo and 48 kHz"
            )
