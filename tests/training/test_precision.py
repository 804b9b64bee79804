"""How a run computes: precision, attention, noise, optimisers, activation checkpoints.

pytest tests/training/test_precision.py
"""

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionModel
from transformers.models.phi.modeling_phi import PhiDecoderLayer

from phi_mm import precision
from phi_mm.recipes import load_recipe
from phi_mm.training import begin_or_resume
from phi_mm.weights import learning_towers


class Machine:
    """A GPU as the hardware questions see it."""

    def __init__(self, monkeypatch, bf16: bool, flash: bool = False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(precision, "is_flash_attn_2_available", lambda: flash)


@pytest.mark.parametrize(
    ("text", "bf16", "expected"),
    [
        ("phi", True, "bfloat16"),
        ("phi3", True, "bfloat16"),
        ("phi3", False, "float16"),
        ("phi", False, "float32"),  # it overflows
    ],
)
def test_the_gpu_chooses_the_precision(recipe, monkeypatch, text: str, bf16: bool, expected: str):
    Machine(monkeypatch, bf16)
    made = recipe("training.use_cpu=false", text=text, tune="qlora")
    pinned = made.pinned()
    assert (made.computes, pinned.model.dtype) == (expected, expected)
    assert pinned.training.get("bf16", False) is (expected == "bfloat16")
    assert pinned.training.get("fp16", False) is (expected == "float16")
    assert pinned.pinned() is pinned
    assert made.bitsandbytes_config().bnb_4bit_compute_dtype is getattr(torch, expected)
    on_cpu = recipe(text=text)
    assert (on_cpu.computes, on_cpu.dtype) == ("float32", torch.float32)


def test_full_tuning_keeps_float32_weights_and_computes_in_half(recipe, monkeypatch):
    Machine(monkeypatch, bf16=True)
    made = recipe("training.use_cpu=false", tune="full")
    assert (made.computes, made.dtype) == ("bfloat16", torch.float32)


def test_what_the_recipe_says_is_not_chosen(recipe, monkeypatch):
    Machine(monkeypatch, bf16=True)
    made = recipe("training.use_cpu=false", "model.dtype=float32")
    assert (made.computes, made.dtype) == ("float32", torch.float32)
    made = recipe("training.use_cpu=false", "training.bf16=false")
    assert (made.pinned().training["bf16"], made.dtype) == (False, torch.bfloat16)


def test_the_choice_is_written_down(recipe, monkeypatch):
    made = recipe()
    begin_or_resume(made)
    saved = load_recipe(made.run_dir / "recipe.yaml")
    assert (made.model.dtype, saved.model.dtype) == ("auto", "float32")
    Machine(monkeypatch, bf16=True)
    assert saved.dtype == torch.float32


def test_flash_attention_is_taken_where_it_can_run(monkeypatch):
    Machine(monkeypatch, bf16=True, flash=True)
    assert precision.automatic_attention("bfloat16", on_cpu=False) == "flash_attention_2"
    assert precision.automatic_attention("float16", on_cpu=False) == "sdpa"
    assert precision.automatic_attention("bfloat16", on_cpu=True) == "sdpa"
    Machine(monkeypatch, bf16=True, flash=False)
    assert precision.automatic_attention("bfloat16", on_cpu=False) == "sdpa"


def test_noise_reaches_text_and_no_media(recipe, trainer):
    """NEFTune (arXiv:2310.05914): uniform noise within alpha / sqrt(length x width)."""
    runner = trainer(recipe("training.neftune_noise_alpha=5", "training.max_steps=1", tune="lora"))
    model = runner.model.get_base_model().model
    seen = {}

    def remember(module, arguments, keywords):
        seen["noisy"] = keywords["inputs_embeds"].detach()

    def step(inputs: dict) -> None:
        with torch.no_grad():
            clean = model.language_model.embed_tokens.weight[inputs["input_ids"]]
        handle = model.language_model.register_forward_pre_hook(remember, with_kwargs=True)
        runner.model.train()(**inputs)
        handle.remove()
        media = torch.isin(
            inputs["input_ids"],
            torch.tensor([model.config.image_token_id, model.config.audio_token_id]),
        )
        noise = (seen["noisy"] - clean)[~media]
        bound = 5 / (clean.shape[1] * clean.shape[2]) ** 0.5
        assert 0.9 * bound < noise.abs().max() <= bound * 1.001
        noisy_media = seen["noisy"][media]
        runner.model.eval()(**inputs)
        handle = model.language_model.register_forward_pre_hook(remember, with_kwargs=True)
        runner.model(**inputs)
        handle.remove()
        torch.testing.assert_close(seen["noisy"][media], noisy_media)
        torch.testing.assert_close(seen["noisy"][~media], clean[~media])

    training_step = runner.training_step
    batches = []
    runner.training_step = lambda model, inputs, *rest: (
        batches.append({k: v for k, v in inputs.items() if k != "ids"}),
        step(batches[-1]),
        training_step(model, inputs, *rest),
    )[-1]
    runner.train()
    assert len(batches) == 1


def test_activation_checkpoints_run_frozen_towers_once_and_without_a_graph(recipe, trainer):
    """Each language model layer runs twice, each tower layer once, and nothing reaches a tower."""
    runner = trainer(recipe("training.activation_checkpointing=true", "training.max_steps=1"))
    model = runner.model.get_base_model().model
    runs: dict[str, int] = {"tower": 0, "language model": 0}
    graphs = []

    def count(kind: str):
        def hook(module, arguments, output):
            runs[kind] += 1
            if kind == "tower":
                graphs.append((output[0] if isinstance(output, tuple) else output).requires_grad)

        return hook

    assert not learning_towers(runner.model.get_base_model())
    assert isinstance(model.vision_tower, CLIPVisionModel)
    for layer in (*model.vision_tower.encoder.layers, *model.audio_tower.layers):
        layer.register_forward_hook(count("tower"))
    for layer in model.language_model.layers:
        assert isinstance(layer, PhiDecoderLayer)
        layer.self_attn.register_forward_hook(count("language model"))
    runner.train()
    assert runs == {"tower": 2 + 1, "language model": 2 * 2}
    assert graphs == [False] * 3


@pytest.mark.parametrize("optimiser", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_eight_bit_optimiser_resumes_bit_by_bit(recipe, trainer, tmp_path: Path, optimiser: str):
    made = recipe(f"training.optim={optimiser}", "training.save_steps=2", "training.max_steps=4")
    straight = trainer(made)
    straight.train()
    resumed = trainer(made)
    resumed.train(resume_from_checkpoint=str(made.run_dir / "checkpoint-2"))
    for (name, one), other in zip(
        straight.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_evaluation_gathers_losses_and_never_logits(recipe, trainer, rows, monkeypatch):
    from phi_mm.datasets import mixture
    from phi_mm.training import by_modality

    runner = trainer(recipe(), eval_dataset=by_modality(mixture([{"path": str(rows)}], seed=0)))
    gathered = []
    gather = runner.accelerator.gather_for_metrics

    def watch(value, *rest, **settings):
        gathered.append(value)
        return gather(value, *rest, **settings)

    monkeypatch.setattr(runner.accelerator, "gather_for_metrics", watch)
    monkeypatch.setattr(runner, "gather_function", watch)
    runner.evaluate()
    assert len(gathered) == 4
    assert all(value.numel() <= runner.args.eval_batch_size for value in gathered)
    with pytest.raises(ValueError, match="would gather logits of the whole vocabulary"):
        recipe("training.prediction_loss_only=false")


def test_liger_is_refused_with_the_reason(recipe):
    with pytest.raises(ValueError, match="finds none for phi_mm"):
        recipe("training.use_liger_kernel=true")
