"""Streams: every row, by weight, one order for one seed, and bad rows found as they come."""

import io
import json
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch.utils.data import DataLoader

from phi_mm.datasets import Stream, check, mixture
from processing import PhiMMCollator

from .conftest import save_sound


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    """`datasets` rests for 5 s whenever a stream of parquet ends."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def line(name, question="is it?", **media):
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
    return {"id": name, "conversations": said, **media}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def names(stream, count):
    return [row["id"] for row in islice(stream, count)]


def test_every_row_comes_once_before_any_comes_again(tmp_path, processor):
    path = write(tmp_path / "rows.jsonl", [line(str(n)) for n in range(20)])
    source = {"path": path, "streaming": True}
    drawn = names(Stream([source], 0, processor, None), 40)
    assert sorted(drawn[:20]) == sorted(drawn[20:]) == sorted(str(n) for n in range(20))
    assert drawn[:20] != drawn[20:] and drawn != sorted(drawn)
    assert drawn == names(Stream([source], 0, processor, None), 40)
    assert drawn != names(Stream([source], 1, processor, None), 40)
    first = names(Stream([source | {"limit": 3}], 0, processor, None), 6)
    assert sorted(first) == ["0", "0", "1", "1", "2", "2"]


def test_weights_say_how_often_a_source_is_drawn_from(tmp_path, processor):
    streamed = write(tmp_path / "a.jsonl", [line(f"a{n}") for n in range(5)])
    kept = write(tmp_path / "b.jsonl", [line(f"b{n}") for n in range(7)])
    sources = [{"path": kept, "weight": 3}, {"path": streamed, "streaming": True}]
    drawn = names(Stream(sources, 0, processor, None), 800)
    counts = Counter(name[0] for name in drawn)
    assert 550 < counts["b"] < 650  # 600 expected, four standard deviations
    assert {name for name in drawn} == {f"a{n}" for n in range(5)} | {f"b{n}" for n in range(7)}


def test_the_workers_of_a_loader_share_the_rows(tmp_path, processor):
    path = write(tmp_path / "rows.jsonl", [line(str(n)) for n in range(21)])
    stream = Stream([{"path": path, "streaming": True}], 0, processor, None)
    loader = DataLoader(stream, batch_size=None, num_workers=2, collate_fn=lambda row: row["id"])
    drawn = list(islice(loader, 20))
    assert len(set(drawn)) == 20


@pytest.fixture
def media(tmp_path):
    """Three rows whose media lie beside the file, and the same rows as parquet that holds them."""
    Image.effect_noise((12, 9), 50).convert("RGB").save(tmp_path / "x.png")
    save_sound(tmp_path / "s.wav")
    rows = [
        line("seen", "<image>is it?", image="x.png"),
        line("heard", "<audio>", audio="s.wav"),
        line("said"),
    ]
    held = {name: (tmp_path / name).read_bytes() for name in ("x.png", "s.wav")}
    inside = {
        "id": [row["id"] for row in rows],
        "conversations": [row["conversations"] for row in rows],
        "image": [{"bytes": held["x.png"], "path": None}, None, None],
        "audio": [None, {"bytes": held["s.wav"], "path": "s.wav"}, None],
    }
    data = datasets.Dataset.from_dict(inside)
    data = data.cast_column("image", datasets.Image()).cast_column("audio", datasets.Audio())
    data.to_parquet(tmp_path / "rows.parquet")
    return write(tmp_path / "rows.jsonl", rows), str(tmp_path / "rows.parquet")


@pytest.mark.parametrize("form", [0, 1])
def test_a_streamed_row_makes_the_batch_that_a_row_in_memory_makes(media, processor, form):
    collator = PhiMMCollator(processor)
    kept = {row["id"]: row for row in mixture([{"path": media[0]}], 0, processor)}
    stream = Stream([{"path": media[form], "streaming": True}], 0, processor, None)
    for row in islice(stream, 3):
        batch, expected = collator([row]), collator([kept[row["id"]]])
        assert batch.keys() == expected.keys()
        for name in batch:
            torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=1e-6)


def test_bad_rows_are_skipped_as_far_as_the_policy_goes(tmp_path, processor, caplog):
    (tmp_path / "words.png").write_text("no picture")
    bad = [
        line("words", "<image>", image="words.png"),
        line("lost", "<image>", image="lost.png"),
        line("unmarked", image="words.png"),
        line("long", "is it so " * 9),
    ]
    good = [line(str(n)) for n in range(4)]
    source = {"path": write(tmp_path / "rows.jsonl", bad + good), "streaming": True}
    skipping = source | {"on_bad_row": "skip", "skip_at_most": 4}
    with caplog.at_level("WARNING"):
        assert sorted(names(Stream([skipping], 0, processor, 20), 4)) == ["0", "1", "2", "3"]
    assert "row lost: got the image" in caplog.text
    with pytest.raises(ValueError, match=r"got 4 bad rows (.|\n)*expected at most 3"):
        names(Stream([skipping | {"skip_at_most": 3}], 0, processor, 20), 9)
    with pytest.raises(ValueError, match="got 1 bad rows"):
        names(Stream([source], 0, processor, 20), 9)


def test_the_check_leaves_streams_out_and_says_so(tmp_path, caplog):
    streamed = write(tmp_path / "a.jsonl", [line("a", "<image>", image="lost.png")])
    kept = write(tmp_path / "b.jsonl", [line("b")])
    with caplog.at_level("WARNING"):
        report = check([{"path": streamed, "streaming": True}, {"path": kept}])
    assert [part.name for part in report.parts] == [kept] and report.faults == 0
    assert f"{streamed} is streamed: training checks its rows as they come" in caplog.text


def test_a_stream_of_bad_rows_alone_ends(tmp_path, processor):
    path = write(tmp_path / "rows.jsonl", [line("lost", "<image>", image="lost.png")])
    source = {"path": path, "streaming": True, "on_bad_row": "skip"}
    with pytest.raises(ValueError, match="got no row from the stream"):
        names(Stream([source], 0, processor, None), 1)


@pytest.mark.parametrize("name", ["rows.json", "none.jsonl", "none.parquet"])
def test_what_cannot_be_streamed_is_refused_at_once(tmp_path, processor, name):
    (tmp_path / "rows.json").write_text("[]")
    expected = "expected .jsonl, parquet" if name == "rows.json" else "expected an existing file"
    with pytest.raises(ValueError, match=expected):
        Stream([{"path": str(tmp_path / name), "streaming": True}], 0, processor, None)


def test_broken_bytes_inside_a_row_are_found(tmp_path, processor):
    sound = io.BytesIO()
    soundfile.write(sound, np.zeros(16), 16000, format="WAV")
    rows = datasets.Dataset.from_dict(
        {
            "id": ["a", "b", "c"],
            "conversations": [line("a", "<audio>")["conversations"]] * 3,
            "audio": [{"bytes": held, "path": None} for held in (b"x", sound.getvalue(), b"RIFF")],
        }
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    source = {"path": str(tmp_path / "rows.parquet"), "streaming": True}
    source |= {"on_bad_row": "skip", "skip_at_most": 2}
    assert names(Stream([source], 0, processor, None), 1) == ["b"]
