"""Pictures and recordings, opened as training opens them: what is wrong with a file."""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from PIL import Image, ImageOps

from phi_mm.datasets.faults import Kind
from processing import open_recording

RATE = 16_000  # Hz
AUDIO_FORMATS = {
    ".wav": ("WAV", "WAVEX", "RF64"),
    ".flac": ("FLAC",),
    ".mp3": ("MP3",),
    ".ogg": ("OGG",),
}


class Facts(NamedTuple):
    """What a file holds, whole or not.

    `seconds` is 0 for a picture. `digest` tells contents apart; it is None where there is no file.
    """

    fault: str | None = None
    digest: str | None = None
    seconds: float = 0.0


def media_facts(kind: str, path: str) -> Facts:
    """Reads the file of an image or audio part to its end."""
    if path.startswith(("http://", "https://")):
        return Facts("missing: training reads files only, so download it first")
    if not Path(path).is_file():
        return Facts("missing")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if kind == "image":
        return Facts(image_fault(path), digest)
    fault, seconds = _hear(path)
    return Facts(fault, digest, seconds)


def words_of(frames: int) -> int:
    """Tokens that a transcript may have, before there is one: one for each 80 ms of sound.

    Real speech has three to five a second, so that rows turn out shorter than was planned for.

    Args:
        frames: of 20 ms.
    """
    return math.ceil(frames / 4)


def kind_of(fault: str) -> Kind:
    """The kind of a fault in the words of `image_fault` and `audio_fault`."""
    kinds = {"missing": Kind.MISSING, "mislabelled": Kind.MISLABELLED}
    return kinds.get(fault.split(":")[0], Kind.CORRUPT)


def image_fault(path: str) -> str | None:
    """What is wrong with an image file (missing, unreadable, truncated, mislabelled), or None."""
    if not Path(path).is_file():
        return "missing"
    try:
        with Image.open(path) as image:
            held = image.format
            ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # a broken file makes Pillow raise errors of any kind
        return f"unreadable: {error}"
    expected = Image.registered_extensions().get(Path(path).suffix.lower())
    # Cameras write MPO, a JPEG with a second picture behind it, under the name .jpg.
    if expected not in (None, held) and (held, expected) != ("MPO", "JPEG"):
        return f"mislabelled: holds {held}"
    return None


def audio_fault(path: str) -> str | None:
    """What is wrong with an audio file (missing, unreadable, mislabelled, empty), or None."""
    return _hear(path)[0] if Path(path).is_file() else "missing"


def _hear(path: str) -> tuple[str | None, float]:
    """What is wrong with a recording, or None, and its length in seconds."""
    try:
        with soundfile.SoundFile(path) as sound:
            samples = sound.read(dtype="float32")
    except soundfile.LibsndfileError:
        return _hear_otherwise(path)
    fault = _sound_fault(Path(path), sound.format, sound.frames, samples)
    return fault, len(samples) / sound.samplerate


def _hear_otherwise(path: str) -> tuple[str | None, float]:
    """`_hear` for what libsndfile cannot read: whether training can all the same."""
    try:
        return None, len(open_recording(path, RATE)) / RATE
    except ValueError as error:
        return f"unreadable: {error.__cause__ or error}", 0.0


def _sound_fault(path: Path, held: str, frames: int, samples: np.ndarray) -> str | None:
    if not len(samples):
        return "empty"
    # An mp3's header only estimates its length, so a small difference is no fault.
    if len(samples) < 0.9 * frames or _riff_is_cut(path):
        return "truncated"
    if not np.isfinite(samples).all():
        return "holds values that are not finite"
    if held not in AUDIO_FORMATS.get(path.suffix.lower(), (held,)):
        return f"mislabelled: holds {held}"
    return None


def _riff_is_cut(path: Path) -> bool:
    """Whether a wav file ends before its header says; libsndfile reads such a file in silence."""
    with path.open("rb") as file:
        magic, size = file.read(4), int.from_bytes(file.read(4), "little")
    written_as_a_stream = size in (0, 0xFFFFFFFF)
    return magic == b"RIFF" and not written_as_a_stream and size + 8 > path.stat().st_size + 1


def count_samples(seconds: float, rate: int) -> int:
    """Samples of a recording at another rate, as resampling gives them."""
    return math.ceil(round(seconds * rate, 6))
