"""The training loop: resume, accumulation, merging.

pytest tests/training/test_training.py
"""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phi_mm.assembly import assemble, load_run
from phi_mm.datasets import mixture
from phi_mm.training import begin_or_resume, by_modality
from phi_mm.training.sampler import LengthGroupedSampler


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = ("projectors.safetensors", "adapter_model.safetensors")
    return load_file(next(run_dir / name for name in files if (run_dir / name).is_file()))


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


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
