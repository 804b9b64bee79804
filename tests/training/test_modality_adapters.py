"""Training one LoRA for pictures and one for recordings: what learns, resumes, is exported.

pytest tests/training/test_modality_adapters.py
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_phi_mm import PhiMMForConditionalGeneration
from phi_mm.assembly import assemble, load_run
from phi_mm.datasets import mixture
from phi_mm.hub import export
from phi_mm.recipes import Recipe, save_recipe
from phi_mm.training import PhiMMTrainer
from processing import PhiMMCollator

APART = "adapters=by_modality"
PHIS = pytest.mark.parametrize("text", ["phi", "phi3"])


def train(runner: PhiMMTrainer, recipe: Recipe, checkpoint: Path | None = None) -> None:
    """Trains into the recipe's run folder, as train.py does."""
    runner.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    runner.save_model()
    save_recipe(recipe, recipe.run_dir / "recipe.yaml")


def saved(run_dir: Path) -> dict[str, torch.Tensor]:
    files = ("projectors", "adapters/image/adapter_model", "adapters/audio/adapter_model")
    return {
        f"{file}/{key}": value
        for file in files
        for key, value in load_file(run_dir / f"{file}.safetensors").items()
    }


@pytest.mark.parametrize("tune", ["lora", "qlora"])
def test_each_adapter_learns_from_its_own_rows(recipe, tune: str):
    model, processor = assemble(recipe(APART, tune=tune))
    train_rows = mixture([{"path": recipe().data.train[0]["path"]}], 0)
    kinds = {"image": 0, "audio": 1, "text": 3}  # by the order in which rows were written
    rows = sorted(train_rows, key=lambda row: int(row["id"].removeprefix("row-")))
    collator = PhiMMCollator(processor, None, None)
    model.train()
    for kind, index in kinds.items():
        model.zero_grad()
        model(**collator([rows[index]])).loss.backward()
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                moved = weight.grad is not None and bool(weight.grad.any())
                assert moved == (f"{kind}_adapter" in name), (kind, name)


def test_towers_and_language_model_are_frozen(recipe):
    model, _ = assemble(recipe(APART))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or "projector" in n for n in learning)
    assert sum("image_adapter" in n for n in learning) == 2 * 2 * 6  # A and B, layers, targets
    assert sum("audio_adapter" in n for n in learning) == 2 * 2 * 6
    assert sum("projector" in n for n in learning) == 8


def test_one_tower_has_one_adapter(recipe):
    model, _ = assemble(recipe(APART, "model.audio=null"))
    assert model.config.modality_adapters == ["image"]


def test_a_resumed_run_ends_as_a_straight_one(trainer, recipe, tmp_path: Path):
    steps = ("training.save_steps=2", "lora.lora_dropout=0.1")
    straight = recipe(APART, *steps, f"training.output_dir={tmp_path / 'straight'}")
    train(trainer(straight), straight)
    resumed = recipe(APART, *steps, f"training.output_dir={tmp_path / 'resumed'}")
    train(trainer(resumed), resumed, straight.run_dir / "checkpoint-2")
    first, second = saved(straight.run_dir), saved(resumed.run_dir)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@PHIS
def test_the_artefact_answers_text_as_the_base_does(
    trainer, recipe, bases: dict[str, Path], text: str, tmp_path: Path
):
    """Bit by bit, alone and in a batch with rows that do use the adapters."""
    settings = recipe(APART, "training.learning_rate=0.05", text=text, tune="lora")
    train(trainer(settings), settings)
    folder = tmp_path / "artefact"
    answered = export(settings.run_dir, folder)
    assert max(row.difference for row in answered) <= 1e-4
    files = {str(path.relative_to(folder)) for path in folder.glob("adapters/*/*")}
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert files == {f"adapters/{m}/{name}" for m in ("image", "audio") for name in names}
    assert json.loads((folder / "config.json").read_text())["modality_adapters"] == [
        "image",
        "audio",
    ]

    model = PhiMMForConditionalGeneration.from_pretrained(folder).eval()
    base = AutoModelForCausalLM.from_pretrained(bases[text]).eval()
    _, processor = load_run(settings.run_dir)
    ids = processor.tokenizer("what colour is the star?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base(ids).logits)
    answer = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(input_ids=ids, **answer), base.generate(ids, **answer))

    together = torch.cat([ids, ids])
    picture = torch.randn(1, 3, 16, 16)
    together[1, :16] = model.config.image_token_id
    with torch.no_grad():
        mixed = model(input_ids=together, pixel_values=picture).logits
        assert torch.equal(mixed[0], base(together).logits[0])
        model.disable_adapters()
        without = model(input_ids=together, pixel_values=picture).logits
    assert torch.equal(mixed[0], without[0])
    assert (mixed[1] - without[1]).abs().max() > 1e-3


def test_full_tuning_has_no_adapters_to_part(recipe):
    with pytest.raises(ValueError, match="adapters is by_modality but tune.language_model is full"):
        recipe(APART, tune="full")


def test_dora_is_refused(recipe):
    with pytest.raises(ValueError, match="got use_dora=True .* expected plain LoRA"):
        assemble(recipe(APART, "lora.use_dora=true", tune="lora"))
