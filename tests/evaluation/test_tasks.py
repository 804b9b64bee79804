"""Tasks measured on a random run: answers, scores, baselines, controls, refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import PhiForCausalLM, WhisperForConditionalGeneration

from phi_mm.cli import main
from phi_mm.evaluation import answers
from phi_mm.evaluation.tasks import (
    Task,
    carry_out,
    evaluate_run,
    load_items,
    majority_score,
    metrics_rows,
    plan,
    score,
    scores_by_kind,
)
from phi_mm.hub.fresh import respond
from phi_mm.recipes import load_recipe


def entry_error(run: Path, tmp_path: Path, **fields: str) -> str:
    """What `evaluate_run` says to the run with this evaluation."""
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    content["evaluation"][0].update(fields)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError) as caught:
        evaluate_run(tmp_path)
    return str(caught.value)


@pytest.fixture(scope="module")
def tasks(run: Path) -> list[Task]:
    """The whole evaluation of the random run."""
    return evaluate_run(run, batch_size=5)


def test_batched_answers_are_those_to_single_questions(world: Path, make_phi_mm: Callable) -> None:
    model, processor = make_phi_mm()
    for task in ("text_qa", "image_qa", "audio_qa"):
        items = load_items(world / "test" / f"{task}.json", task, limit=5)
        asked = [item.prompt for item in items]
        found = answers.answer(model, processor, asked, 4, batch_size=3, title=task)
        assert found == [respond(model, processor, prompt, 4)[0] for prompt in asked]


def test_rows_of_metrics_json(tasks: list[Task]) -> None:
    rows = metrics_rows(tasks)
    assert [(row["task"], row["control"]) for row in rows] == [
        ("image_qa", None),
        ("image_qa", "blank"),
        ("image_qa", "shuffled"),
        ("audio_qa", None),
        ("audio_qa", "silence"),
        ("asr", None),
        ("text_qa", None),
    ]
    fields = {"task", "metric", "value", "n", "low", "high", "baseline", "control", "details"}
    assert all(set(row) == fields and row["n"] == 12 for row in rows)
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)


def test_majority_answers_by_kind_of_question(tasks: list[Task]) -> None:
    baselines = {task.name: majority_score(task) for task in tasks}
    # Colours: 3 of each of 4. yes 8, no 4. Of nine facts 5 are "0", of three sums 2 are "1".
    assert baselines == {"image_qa": 3 / 12, "audio_qa": 8 / 12, "asr": 1.0, "text_qa": 7 / 12}


def test_scores_and_interval_of_known_answers(world: Path) -> None:
    items = load_items(world / "test" / "image_qa.json", "image_qa")
    task = Task("image_qa", "exact_match", items)
    said = [f"The {item.reference}." for item in items[:9]] + ["no idea"] * 3
    value, scores, interval, details = score(task, said, np.random.default_rng(0))
    assert (value, scores, details) == (0.75, [1.0] * 9 + [0.0] * 3, {})
    assert interval == pytest.approx((0.4677, 0.9111), abs=5e-5)  # Wilson, 9 of 12


def test_controls_change_the_answers(tasks: list[Task]) -> None:
    [seen] = [task for task in tasks if task.name == "image_qa"]
    measured, blanked, shuffled = (outcome.answers for outcome in seen.outcomes)
    assert len({tuple(measured), tuple(blanked), tuple(shuffled)}) == 3


def test_scores_by_kind(tasks: list[Task]) -> None:
    [text] = [task for task in tasks if task.name == "text_qa"]
    assert {kind: len(found) for kind, found in scores_by_kind(text).items()} == {
        "fact": 9,
        "sum": 3,
    }


def test_validation_rows_stand_beside_the_test_rows(run: Path) -> None:
    found = {
        task.name: len(task.items) for task in plan(load_recipe(run / "recipe.yaml"), "val", 4)
    }
    assert found == {"image_qa": 4, "audio_qa": 4, "asr": 4, "text_qa": 4}


def test_whisper_alone_and_phi_alone(
    world: Path, run: Path, make_phi_mm: Callable, tmp_path: Path
) -> None:
    model, processor = make_phi_mm()
    config = model.config
    PhiForCausalLM(config.text_config).save_pretrained(tmp_path / "phi")
    WhisperForConditionalGeneration(config.audio_config).save_pretrained(tmp_path / "whisper")
    processor.tokenizer.save_pretrained(tmp_path / "whisper")
    recipe = load_recipe(
        run / "recipe.yaml",
        [f"model.text={tmp_path}/phi", f"model.audio={tmp_path}/whisper"],
    )
    for name, data, metric in (
        ("asr_base", "asr", "wer"),
        ("text_qa_before", "text_qa", "exact_match"),
    ):
        task = Task(name, metric, load_items(world / "test" / f"{data}.json", data, 4))
        carry_out(task, recipe, model, processor, 4, np.random.default_rng(0))
        assert len(task.measured.answers) == 4
        prompts = [item.prompt for item in task.items]
        phi_mm = answers.answer(model, processor, prompts, 6, 4, "phi-mm")
        assert task.measured.answers != phi_mm


def test_a_row_without_a_recording_cannot_be_written_down(
    world: Path, run: Path, make_phi_mm: Callable, tmp_path: Path
) -> None:
    model, processor = make_phi_mm()
    WhisperForConditionalGeneration(model.config.audio_config).save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    recipe = load_recipe(run / "recipe.yaml", [f"model.audio={tmp_path}"])
    items = load_items(world / "test" / "text_qa.json", "text_qa")
    with pytest.raises(ValueError, match="0 recordings"):
        answers.transcribe(recipe, processor, [item.prompt for item in items], 4, "none")


def test_what_is_wrong_is_said_before_a_model_is_loaded(run: Path, tmp_path: Path) -> None:
    assert "did you mean 'wer'" in entry_error(run, tmp_path, metric="werr")
    assert "did you mean 'blank'" in entry_error(run, tmp_path, control="blanked")
    assert "nowhere.json" in entry_error(run, tmp_path, data="nowhere.json")
    with pytest.raises(ValueError, match="train it first"):
        evaluate_run(tmp_path / "nothing")


def test_another_split_needs_its_folder(run: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((run / "recipe.yaml").read_text())
    content["evaluation"][0]["data"] = "rows.json"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="a folder named test"):
        evaluate_run(tmp_path, split="val")


def test_the_command_writes_every_file(run: Path, tmp_path: Path, capsys) -> None:
    main(["evaluate", str(run), "--out", str(tmp_path), "--limit", "3", "--split", "val"])
    assert json.loads((tmp_path / "metrics.json").read_text())[0]["n"] == 3
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 7 * 3
    assert (tmp_path / "report.html").is_file()
    assert capsys.readouterr().out.splitlines()[0].split()[:3] == ["task", "metric", "score"]
