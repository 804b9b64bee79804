"""`phi-mm estimate`: exact where libraries say so, and equal to a step with values elsewhere.

pytest tests/training/test_estimate.py
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published import write_config

from phi_mm.assembly import assemble
from phi_mm.cli import main
from phi_mm.estimate import Question, Rehearsal, Row, largest_batch
from phi_mm.estimate.report import choose_row
from phi_mm.estimate.step import Stage, make_batch, measure
from phi_mm.recipes import Recipe, load_recipe, save_recipe

ROOT = Path(__file__).parents[2]
ROW = Row(length=60, supervised=7, images=1, windows=1, sound=25)
PHI_2_LINEARS = 32 * (4 * 2560**2 + 2 * 2560 * 10240)
PHI_2_EMBEDDED = 2 * 51200 * 2560 + 51200 + 2 * 2560  # both ends of it, and the last norm
PHI_2_BIASES = 32 * (4 * 2560 + 10240 + 2560 + 2 * 2560)  # and norms
PROJECTOR = 1024 * 2560 + 2560 + 2560**2 + 2560
LORA = 32 * 128 * (4 * 2 * 2560 + 2 * (2560 + 10240))


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function that gives a folder with the published config of a base."""
    root = tmp_path_factory.mktemp("published")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else write_config(name, path)

    return folder


@pytest.fixture
def phi_2(published) -> Callable[..., Recipe]:
    def make(stage: str, *overrides: str) -> Recipe:
        parts = [f"model.text={published('phi-2')}", f"model.vision={published('clip-l-336')}"]
        return load_recipe(ROOT / f"recipes/phi-2/{stage}.yaml", [*parts, *overrides])

    return make


def test_weights_and_optimiser_of_phi_2_by_qlora(phi_2):
    estimate = Rehearsal(phi_2("stage2")).take(1, Row(640, 10, 1, 0, 0))
    tower = 23 * (12 * 1024**2 + 13 * 1024) + 1024 * (3 * 14 * 14 + 1 + 577 + 4)
    assert estimate.weights == {
        # half a byte; a byte of scale for 64 of them; a float32 of scale for 256 of those
        "4-bit": PHI_2_LINEARS * (0.5 + 1 / 64 + 4 / (64 * 256)),
        "bfloat16": 2 * (PHI_2_EMBEDDED + PHI_2_BIASES + tower),
        "float32": 2 * 4 * PROJECTOR,  # PEFT keeps the original beside the one that learns
        "LoRA": 4 * LORA,
    }
    assert estimate.optimiser == 8 * (LORA + PROJECTOR)
    assert estimate.step.gradients == 4 * (LORA + PROJECTOR)  # those of earlier batches
    assert estimate.scratch == 2 * 2560 * 10240
    assert estimate.exchange == 0


@pytest.mark.parametrize(
    ("override", "optimiser"),
    [
        ("training.optim=sgd", 0),
        ("training.optim=paged_adamw_8bit", 2 * (1 + 4 / 256) * PROJECTOR),
        ("training.optim=adamw_torch", 8 * PROJECTOR),
    ],
)
def test_optimiser_states_go_by_its_name(phi_2, override: str, optimiser: float):
    together = Rehearsal(phi_2("stage1", override), processes=8).take(1, Row(640, 10, 1, 0, 0))
    assert together.optimiser == optimiser
    assert together.exchange == 4 * PROJECTOR
    assert "4-bit" not in together.weights and "LoRA" not in together.weights


def test_an_optimiser_of_unknown_states_is_refused(phi_2):
    with pytest.raises(ValueError, match="got training.optim=galore_adamw, expected one of sgd,"):
        Rehearsal(phi_2("stage1", "training.optim=galore_adamw"))


@pytest.mark.parametrize("text", ["phi", "phi3"])
@pytest.mark.parametrize("tune", ["frozen", "lora", "full"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_without_values_is_the_step_with_values(
    recipe, text: str, tune: str, checkpointing: bool
):
    """The same bytes at the fullest moment, of each kind, and the same multiplications."""
    made = recipe(text=text, tune=tune)
    rehearsal = Rehearsal(made, checkpointing)
    model, _ = assemble(made)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    batch = with_placeholders(make_batch(model.config, ROW, 3, cached=None), model.config)
    assert rehearsal.take(3, ROW).step == measure(model, model.config, batch, half=None)


def with_placeholders(batch: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """The batch as a collator would give it: media first, a label on each of the last tokens."""
    ids = batch["input_ids"].fill_(5)
    ids[:, :16] = config.image_token_id
    ids[:, 16:41] = config.audio_token_id  # 100 frames, stacked by four
    batch["labels"] = ids.clone()
    batch["labels"][:, : -ROW.supervised] = -100
    batch["attention_mask"][0, -1] = 0  # where nothing is padded, no mask is made
    return batch


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tune", ["frozen", "lora", "full"])
def test_what_two_layers_and_three_tell_holds_for_all(
    recipe, bases: dict[str, Path], tmp_path: Path, tune: str, checkpointing: bool
):
    config = json.loads((bases["phi"] / "config.json").read_text()) | {"num_hidden_layers": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = recipe(f"model.text={tmp_path}", tune=tune)
    rehearsal = Rehearsal(made, checkpointing)
    six = Stage(made, rehearsal.config, 6, checkpointing)
    assert rehearsal.take(2, ROW).step == six.take(2, ROW)


def test_logits_are_those_of_supervised_positions(recipe):
    rehearsal = Rehearsal(recipe(tune="frozen"))
    few, many = (rehearsal.take(2, replace(ROW, supervised=n)).step for n in (7, 14))
    assert many.largest_logits == 2 * few.largest_logits
    # 320 rows of vocabulary: logits, their logarithms and the gradients of both
    assert few.largest_logits == 3 * 2 * 7 * 320 * 4


def test_the_largest_batch_fits_and_one_row_more_does_not(recipe):
    rehearsal = Rehearsal(recipe(tune="lora"))
    room = 8 * 2**20
    size = largest_batch(rehearsal, ROW, room)
    assert rehearsal.take(size, ROW).total <= room < rehearsal.take(size + 1, ROW).total
    assert largest_batch(rehearsal, ROW, room=2**10) == 0


def test_the_command_prints_memory_batch_and_hours(recipe, tmp_path: Path, capsys):
    made = recipe(tune="frozen")
    save_recipe(made, tmp_path / "recipe.yaml")
    asked = ["--length", "60", "--supervised", "7", "--rows", "558128", "--speed", "0.001"]
    asked += ["--memory", "0.01"]
    main(["estimate", str(tmp_path / "recipe.yaml"), *asked])
    out = capsys.readouterr().out
    assert "4 rows of 60 tokens (7 supervised, 1 images, 1 audio windows)" in out
    estimate = Rehearsal(made).take(4, ROW)
    assert f"{estimate.total / 2**30:.2f} GiB" in out
    off = next(line for line in out.splitlines() if line.startswith("off "))
    hours = estimate.step.flops / 4 * 558_128 / 1e9 / 3600
    assert off.split()[-1] == f"{hours:.1f}"


def test_a_config_that_cannot_be_had_is_told_in_a_sentence(phi_2, tmp_path: Path):
    with pytest.raises(ValueError, match="give a folder that holds it: model.text=FOLDER"):
        Rehearsal(phi_2("stage1", f"model.text={tmp_path}/nothing"))


def test_rows_must_hold_their_media(published):
    parts = [f"model.text={published('phi-2')}", f"model.vision={published('clip-l-336')}"]
    with pytest.raises(SystemExit, match="got rows of 576 tokens, 576 of them media"):
        main(["estimate", str(ROOT / "recipes/phi-2/stage1.yaml"), *parts, "--length", "576"])


@pytest.mark.parametrize(
    ("base", "run"),
    [
        ("phi-2", "stage1"),
        ("phi-1.5", "audio"),
        ("phi-3.5-mini", "joint"),
        ("phi-4-mini", "stage2"),
    ],
)
def test_headers_of_recipes_say_what_is_predicted(published, base: str, run: str):
    path = ROOT / f"recipes/{base}/{run}.yaml"
    header = path.read_text()
    rows, length = re.search(r"Predicted for ([\d,]+) rows of (\d+) tokens", header).groups()
    memory, hours = re.search(r"#   (?:QLoRA  )?([\d.]+) GiB .*; (\d+) GPU hours", header).groups()
    parts = {"text": base, "vision": "clip-l-336", "audio": "whisper-small"}
    written = load_recipe(path)
    recipe = load_recipe(
        path,
        [f"model.{k}={published(v)}" for k, v in parts.items() if vars(written.model)[k]],
    )
    rehearsal = Rehearsal(recipe)
    size = recipe.training["per_device_train_batch_size"]
    whole = rehearsal.take(size, choose_row(rehearsal, Question()))
    assert f"{whole.total / 2**30:.1f}" == memory
    mean = choose_row(rehearsal, Question(length=int(length), seconds=6.0))
    flops = rehearsal.take(1, mean).step.flops * int(rows.replace(",", ""))
    assert f"{flops / 125e12 / 3600:.0f}" == hours
