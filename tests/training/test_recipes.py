"""Recipes: strict keys and types, overrides, round trip. `pytest tests/training/test_recipes.py`"""

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from phi_mm.recipes import load_recipe, save_recipe

ROOT = Path(__file__).parents[2]
PARTS = ("accelerate", "common")  # of launches and of recipes
RECIPES = sorted(p for p in (ROOT / "recipes").glob("*/*.yaml") if p.parent.name not in PARTS)
LAUNCHES = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
PLAIN = """
model: {text: some/phi, vision: some/clip}
data: {train: rows.json}
tune: {language_model: frozen}
training: {output_dir: out, learning_rate: 2e-5}
"""


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.yaml"
    path.write_text(PLAIN)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_shipped_recipe_loads_and_names_its_own_command(path: Path):
    recipe = load_recipe(path)
    command = f"train.py recipes/{path.parent.name}/{path.name}"
    assert command in path.read_text()
    assert recipe.run_dir.name == path.stem
    if path.stem == "stage2":
        stage1 = load_recipe(path.with_name("stage1.yaml"))
        assert Path(recipe.model.init_from) == stage1.run_dir
        ours, theirs = vars(recipe.model) | {"init_from": None}, vars(stage1.model)
        assert ours == theirs


def test_every_base_has_every_run():
    names = {(path.parent.name, path.stem) for path in RECIPES}
    bases = ("phi-1.5", "phi-2", "phi-3.5-mini", "phi-4-mini")
    runs = ("stage1", "stage2", "mix665k", "audio", "joint")
    tiny = {("tiny", run) for run in ("stage1", "stage2", "recordings")}
    assert names == {(base, run) for base in bases for run in runs} | tiny


def test_scientific_notation_without_a_dot_is_a_number(plain: Path):
    arguments = load_recipe(plain, ["training.weight_decay=1e-2"]).training_arguments()
    assert (arguments.learning_rate, arguments.weight_decay) == (2e-5, 1e-2)


def test_no_is_a_word_and_false_a_truth_value(plain: Path, tmp_path: Path):
    recipe = load_recipe(plain, ["training.save_strategy=no", "training.bf16=false"])
    assert recipe.training["save_strategy"] == "no"
    assert recipe.training["bf16"] is False
    save_recipe(recipe, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_overrides_reach_every_section(plain: Path):
    overrides = ["training.max_steps=7", "data.train=[a.json, {path: b.json, weight: 2}]"]
    overrides += ["tune.language_model=qlora", "lora.r=3", "model.audio=some/whisper"]
    recipe = load_recipe(plain, overrides)
    assert recipe.training_arguments().max_steps == 7
    assert recipe.data.train == [{"path": "a.json"}, {"path": "b.json", "weight": 2}]
    assert recipe.lora == {"r": 3}
    assert recipe.model.audio == "some/whisper"


def test_our_training_defaults_hold_and_yield(plain: Path):
    arguments = load_recipe(plain).training_arguments()
    assert arguments.remove_unused_columns is False
    assert arguments.prediction_loss_only is True
    assert arguments.dataloader_pin_memory is torch.cuda.is_available()
    changed = load_recipe(plain, ["training.logging_steps=3"]).training_arguments()
    assert changed.logging_steps == 3


def test_saved_recipe_is_read_back_equal(plain: Path, tmp_path: Path):
    recipe = load_recipe(plain, ["lora.r=3", "tune.language_model=lora", "features=cached"])
    save_recipe(recipe, tmp_path / "run" / "recipe.yaml")
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.max_step=3", "'max_step' in section training; the nearest is 'max_steps'"),
        ("model.audio_stak=3", "'audio_stak' in section model; the nearest is 'audio_stack'"),
        ("quantisation.load_in_4bit=true", "'quantisation' .* the nearest is 'quantization'"),
        ("lora.rank=3", "'rank' in section lora"),
        ("evaluation=[{task: a, data: b, metrik: c}]", "'metrik' in section evaluation"),
        ("model.image_pool=two", "image_pool"),
        ("tune.language_model=all", "language_model"),
        ("features=sometimes", "expected live or cached"),
        ("data.train=3", "expected a path or a mapping"),
        ("data.train=[{weight: 2}]", "no `path`"),
        ("training.max_steps", "expected section.key=value"),
        ("features.dir=x", "features is not a section"),
        ("model.vision=null", "give at least one tower"),
        ("lora.r=3", "section lora is given but nothing in `tune` is lora"),
        ("quantization.load_in_4bit=true", "section quantization is given"),
        ("features_dir=x", "features is live"),
        ("features_dtype=int8", "features is live"),
        ("features_dtype=int4", "got features_dtype='int4', expected tower or float16 or int8"),
        ("training.output_dir=null", "output_dir is missing"),
        ("model={text: a, vision: b, dtype: float64}", "dtype"),
        ("model.transcript_language=en", "model.audio_route is encoder, which writes nothing"),
        ("training.label_smoothing_factor=0.1", "label_smoothing"),
    ],
)
def test_what_nobody_would_read_is_refused(plain: Path, override: str, complaint: str):
    start = ["features=live"] if override.startswith("features.") else []
    with pytest.raises(ValueError, match=complaint):
        load_recipe(plain, [*start, override])


def test_lora_targets_are_not_the_recipes_business(plain: Path):
    with pytest.raises(ValueError, match="target_modules"):
        load_recipe(plain, ["tune.language_model=lora", "lora.target_modules=all-linear"])


def test_full_tuning_keeps_its_weights_in_float32(plain: Path):
    with pytest.raises(
        ValueError, match="got model.dtype=bfloat16 to tune it in full, expected float32"
    ):
        load_recipe(plain, ["tune.language_model=full", "model.dtype=bfloat16"])


def test_a_recipe_speaks_on_top_of_its_base(plain: Path, tmp_path: Path):
    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "own.yaml").write_text(
        "base: ../plain.yaml\ndata: {train: [a.json, b.json]}\ntraining: {learning_rate: 1e-3}\n"
    )
    recipe = load_recipe(nested / "own.yaml", ["training.max_steps=4"])
    assert recipe.model == load_recipe(plain).model
    assert recipe.data.train == [{"path": "a.json"}, {"path": "b.json"}]  # lists are replaced
    assert recipe.training["learning_rate"] == 1e-3
    assert (recipe.training["output_dir"], recipe.training["max_steps"]) == ("out", 4)


LAUNCHES = {
    "ddp": (DistributedType.MULTI_GPU, 1, 8),
    "nodes": (DistributedType.MULTI_GPU, 2, 16),
    "fsdp": (DistributedType.FSDP, 1, 8),
    "zero2": (DistributedType.DEEPSPEED, 1, 8),
    "zero3": (DistributedType.DEEPSPEED, 1, 8),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_are_read_by_accelerate_and_head_a_command_that_loads(name: str):
    path = ROOT / f"recipes/accelerate/{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.num_machines, config.num_processes) == LAUNCHES[name]
    (command,) = (line for line in path.read_text().splitlines() if "accelerate launch" in line)
    words = command.lstrip("# ").split()
    arguments = launch_command_parser().parse_args(words[2:])
    assert arguments.config_file == f"recipes/accelerate/{name}.yaml"
    recipe, *overrides = arguments.training_script_args
    load_recipe(ROOT / recipe, overrides)


def test_all_launches_are_looked_at():
    assert {path.stem for path in (ROOT / "recipes/accelerate").iterdir()} == set(LAUNCHES)


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_zero_settings_are_those_of_its_plugin(name: str, stage: int):
    settings = load_config_from_file(str(ROOT / f"recipes/accelerate/{name}.yaml")).deepspeed_config
    assert settings["zero_stage"] == stage
    known = {action.dest for action in launch_command_parser()._actions}
    assert settings.keys() <= known


def test_fsdp_settings_are_arguments_of_the_launcher():
    settings = load_config_from_file(str(ROOT / "recipes/accelerate/fsdp.yaml")).fsdp_config
    assert settings["fsdp_version"] == 2
    assert settings.keys() <= {action.dest for action in launch_command_parser()._actions}
