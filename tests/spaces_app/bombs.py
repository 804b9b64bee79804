"""Files that would harm whoever opens them without care, and how each is refused (None: taken)."""

import gzip
import io
import struct
import zipfile
import zlib

import numpy as np
import soundfile
from PIL import Image

MEGABYTE = 1 << 20


def png(width: int, height: int) -> bytes:
    """A black picture that takes a thousandth of its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows, packer = b"\0" * (1 + width), zlib.compressobj(1)
    pixels = b"".join(packer.compress(rows) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", pixels), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def animation(frames: int) -> bytes:
    pictures = [Image.new("P", (16, 16), number % 256) for number in range(frames)]
    for number, picture in enumerate(pictures):
        picture.putpixel((number % 16, 0), 255 - number % 256)
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:])
    return file.getvalue()


def icon(picture: bytes) -> bytes:
    """An ICO whose header says 256 × 256 pixels, whatever is in it."""
    entry = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(picture), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + picture


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    return file.getvalue()


def silence(minutes: int, kind: str, subtype: str, rate: int = 8_000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, channels, subtype, format=kind) as recording:
        for _ in range(minutes):
            recording.write(np.zeros((60 * rate, channels), np.float32))
    return file.getvalue()


def lying(flac: bytes, frames: int) -> bytes:
    """The recording with a header that promises so many samples."""
    high, low = divmod(frames, 1 << 32)
    return flac[:21] + bytes([flac[21] & 0xF0 | high]) + struct.pack(">I", low) + flac[26:]


def wav(rate: int, frames: int) -> bytes:
    head = struct.pack("<IHHIIHH", 16, 1, 1, rate, rate, 1, 8)
    size = struct.pack("<I", frames)
    body = b"WAVEfmt " + head + b"data" + size + b"\x80" * frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


SMALL = png(8, 8)
NO_PICTURE = "expected a picture that can be opened"
NO_SOUND = "expected a recording that can be opened"
PICTURES = {
    "bomb.png": (
        lambda: png(20_000, 20_000),
        "too large to be opened, expected at most 64",
    ),
    "large.png": (lambda: png(9_000, 9_000), "of 9000 × 9000 pixels, expected at most 64 million"),
    "icon.ico": (lambda: icon(png(9_000, 9_000)), NO_PICTURE),
    "drawing.png": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', NO_PICTURE),
    "packed.png": (lambda: gzip.compress(b"<svg>" + b" " * (100 * MEGABYTE)), NO_PICTURE),
    "paper.png": (lambda: b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n%%EOF", NO_PICTURE),
    "script.png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NO_PICTURE),
    "empty.png": (lambda: b"", NO_PICTURE),
    "cut.png": (lambda: png(64, 64)[:60], NO_PICTURE),
    "sound.png": (lambda: wav(16_000, 100), NO_PICTURE),
    "img src=x onerror=alert(1).png": (lambda: b"no", "got the image 'img src=x onerror"),
    "long.png": (lambda: png(100_000, 1), None),
    "many.gif": (lambda: animation(1_000), None),
    "zip.png": (lambda: SMALL + zipped(), None),
    "page.html": (lambda: SMALL + b"<script>alert(1)</script>", None),
}
TOO_LONG = "expected at most 600 s: record or cut a shorter one"
RECORDINGS = {
    "hour.flac": (lambda: silence(60, "FLAC", "PCM_16"), f"of 3600 s, {TOO_LONG}"),
    "long.ogg": (lambda: silence(11, "OGG", "VORBIS"), f"of 660 s, {TOO_LONG}"),
    "lying.flac": (lambda: lying(silence(1, "FLAC", "PCM_16"), (1 << 36) - 1), TOO_LONG),
    "slow.wav": (lambda: wav(1, MEGABYTE), f"of 1048576 s, {TOO_LONG}"),
    "wide.flac": (
        lambda: lying(silence(1, "FLAC", "PCM_16", 96_000, 8), 540 * 96_000),
        "of 51840000 samples in 8 channels, expected at most 57600000 in all",
    ),
    "context.flac": (lambda: silence(4, "FLAC", "PCM_16"), "of 240 s, which is 3120 tokens"),
    "empty.wav": (lambda: b"", NO_SOUND),
    "picture.wav": (lambda: SMALL, NO_SOUND),
    "still.wav": (lambda: wav(0, 100), NO_SOUND),
}
