"""The demo's words and pictures in the terminal; the whole demo is tried by `make demo`."""

import re
from pathlib import Path

import pytest
from PIL import Image

from phi_mm.demo import Demo, blocks, score_table

ROW = {"metric": "exact_match", "value": 0.934, "n": 400, "low": 0.9, "high": 0.95}


def test_scores_in_words() -> None:
    rows = [
        {**ROW, "task": "image_qa", "baseline": 0.382, "control": None},
        {**ROW, "task": "image_qa", "baseline": 0.382, "value": 0.27, "control": "blank"},
        {**ROW, "task": "asr", "metric": "wer", "value": 0.05, "baseline": 1.0, "control": None},
    ]
    assert score_table(rows).splitlines() == [
        "  Questions about pictures       93.4 % right   guessing 38.2 %, blank picture 27.0 %",
        "  Writing down speech       5.0 % word errors",
    ]


def test_a_picture_as_half_blocks(tmp_path: Path) -> None:
    picture = Image.new("RGB", (48, 24), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 2, 48, 24))  # the first of 12 lines of pixels stays red
    picture.save(tmp_path / "two.png")
    lines = blocks(tmp_path / "two.png").splitlines()
    assert len(lines) == 6
    assert lines[0].count("▀") == 24
    top = "\x1b[38;2;255;0;0m\x1b[48;2;0;0;255m▀"
    assert lines[0] == f"  {top * 24}\x1b[0m"
    assert set(re.findall(r"38;2;([\d;]+)m", lines[1])) == {"0;0;255"}


def test_missing_bases_are_named_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no base model in checkpoints/tiny-phi.*build-bases"):
        Demo(tmp_path / "out").run()
    assert list(tmp_path.iterdir()) == []
