"""HTML pages that need nothing else: pictures and recordings are inside them, as data URIs."""

import base64
import io
from pathlib import Path

import jinja2
import soundfile
from PIL import Image

SMALL_PICTURE = 128  # pixels; up to here a picture is kept as it is
LARGEST_PICTURE = 384


def template(path: Path) -> jinja2.Template:
    """A page's template; what is put into it is escaped, and nothing may be left out."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(path.name)


def media_uri(kind: str, path: str) -> str:
    """The data URI of an image or audio part's file."""
    return (_picture_uri if kind == "image" else _sound_uri)(path)


def _picture_uri(path: str) -> str:
    """A picture as a data URI: as PNG where it is small, else scaled down, as JPEG."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    small = max(picture.size) <= SMALL_PICTURE
    picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG" if small else "JPEG")
    return _data_uri(buffer, "image/png" if small else "image/jpeg")


def _sound_uri(path: str) -> str:
    """A recording as a data URI: MP3, which every browser plays."""
    samples, rate = soundfile.read(path, dtype="float32")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="MP3")
    return _data_uri(buffer, "audio/mpeg")


def _data_uri(buffer: io.BytesIO, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
