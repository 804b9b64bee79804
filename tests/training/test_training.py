"""The training loop: resume, accumulation, rates, merging.

pytest tests/training/test_training.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from phi_mm.assembly import assemble, load_run
from phi_mm.datasets import mixture
from phi_mm.recipes import Recipe, save_recipe
from phi_mm.training import begin_or_resume, by_modality
from phi_mm.training.checkpoints import last_checkpoint
from phi_mm.training.sampler import LengthGroupedSampler

ROOT = Path(__file__).parents[2]


def run_cli(recipe: Recipe, path: Path, *overrides: str) -> subprocess.Popen:
    save_recipe(recipe, path)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), str(path), *overrides],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = ("projectors.safetensors", "adapter_model.safetensors")
    return load_file(next(run_dir / name for name in files if (run_dir / name).is_file()))


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_killed_run_ends_as_a_straight_one(recipe, rows: Path, tmp_path: Path):
    settings = ["training.save_steps=3", "lora.lora_dropout=0.1", f"data.validation={rows}"]
    settings += ["features=cached", f"features_dir={tmp_path / 'features'}"]
    straight = recipe(*settings, f"training.output_dir={tmp_path / 'straight'}")
    process = run_cli(straight, tmp_path / "straight.yaml", "training.max_steps=12")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_whole_run(straight.run_dir, output)

    killed = recipe(*settings, f"training.output_dir={tmp_path / 'killed'}")
    process = run_cli(killed, tmp_path / "killed.yaml", "training.max_steps=12")
    while last_checkpoint(killed.run_dir) is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = int(last_checkpoint(killed.run_dir).name.rpartition("-")[2])
    assert reached < 12

    process = run_cli(killed, tmp_path / "killed.yaml", "training.max_steps=12")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"resuming from {killed.run_dir}/checkpoint-{reached}" in output
    assert_same_weights(straight.run_dir, killed.run_dir)


def assert_whole_run(run_dir: Path, output: str) -> None:
    """All that train.py leaves behind is there."""
    assert "language_model" in output and "4-bit" in output  # the summary
    losses = json.loads((run_dir / "eval_results.json").read_text())
    assert losses["eval_image_loss"] > 0
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text())["training"]["max_steps"] == 12
    names = {path.name for path in run_dir.iterdir()}
    assert {"adapter_model.safetensors", "processor_config.json", "chat_template.jinja"} <= names
    assert "model.safetensors" not in names


def test_stage_1_resumes_and_hands_its_projectors_to_stage_2(trainer, recipe, tmp_path: Path):
    stage1 = recipe("training.save_steps=2", "training.max_steps=4", tune="frozen")
    straight = trainer(stage1)
    straight.train()
    straight.save_model(tmp_path / "straight")
    resumed = trainer(stage1)
    resumed.train(resume_from_checkpoint=str(stage1.run_dir / "checkpoint-2"))
    resumed.save_model(tmp_path / "resumed")
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")

    saved = load_file(tmp_path / "straight" / "projectors.safetensors")
    model, _ = assemble(recipe(f"model.init_from={tmp_path / 'straight'}"))
    base = model.get_base_model().model
    learnt = base.multi_modal_projector.modules_to_save["default"].linear_1.weight
    assert torch.equal(learnt, saved["multi_modal_projector.linear_1.weight"])


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_resuming_in_a_later_epoch_sees_the_same_rows(
    trainer, recipe, tmp_path: Path, strategy: str
):
    made = recipe(
        f"training.train_sampling_strategy={strategy}",
        "training.save_steps=8",  # of six steps an epoch
        "training.max_steps=14",
        tune="frozen",
    )
    straight = trainer(made)
    straight.train()
    straight.save_model(tmp_path / "straight")
    torch.manual_seed(99)
    resumed = trainer(made)
    resumed.train(resume_from_checkpoint=str(made.run_dir / "checkpoint-8"))
    resumed.save_model(tmp_path / "resumed")
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")


def test_length_grouped_batches_hold_every_row_once_and_little_padding():
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(1003)]
    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=3)
    rows = list(sampler)
    assert sorted(rows) == list(range(1003))
    assert rows == list(sampler)
    batches = [[lengths[row] for row in rows[i : i + 8]] for i in range(0, 1003, 8)]
    assert sum(8 * max(batch) for batch in batches[:-1]) < 1.1 * sum(lengths)
    firsts = [batch[0] for batch in batches]
    falls = sum(one > other for one, other in zip(firsts, firsts[1:], strict=False))
    assert 45 < falls < 80  # in random order, not from long to short
    sampler.set_epoch(1)
    other = list(sampler)
    assert other != rows and sorted(other) == list(range(1003))


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path):
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"global_st'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "checkpoint-14") is None


def test_a_run_folder_is_not_mixed_up(recipe):
    first = recipe()
    assert begin_or_resume(first) is None
    checkpoint = first.run_dir / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    assert begin_or_resume(recipe("training.max_steps=9")) == checkpoint
    with pytest.raises(ValueError, match=r"another recipe \(lora.r: 4 -> 5\)"):
        begin_or_resume(recipe("lora.r=5"))
    with pytest.raises(ValueError, match="holds checkpoint-2"):
        begin_or_resume(recipe("training.resume_from_checkpoint=null"))


def test_accumulated_batches_learn_as_the_whole_batch(trainer, recipe):
    """Rows have answers of different lengths, so a mean of means would differ."""
    ends = []
    for size, accumulate in ((8, 1), (2, 4)):
        made = recipe(
            f"training.per_device_train_batch_size={size}",
            f"training.gradient_accumulation_steps={accumulate}",
            "training.max_steps=2",
            "training.logging_steps=1",
            "training.max_grad_norm=0",
            "training.optim=sgd",
            tune="frozen",
        )
        run = trainer(made)
        run.train()
        losses = [log["loss"] for log in run.state.log_history if "loss" in log]
        ends.append((losses, run.model.model.audio_projector.linear_1.weight.detach()))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-4)
    torch.testing.assert_close(ends[0][1], ends[1][1], atol=1e-6, rtol=1e-4)


def test_projectors_learn_at_their_own_rate(trainer, recipe):
    run = trainer(recipe("training.weight_decay=0.1"))
    optimizer = run.create_optimizer()
    names = {id(p): name for name, p in run.model.named_parameters()}
    rates: dict[str, set[float]] = {"lora": set(), "projector": set()}
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            rates["projector" if "projector" in name else "lora"].add(group["lr"])
    learning = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert rates == {"lora": {1e-3}, "projector": {1e-2}}
    assert sorted(seen) == sorted(learning)


@pytest.mark.parametrize("text", ["phi", "phi3"])
def test_evaluation_does_not_change_how_four_bit_training_computes(trainer, recipe, text: str):
    run = trainer(recipe(text=text))
    batch = run.data_collator([run.train_dataset[i] for i in range(4)])

    def gradients() -> list[torch.Tensor]:
        run.model.zero_grad()
        run.model.train()
        run.model(**batch).loss.backward()
        return [p.grad.clone() for p in run.model.parameters() if p.grad is not None]

    before = gradients()
    run.model.eval()
    with torch.no_grad():
        evaluated = run.model(**batch).loss
    run.model.train()
    torch.testing.assert_close(evaluated, run.model(**batch).loss.detach())
    for one, other in zip(before, gradients(), strict=True):
        assert torch.equal(one, other)


def test_activation_checkpointing_gives_the_same_gradients(trainer, recipe):
    gradients = []
    for on in (False, True):
        run = trainer(recipe())
        if on:
            run.model.activation_checkpointing_enable()
        run.model.train()
        batch = run.data_collator([run.train_dataset[i] for i in range(6)])
        run.model(**batch).loss.backward()
        learning = {n: p.grad for n, p in run.model.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in learning.values())
        gradients.append(learning)
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], msg=name)


@pytest.mark.parametrize("text", ["phi", "phi3"])
@pytest.mark.parametrize("tune", ["frozen", "lora", "qlora", "full"])
def test_a_loaded_run_answers_as_the_trained_model(trainer, recipe, text: str, tune: str):
    double = ["quantization.bnb_4bit_use_double_quant=true"] if tune == "qlora" else []
    made = recipe(*double, text=text, tune=tune)
    begin_or_resume(made)
    run = trainer(made)
    run.train()
    run.save_model()
    batch = run.data_collator([run.train_dataset[i] for i in range(6)])
    run.model.eval()
    with torch.no_grad():
        trained = run.model(**batch).logits
        for merge in (False, True):
            model, processor = load_run(made.run_dir, merge=merge)
            assert not model.training
            torch.testing.assert_close(model(**batch).logits, trained, atol=2e-5, rtol=1e-4)
    assert type(model).__name__ == "PhiMMForConditionalGeneration"
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model.config.to_dict().get("quantization_config") is None
    assert processor.image_token_id == model.config.image_token_id


def test_load_run_wants_a_run_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="expected a run folder"):
        load_run(tmp_path)


def test_validation_loss_is_reported_for_each_modality(trainer, recipe, rows: Path):
    data = mixture([{"path": str(rows)}], seed=0)
    subsets = by_modality(data)
    assert {kind: len(subset) for kind, subset in subsets.items()} == {
        "image": 6,
        "audio": 6,
        "image_audio": 6,
        "text": 6,
    }
    run = trainer(recipe(), eval_dataset=subsets)
    metrics = run.evaluate()
    for kind, subset in subsets.items():
        batch = run.data_collator([subset[i] for i in range(len(subset))])
        with torch.no_grad():
            assert metrics[f"eval_{kind}_loss"] == pytest.approx(run.model(**batch).loss.item())


def test_reports_to_trackio_and_tensorboard_without_network(
    trainer, recipe, monkeypatch, tmp_path: Path
):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = recipe(
        "training.report_to=[trackio, tensorboard]",
        "training.project=phi-mm-test",
        "training.logging_steps=1",
        "training.max_steps=2",
        tune="frozen",
    )
    trainer(made).train()
    assert list(made.run_dir.rglob("events.out.tfevents.*"))
    assert list((tmp_path / "trackio").glob("*phi-mm-test*.db"))
