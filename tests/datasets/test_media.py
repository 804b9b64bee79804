"""Files of pictures and recordings: what is wrong with one, told apart."""

import numpy as np
import pytest
import soundfile
from PIL import Image

from phi_mm.datasets.faults import Kind
from phi_mm.datasets.media import audio_fault, image_fault, kind_of, media_facts

from .conftest import save_sound


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return str(path)


def test_image_faults_are_told_apart(tmp_path):
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    for name in ("good.png", "good.jpg", "cut.png", "cut.jpg"):
        picture.save(tmp_path / name)
    picture.save(tmp_path / "moving.jpg", "GIF")
    (tmp_path / "words.png").write_text("not a picture")
    assert image_fault(str(tmp_path / "good.png")) is None
    assert image_fault(str(tmp_path / "good.jpg")) is None
    assert image_fault(str(tmp_path / "none.png")) == "missing"
    assert image_fault(str(tmp_path / "moving.jpg")) == "mislabelled: holds GIF"
    assert image_fault(str(tmp_path / "words.png")).startswith("unreadable")
    assert image_fault(cut(tmp_path / "cut.png", 0.5)).startswith("unreadable")
    assert image_fault(cut(tmp_path / "cut.jpg", 0.5)).startswith("unreadable")


def test_audio_faults_are_told_apart(tmp_path):
    for name in ("good.wav", "good.flac", "good.mp3", "good.ogg", "cut.wav", "cut.flac"):
        save_sound(tmp_path / name)
    save_sound(tmp_path / "cut.mp3", seconds=5)
    save_sound(tmp_path / "named.wav", format="FLAC")
    save_sound(tmp_path / "empty.wav", seconds=0)
    soundfile.write(tmp_path / "nan.wav", np.full(9, np.nan), 16000, subtype="FLOAT")
    for name in ("good.wav", "good.flac", "good.mp3", "good.ogg"):
        assert audio_fault(str(tmp_path / name)) is None, name
    assert audio_fault(str(tmp_path / "none.wav")) == "missing"
    assert audio_fault(str(tmp_path / "named.wav")) == "mislabelled: holds FLAC"
    assert audio_fault(str(tmp_path / "empty.wav")) == "empty"
    assert audio_fault(str(tmp_path / "nan.wav")) == "holds values that are not finite"
    assert audio_fault(cut(tmp_path / "cut.wav", 0.5)) == "truncated"
    assert audio_fault(cut(tmp_path / "cut.mp3", 0.5)) == "truncated"
    assert audio_fault(cut(tmp_path / "cut.flac", 0.5)).startswith("unreadable")


def test_a_picture_too_large_to_open_is_a_fault_and_no_crash(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert image_fault(str(tmp_path / "x.png")).startswith("unreadable: Image size (1600 pixels)")


def test_facts_of_files(tmp_path):
    sound = media_facts("audio", str(save_sound(tmp_path / "s.wav", seconds=0.5)))
    assert (sound.fault, sound.seconds) == (None, 0.5)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "x.png").read_bytes())
    one, other = (media_facts("image", str(tmp_path / name)) for name in ("x.png", "copy.png"))
    assert one == other and one.digest != sound.digest and one.seconds == 0
    web = media_facts("image", "https://example.com/x.png")
    assert web.fault == "missing: training reads files only, so download it first"
    assert web.digest is None


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("missing", Kind.MISSING), ("missing: because", Kind.MISSING), ("truncated", Kind.CORRUPT),
     ("mislabelled: holds GIF", Kind.MISLABELLED), ("unreadable: mislabelled", Kind.CORRUPT)],
)  # fmt: skip
def test_kinds(fault, kind):
    assert kind_of(fault) == kind
