"""Evaluation files of other forms: POPE, and any whose columns are named."""

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from phi_mm.evaluation.forms import load_columns
from phi_mm.evaluation.metrics import YesNo
from phi_mm.recipes import EvaluationTask

POPE = {"id": "question_id", "question": "text", "answer": "label", "image": "image"}


def entry(**fields) -> EvaluationTask:
    given = {"task": "pope", "data": "rows.jsonl", "metric": "yes_no", "columns": POPE}
    return EvaluationTask(**given | fields)


def test_pope_counts_as_its_own_script_does():
    """The first sentence alone, and everything without a "no" is a yes."""
    said = {
        "Yes, there is.": "yes",
        "No, there is not.": "yes",
        "I see no dog. Yes?": "no",
        "It is not there": "no",
        "yes. no.": "no",
        "a snowboard": "no",
        "NO": "no",
        "Yes": "yes",
    }
    told = YesNo().compute(predictions=list(said), references=list(said.values()))
    assert told["scores"] == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    assert told["yes_no"] == 5 / 8 and told["yes_ratio"] == 4 / 8 and told["invalid"] == 1
    assert told["precision"] == 2 / 4 and told["recall"] == 2 / 3
    assert told["f1"] == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))
    with pytest.raises(ValueError, match="got the reference 'maybe', expected yes or no"):
        YesNo().compute(predictions=["yes"], references=["maybe"])


def test_the_real_pope_is_read(samples: Path, tmp_path: Path):
    path = samples / "pope/coco_pope_adversarial.json"
    for row in map(json.loads, path.read_text().splitlines()):
        (tmp_path / row["image"]).touch()
    asked = "{question}\nAnswer the question using a single word or phrase."
    items = load_columns(path, entry(media=str(tmp_path), prompt=asked))
    assert len(items) == 3000
    assert sum(item.reference == "yes" for item in items) == 1500
    [turn] = items[0].prompt
    assert turn["content"] == [
        {"type": "image", "image": str(tmp_path / "COCO_val2014_000000310196.jpg")},
        {
            "type": "text",
            "text": "Is there a snowboard in the image?\n"
            "Answer the question using a single word or phrase.",
        },
    ]
    always = YesNo().compute(
        predictions=["Yes"] * 3000, references=[item.reference for item in items]
    )
    assert (always["yes_no"], always["recall"], always["yes_ratio"]) == (0.5, 1.0, 1.0)
    assert len(load_columns(path, entry(media=str(tmp_path)), limit=7)) == 7


def test_a_recording_may_be_the_question(tmp_path: Path):
    (tmp_path / "a.wav").touch()
    rows = [{"clip": "a.wav", "says": 7, "who": "George"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    columns = {"audio": "clip", "answer": "says", "kind": "who"}
    [item] = load_columns(tmp_path / "rows.json", entry(columns=columns, media=str(tmp_path)))
    assert item.prompt[0]["content"] == [{"type": "audio", "audio": str(tmp_path / "a.wav")}]
    assert (item.reference, item.kind) == ("7", "George")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "got line 2 of .*rows.jsonl, expected a JSON object"),
        ("[1]", "got row 2 of .*rows.jsonl: .1., expected a JSON object"),
        ('{"text": "a", "label": "no", "image": "a.png"}', "row 2 of .* without 'question_id'"),
        (
            '{"question_id": 2, "text": "a", "label": "no", "image": "b.png"}',
            "got row 2 of .*, which names .*b.png, expected a file: set media",
        ),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, line: str, complaint: str):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    good = {"question_id": 1, "text": "is it?", "label": "yes", "image": "a.png"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(ValueError, match=complaint):
        load_columns(tmp_path / "rows.jsonl", entry(media=str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"columns": {**POPE, "label": "x"}}, "got columns .'label'., expected of"),
        ({"columns": {"question": "text"}}, "expected answer, and question or audio"),
        ({"prompt": "what?"}, "expected {question} in it"),
        ({"columns": None, "media": "here"}, "got media or prompt without columns"),
    ],
)
def test_columns_that_do_not_fit_are_refused(fields: dict, complaint: str):
    with pytest.raises(StrictDataclassError, match=f"(?s){complaint}"):
        entry(**fields)
