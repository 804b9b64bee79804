"""Files that are broken in any way are refused as files, and the model never meets them."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from engine.generation import Generator
from engine.media import MILLION, MediaLimits, UnusableFile
from engine.prompt import Prompt, PromptReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from settings import Settings

from .conftest import user


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def recording(kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(4_000) / 9), 16_000, format=kind)
    return file.getvalue()


WHOLE = {kind: picture(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}
WHOLE |= {kind: recording(kind) for kind in ("WAV", "FLAC", "OGG", "MP3")}


@pytest.fixture(scope="module")
def reader(loaded) -> PromptReader:
    return Generator(*loaded, 0, 1 << 30).reader


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=4)), max_size=4),
    st.floats(0, 1),
)
def test_broken_files(reader: PromptReader, tmp_path: Path, kind, changes, left: float) -> None:
    content = bytearray(WHOLE[kind])
    for place, some in changes:
        place %= len(content)
        content[place : place + len(some)] = some
    suffix = ".wav" if kind in ("WAV", "FLAC", "OGG", "MP3") else ".png"
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content[: round(len(content) * left)])
    try:
        assert isinstance(reader.read([user(str(path), "what?")]), Prompt)
    except UnusableFile as error:
        assert error.path == str(path) and str(error).startswith("got ")


def test_limits_are_those_of_the_settings(
    loaded, artefact: Path, media: Path, tmp_path: Path
) -> None:
    given = {"PHI_MM_MODEL": str(artefact)}
    usual = Settings.read(given)
    assert (usual.upload_bytes, usual.media) == (32 << 20, MediaLimits(64 * MILLION, 600))
    given |= {"PHI_MM_UPLOAD_MB": "1", "PHI_MM_PICTURE_MEGAPIXELS": "1"}
    small = Settings.read(given | {"PHI_MM_RECORDING_SECONDS": "1"})
    assert (small.upload_bytes, small.media) == (1 << 20, MediaLimits(MILLION, 1))
    reader = Generator(*loaded, 0, 1 << 30, limits=small.media).reader
    Image.new("L", (1000, 1000)).save(tmp_path / "most.png")
    Image.new("L", (1000, 1001)).save(tmp_path / "more.png")
    soundfile.write(tmp_path / "most.wav", np.zeros(16_000), 16_000)
    soundfile.write(tmp_path / "more.wav", np.zeros(16_001), 16_000)
    assert reader.read([user(f"{tmp_path}/most.png", f"{tmp_path}/most.wav")]).encoded == 2
    for name in ("more.png", "more.wav"):
        with pytest.raises(UnusableFile, match=f"{name}' of .*, expected at most 1 "):
            reader.read([user(f"{tmp_path}/{name}", "what?")])
