"""The plan of a run: what is accepted learns, is saved whole and loaded again; the rest is refused.

pytest tests/training/test_plan.py
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_phi_mm import PhiMMForConditionalGeneration
from phi_mm.assembly import assemble, load_run
from phi_mm.hub.card import write_card
from phi_mm.hub.export import save_artefact
from phi_mm.recipes import Recipe
from phi_mm.training import PhiMMTrainer, begin_or_resume
from phi_mm.weights import save_parts

NO_RATES = "tune.learning_rates={}"
# Overrides of a plan, and what learns by it: modules, and whether by LoRA.
PLANS = {
    "vision in full": (
        ("tune.vision_tower=full",),
        "frozen",
        {"vision_tower", "multi_modal_projector", "audio_projector"},
    ),
    "both towers beside qlora": (
        ("tune.vision_tower=full", "tune.audio_tower=lora"),
        "qlora",
        {
            "vision_tower",
            "audio_tower (LoRA)",
            "multi_modal_projector",
            "audio_projector",
            "language_model (LoRA)",
        },
    ),
    "lora on both towers alone": (
        ("tune.vision_tower=lora", "tune.audio_tower=lora", "lora.r=4"),
        "frozen",
        {
            "vision_tower (LoRA)",
            "audio_tower (LoRA)",
            "multi_modal_projector",
            "audio_projector",
        },
    ),
    "everything in full": (
        ("tune.vision_tower=full", "tune.audio_tower=full"),
        "full",
        {
            "vision_tower",
            "audio_tower",
            "multi_modal_projector",
            "audio_projector",
            "language_model",
            "lm_head",
        },
    ),
    "adapters apart beside a tower": (
        ("adapters=by_modality", "tune.audio_tower=full"),
        "lora",
        {"audio_tower", "multi_modal_projector", "audio_projector", "language_model (LoRA)"},
    ),
}


def learning(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def part(name: str) -> str:
    """`audio_tower (LoRA)` of a parameter's whole name."""
    names = ("vision_tower", "audio_tower", "multi_modal_projector", "audio_projector")
    [found] = [n for n in (*names, "language_model", "lm_head") if f".{n}." in f".{name}"]
    return f"{found} (LoRA)" if ".lora_" in name else found


def ended(runner: PhiMMTrainer, recipe: Recipe, folder: Path, since: str | None = None) -> dict:
    """Trains, saves to `folder` and returns the weights that learnt."""
    runner.train(resume_from_checkpoint=since)
    runner.save_model(str(folder))
    return {name: value.detach().clone() for name, value in learning(runner.model).items()}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_learns_resumes_and_is_loaded_again(trainer, recipe, tmp_path: Path, name: str):
    overrides, language_model, modules = PLANS[name]
    made = recipe(*overrides, "training.save_steps=2", NO_RATES, tune=language_model)
    begin_or_resume(made)
    runner = trainer(made)
    before = {key: value.detach().clone() for key, value in learning(runner.model).items()}
    assert {part(key) for key in before} == modules
    after = ended(runner, made, made.run_dir)
    moved = {part(key) for key, value in after.items() if not torch.equal(value, before[key])}
    assert moved == modules

    again = trainer(made)
    resumed = ended(again, made, tmp_path / "resumed", str(made.run_dir / "checkpoint-2"))
    assert resumed.keys() == after.keys()
    for key, value in after.items():
        assert torch.equal(value, resumed[key]), key

    batch = runner.data_collator([runner.train_dataset[i] for i in range(6)])
    runner.model.eval()
    with torch.no_grad():
        trained = runner.model(**batch).logits
        for merge in (False, True):
            model, _ = load_run(made.run_dir, merge=merge)
            torch.testing.assert_close(model(**batch).logits, trained, atol=2e-5, rtol=1e-4)


def test_every_open_weight_gets_a_gradient(recipe, trainer):
    """Distributed training waits for each of them, also where a batch is of text alone."""
    runner = trainer(recipe("tune.vision_tower=full", "tune.audio_tower=full", NO_RATES))
    rows = sorted(runner.train_dataset, key=lambda row: int(row["id"].removeprefix("row-")))
    runner.model.train()
    for index in (2, 3):  # both media, and none
        runner.model.zero_grad()
        runner.model(**runner.data_collator([rows[index]])).loss.backward()
        without = [name for name, p in learning(runner.model).items() if p.grad is None]
        assert without == []


def test_a_frozen_projector_is_saved_and_goes_on_unchanged(recipe, trainer, tmp_path: Path):
    first = recipe(f"training.output_dir={tmp_path / 'first'}", NO_RATES, tune="frozen")
    begin_or_resume(first)
    ended(trainer(first), first, first.run_dir)
    aligned = load_file(first.run_dir / "projectors.safetensors")["audio_projector.linear_1.weight"]
    for tune in ("frozen", "qlora"):
        words = [f"model.init_from={first.run_dir}", "tune.audio_projector=frozen", NO_RATES]
        second = recipe(*words, f"training.output_dir={tmp_path / tune}", tune=tune)
        begin_or_resume(second)
        after = ended(trainer(second), second, second.run_dir)
        assert not any("audio_projector" in name for name in after)
        assert any("multi_modal_projector" in name for name in after)
        model, _ = load_run(second.run_dir, merge=True)
        assert torch.equal(model.model.audio_projector.linear_1.weight, aligned)


def test_a_tower_that_learnt_is_handed_on_or_refused(recipe, trainer, tmp_path: Path):
    words = ("tune.vision_tower=full", NO_RATES)
    first = recipe(*words, f"training.output_dir={tmp_path / 'first'}", tune="frozen")
    after = ended(trainer(first), first, first.run_dir)
    name = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    model, _ = assemble(recipe(*words, f"model.init_from={first.run_dir}", tune="frozen"))
    assert torch.equal(dict(model.named_parameters())[name], after[name])
    with pytest.raises(ValueError, match="trained its vision_tower, .* set tune.vision_tower"):
        assemble(recipe(NO_RATES, f"model.init_from={first.run_dir}"))


def test_an_artefact_holds_the_towers_that_learnt(recipe, trainer, tmp_path: Path):
    made = recipe("tune.vision_tower=full", "tune.audio_tower=lora", NO_RATES, tune="lora")
    begin_or_resume(made)
    ended(trainer(made), made, made.run_dir)
    model, processor = load_run(made.run_dir, merge=True)
    folder = tmp_path / "artefact"
    save_artefact(model, processor, folder)
    write_card(folder, made, model, folder / "metrics.json")
    saved = PhiMMForConditionalGeneration.from_pretrained(folder).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    config = json.loads((made.run_dir / "adapter_config.json").read_text())
    assert sorted(config["modules_to_save"]) == [
        "audio_projector",
        "multi_modal_projector",
        "vision_tower",
    ]
    card = (folder / "README.md").read_text()
    assert "The vision tower learnt too, with all its weights." in card
    assert "The audio tower learnt too, by LoRA." in card


def test_each_module_learns_at_its_own_rate(recipe, trainer):
    rates = "tune.learning_rates={vision_tower: 1e-6, audio_projector: 1e-4}"
    runner = trainer(recipe("tune.vision_tower=full", rates, "training.weight_decay=0.1"))
    found: dict[str, set[float]] = {}
    names = {id(p): name for name, p in learning(runner.model).items()}
    for group in runner.create_optimizer().param_groups:
        for parameter in group["params"]:
            found.setdefault(part(names.pop(id(parameter))), set()).add(group["lr"])
    assert names == {}
    assert found == {
        "vision_tower": {1e-6},
        "audio_projector": {1e-4},
        "multi_modal_projector": {1e-3},
        "language_model (LoRA)": {1e-3},
    }


def test_a_tower_that_learns_keeps_float32_weights(recipe):
    words = ("model.dtype=bfloat16", "tune.vision_tower=full", NO_RATES)
    model, _ = assemble(recipe(*words))
    dtypes = {part(name): p.dtype for name, p in model.named_parameters() if "lm_head" not in name}
    assert {p.dtype for p in learning(model).values()} == {torch.float32}
    assert dtypes["audio_tower"] == torch.bfloat16


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["tune.audio_projector=lora"], "tune.audio_projector is lora: a projector is small"),
        (["tune.multi_modal_projector=qlora"], "tune.multi_modal_projector is qlora: a projector"),
        (["tune.vision_tower=qlora"], "tune.vision_tower is qlora: only the language model"),
        (["tune.audio_projector=frozen"], "tune.audio_projector is frozen without model.init_from"),
        (["tune.vision_tower=full", "features=cached"], "tune.vision_tower is full, but features"),
        (
            ["tune.audio_tower=lora", "model.audio=null"],
            "tune.audio_tower is lora, but no gradient would reach it",
        ),
        (
            ["tune.audio_tower=full", "model.audio_route=transcript"],
            "tune.audio_tower is full, but no gradient would reach it",
        ),
        (
            ["tune.language_model=full", "tune.audio_tower=lora"],
            "tune.audio_tower is lora beside a language model that is tuned in full",
        ),
        (
            ["adapters=by_modality", "tune.audio_tower=lora"],
            "adapters is by_modality but tune.audio_tower is lora",
        ),
        (
            [
                "model.init_from=runs/x",
                "lora=null",
                "tune.language_model=frozen",
                "tune.audio_projector=frozen",
                "tune.multi_modal_projector=frozen",
            ],
            "nothing would learn: language_model, vision_tower, multi_modal_projector",
        ),
        (["tune.learning_rates={audio_tower: 1e-4}"], "audio_tower is given, but that module does"),
        (["tune.learning_rates={vision: 1e-4}"], "'vision' .* the nearest is 'vision_tower'"),
        (["tune.learning_rates={audio_projector: 0.0}"], "audio_projector=0.0, expected more than"),
        (["tune.projector_learning_rate=1e-4"], "unknown key 'projector_learning_rate'"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_refused(recipe, overrides: list[str], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        recipe(NO_RATES, *overrides, tune="lora")


def test_two_alignments_are_joined(recipe, tmp_path: Path):
    """One run has taught the image projector, another the audio projector."""
    runs = {}
    for seed, (sense, other) in enumerate((("vision", "audio"), ("audio", "vision"))):
        runs[sense] = tmp_path / sense
        runs[sense].mkdir()
        torch.manual_seed(seed)
        alone, _ = assemble(recipe(f"model.{other}=null", NO_RATES, tune="frozen"))
        save_parts(alone, runs[sense])
    both = f"model.init_from=[{runs['vision']}, {runs['audio']}]"
    joined, _ = assemble(recipe(both, NO_RATES, tune="frozen"))
    for sense, name in (("vision", "multi_modal_projector"), ("audio", "audio_projector")):
        taught = load_file(runs[sense] / "projectors.safetensors")
        for key, value in getattr(joined.model, name).state_dict().items():
            assert torch.equal(value, taught[f"{name}.{key}"])
    with pytest.raises(ValueError, match="holds no audio_projector: add the run that trained it"):
        assemble(recipe(f"model.init_from={runs['vision']}", NO_RATES, tune="frozen"))
