"""Speech learns from what the text model says to its words.

pytest tests/training/test_distillation.py
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from phi_mm.datasets import mixture
from phi_mm.training import by_modality
from phi_mm.training.distillation import (
    TEACHER,
    TeachingCollator,
    as_pretrained,
    as_text,
    divergence,
    teach,
)

TEACHING = ("distillation.temperature=2.0", "distillation.weight=0.5")


@pytest.fixture(scope="module")
def spoken(rows: Path) -> Path:
    """The rows, with what their recordings say."""
    told = json.loads(rows.read_text())
    for row in told:
        row["transcripts"] = ["how many red"] if "audio" in row else []
    path = rows.with_name("spoken.json")
    path.write_text(json.dumps(told))
    return path


@pytest.fixture
def teaching(recipe: Callable, trainer: Callable, spoken: Path):
    """Function that gives a trainer of spoken rows."""

    def make(*overrides: str, tune: str = "lora"):
        return trainer(recipe(f"data.train={spoken}", *overrides, tune=tune))

    return make


def batch_of(runner, collator: Callable) -> dict:
    return collator([runner.train_dataset[i] for i in range(12)])


@pytest.mark.parametrize("tune", ["lora", "frozen"])
def test_the_loss_is_what_the_text_model_alone_gives(teaching, bases: dict, tune: str):
    runner, plain = teaching(*TEACHING, tune=tune), teaching(tune=tune)
    for name, weight in runner.model.named_parameters():
        if ".lora_B." in name:  # it is zero at first, and the student would be the teacher
            torch.nn.init.normal_(weight)
            dict(plain.model.named_parameters())[name].data.copy_(weight.data)
    batch = batch_of(runner, TeachingCollator(runner.data_collator))
    teacher = dict(batch[TEACHER])
    without = {key: value for key, value in batch.items() if key != TEACHER}
    count = int((batch["labels"][:, 1:] != -100).sum())
    total = runner.compute_loss(runner.model, dict(batch), num_items_in_batch=count)
    usual = plain.compute_loss(plain.model, dict(without), num_items_in_batch=count)

    alone = AutoModelForCausalLM.from_pretrained(bases["phi"]).eval()
    students = teacher.pop("students").tolist()
    questions = [runner.train_dataset[i]["messages"][0]["content"] for i in students]
    kinds = [{part["type"] for part in question} for question in questions]
    spoken = [row for row in runner.train_dataset.select(range(12)) if as_text(row)]
    assert kinds == [{"audio", "text"}] * len(spoken)
    with torch.no_grad():
        heard = plain.model(**{k: v for k, v in without.items() if k != "labels"}).logits
        read = alone(teacher["input_ids"], attention_mask=teacher["attention_mask"]).logits
    expected = 0.0
    for number, row in enumerate(students):
        here = batch["labels"][row, 1:] != -100
        there = teacher["labels"][number, 1:] != -100
        student = log_softmax(heard[row, :-1][here] / 2, -1)
        target = log_softmax(read[number, :-1][there] / 2, -1)
        expected += 4 * (target.exp() * (target - student)).sum()
    assert expected > 1e-3
    torch.testing.assert_close(count * (total - usual), 0.5 * expected, atol=1e-4, rtol=1e-3)


def test_what_learns_is_the_same_after_teaching(teaching):
    runner = teaching("tune.audio_projector=full", *TEACHING)
    runner.model.requires_grad_(False)
    opened = [p for n, p in runner.model.named_parameters() if ".lora_A." in n]
    for parameter in opened:
        parameter.requires_grad_(True)
    runner.model.train()
    with as_pretrained(runner.model):
        assert not runner.model.training
    assert runner.model.training
    assert sum(p.requires_grad for p in runner.model.parameters()) == len(opened)


def test_training_brings_the_answers_nearer(teaching):
    """At a weight beside which the usual loss is nothing."""
    runner = teaching("distillation.weight=1e6", "training.max_steps=12", tune="frozen")
    batch = TeachingCollator(runner.data_collator)(list(runner.train_dataset))
    teacher = batch.pop(TEACHER)

    def apart() -> float:
        taught = teach(runner.model, teacher)
        with torch.no_grad():
            logits = runner.model.eval()(**batch).logits
        return divergence(logits, batch, taught, teacher["students"], 2.0).item()

    before = apart()
    runner.train()
    assert 0 < apart() < 0.8 * before


def test_what_the_text_model_knew_is_measured_beside(recipe, trainer, bases: dict, rows: Path):
    validation = by_modality(mixture([{"path": str(rows)}], seed=0))
    runner = trainer(recipe(tune="lora"), eval_dataset=validation)
    runner.train()
    batch = runner.data_collator(list(validation["text"]))
    alone = AutoModelForCausalLM.from_pretrained(bases["phi"]).eval()
    with torch.no_grad():
        known = alone(**batch).loss.item()
    assert runner.pretrained_text_loss() == pytest.approx(known, abs=1e-5)
    assert abs(runner.evaluate()["eval_text_loss"] - known) > 1e-3


def test_only_spoken_rows_without_pictures_are_taught(teaching):
    runner = teaching(*TEACHING)
    rows = sorted(runner.train_dataset, key=lambda row: int(row["id"].removeprefix("row-")))
    assert [as_text(row) is not None for row in rows[:4]] == [False, True, False, False]
    said = as_text(rows[1])["messages"][0]["content"]
    assert said[0] == {"type": "text", "text": "how many red"}
    with pytest.raises(ValueError, match="got 2 transcripts and 1 recordings in row 'row-1'"):
        as_text({**rows[1], "transcripts": ["how", "many"]})


def test_a_row_that_is_cut_is_left_out(teaching):
    runner = teaching(*TEACHING)
    row = next(row for row in runner.train_dataset if as_text(row))
    row["transcripts"] = ["longer than the recording is in tokens"]
    lengths = [runner.data_collator([r])["input_ids"].shape[1] for r in (row, as_text(row))]
    whole = max(lengths)
    runner.data_collator.max_length = whole
    assert TEACHER in TeachingCollator(runner.data_collator)([row])
    runner.data_collator.max_length = whole - 4  # into the answer
    assert TEACHER not in TeachingCollator(runner.data_collator)([row])


@pytest.mark.parametrize(
    ("overrides", "tune", "complaint"),
    [
        ([], "full", "tune.language_model is full: nothing is left of the text model"),
        (["model.audio=null"], "lora", "no recording reaches the language model"),
        (["distillation.weight=0.0"], "lora", "distillation.weight=0.0, expected more than 0"),
        (["distillation.temp=1.0"], "lora", "the nearest is 'temperature'"),
    ],
)
def test_what_cannot_be_taught_is_refused(recipe, overrides: list[str], tune: str, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        recipe(*TEACHING, *overrides, tune=tune)


def test_rows_without_transcripts_are_refused(recipe, trainer):
    with pytest.raises(ValueError, match="training rows without transcripts"):
        trainer(recipe(*TEACHING, tune="lora"))
