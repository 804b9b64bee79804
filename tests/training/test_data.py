"""A recipe's data: checked before the first step, and streamed.

pytest tests/training/test_data.py
"""

import json
from pathlib import Path

import pytest
import torch

from phi_mm.assembly import assemble, load_processor
from phi_mm.cli import main
from phi_mm.datasets import Stream
from phi_mm.recipes import Recipe, save_recipe
from phi_mm.training import PhiMMTrainer
from processing import PhiMMCollator


@pytest.mark.parametrize("text", ["phi", "phi3"])
def test_the_processor_of_a_recipe_needs_no_weights(recipe, rows: Path, text: str):
    given = recipe("model.image_pool=2", "model.audio_stack=2", text=text, tune="frozen")
    _, processor = assemble(given)
    light = load_processor(given)
    assert light.to_dict() == processor.to_dict()
    assert light.chat_template == processor.chat_template
    assert light.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_the_check_of_a_recipe_reads_what_it_trains_on_and_measures_by(
    recipe, rows: Path, tmp_path: Path, capsys
):
    copies = json.loads(rows.read_text())[:2]
    for row in copies:
        for kind in ("image", "audio"):
            if kind in row:
                row[kind] = str(rows.parent / row[kind])
    test = tmp_path / "test.json"
    test.write_text(json.dumps(copies))
    task = {"task": "image_qa", "data": str(test), "metric": "exact_match"}
    save_recipe(recipe(f"data.validation={rows}", f"evaluation=[{json.dumps(task)}]"),
                tmp_path / "recipe.yaml")  # fmt: skip
    command = ["data", "check", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="phi-mm: 24 faults"):
        main(command)
    said = capsys.readouterr().out
    assert f"train: {rows}" in said and f"validation: {rows}" in said
    assert f"evaluation: {test}" in said
    assert "rows that also stand in an evaluation set: 24" in said
    assert "missing media: 0" in said
    assert "data:image/png;base64" in (tmp_path / "out" / "data.html").read_text()
    fewer = ["data.validation=[]", "evaluation=null", f"data.train=[{{path: {rows}, limit: 8}}]"]
    with pytest.raises(SystemExit, match="phi-mm: 8 faults"):  # no row has room in 8 tokens
        main([*command[:3], *fewer, "data.max_length=8"])
    with pytest.raises(SystemExit, match="got --processor, --media-root or --max-length"):
        main([*command, "--max-length", "9"])


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.max_steps=-1", "without training.max_steps"),
        ("features=cached", "got streaming with features: cached"),
        ("training.train_sampling_strategy=group_by_length", "needs all rows"),
        ("data.validation=[{path: x.jsonl, streaming: true}]", "got streaming in data.validation"),
        ("data.train=[{path: x.json, streaming: true}]", "a json list is read whole"),
        ("data.train=[{path: x.json, on_bad_row: drop}]", "got on_bad_row='drop'"),
        ("data.train=[{path: x.json, skip_at_most: 3}]", "skip_at_most without on_bad_row"),
        ("data.train=[{path: x.json, wieght: 3}]", "expected path and any of"),
    ],
)
def test_data_that_cannot_be_meant_is_refused(recipe, override: str, complaint: str):
    streamed = "data.train=[{path: x.jsonl, streaming: true}]"
    with pytest.raises(ValueError, match=complaint):
        recipe(streamed, override)


def streaming_trainer(given: Recipe) -> PhiMMTrainer:
    """As train.py makes it."""
    torch.manual_seed(0)
    model, processor = assemble(given)
    length = given.data.max_length
    return PhiMMTrainer(
        model=model,
        args=given.training_arguments(),
        data_collator=PhiMMCollator(processor, None, length),
        train_dataset=Stream(given.data.train, given.data_seed, processor, length),
        processing_class=processor,
    )


def test_a_streamed_run_resumes_to_the_same_weights(recipe, rows: Path, tmp_path: Path):
    lines = rows.parent / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in json.loads(rows.read_text())))
    given = recipe(
        f"data.train=[{{path: {lines}, streaming: true}}, {{path: {rows}, weight: 0.5}}]",
        "training.save_steps=2",
        tune="lora",
    )
    straight = streaming_trainer(given)
    straight.train()
    resumed = streaming_trainer(given)
    resumed.train(resume_from_checkpoint=str(given.run_dir / "checkpoint-2"))
    assert resumed.state.global_step == 4
    own = dict(resumed.model.named_parameters())
    for name, value in straight.model.named_parameters():
        assert torch.equal(value, own[name]), name
