"""The model card: model_card.md filled in with what the run is and what was measured of it."""

import json
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from phi_mm.checkout import MODEL_CARD
from phi_mm.evaluation.page import CONTROL_NAMES, task_name
from phi_mm.evaluation.report import METRIC_NAMES, percent
from phi_mm.evaluation.tasks import BY_A_BASE
from phi_mm.recipes import Recipe

TUNING = {
    "frozen": "Only the projectors were trained.",
    "lora": "LoRA taught the language model to use them, and was merged into its weights.",
    "qlora": "LoRA taught the language model, in 4-bit, to use them, and was merged into its "
    "dequantised weights.",
    "by_modality": "Two LoRA taught it to use them, one for pictures and one for recordings, kept "
    "apart in `adapters/`: a question in text alone meets the language model's own weights.",
    "full": "The whole language model was trained with them.",
}


def write_card(folder: Path, recipe: Recipe, model: PreTrainedModel, metrics: Path) -> None:
    """Writes folder/README.md.

    Args:
        folder: the artefact.
        recipe: of the run.
        model: the merged model, whose parts are counted.
        metrics: metrics.json of the run; without it the card says that nothing was measured.
    """
    rows = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else []
    measured = date.fromtimestamp(metrics.stat().st_mtime).isoformat() if rows else None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(MODEL_CARD.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(MODEL_CARD.name).render(
        front_matter=_front_matter(recipe, rows),
        parts=_parts(recipe, model),
        millions=f"{_millions(model.parameters()):.1f}",
        dtype=str(model.dtype).removeprefix("torch."),
        sees=model.config.vision_config is not None,
        hears=model.config.audio_config is not None,
        transcribes=model.config.audio_route == "transcript",
        image_tokens=model.config.num_image_tokens if model.config.vision_config else 0,
        audio_ms=20 * model.config.audio_stack,
        tuning=TUNING[_tuning(recipe)],
        seed=recipe.training.get("seed", 42),
        results=_results(rows),
        measured=measured,
        commit=_commit(),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _tuning(recipe: Recipe) -> str:
    return "by_modality" if recipe.adapters == "by_modality" else recipe.tune.language_model


def _front_matter(recipe: Recipe, rows: list[dict]) -> str:
    """What the Hub reads: YAML between dashes, with the measured numbers as a model index."""
    results = [
        EvalResult(
            task_type="any-to-any",
            dataset_type=row["task"],
            dataset_name=f"{task_name(row['task'])} (held out)",
            metric_type=row["metric"],
            metric_value=round(row["value"], 4),
        )
        for row in rows
        if row["control"] is None and row["task"] not in BY_A_BASE
    ]
    bases = [name for name in _bases(recipe).values() if not Path(name).exists()]
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="any-to-any",
        tags=["phi", "multimodal", "image-text-to-text", "audio-text-to-text", "custom_code"],
        language="en",
        base_model=bases or None,
        model_name="phi-mm" if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _bases(recipe: Recipe) -> dict[str, str]:
    spec = recipe.model
    named = {"language model": spec.text, "vision tower": spec.vision, "audio tower": spec.audio}
    return {part: name for part, name in named.items() if name}


def _parts(recipe: Recipe, model: PreTrainedModel) -> list[tuple[str, str, str]]:
    """(part, where it is from, millions of parameters), for each part of the model."""
    inner = model.model
    modules = {
        "language model": [inner.language_model, model.lm_head],
        "vision tower": [inner.vision_tower],
        "audio tower": [inner.audio_tower],
    }
    rows = []
    for part, name in _bases(recipe).items():
        origin = Path(name).name if Path(name).exists() else name
        weights = [w for module in modules[part] for w in module.parameters()]
        rows.append((part, origin, f"{_millions(weights):.2f}"))
    for part, module in (
        ("image projector", inner.multi_modal_projector),
        ("audio projector", inner.audio_projector),
    ):
        if module is not None:
            rows.append((part, "trained here", f"{_millions(module.parameters()):.2f}"))
    return rows


def _millions(weights: Any) -> float:
    return sum({id(weight): weight.numel() for weight in weights}.values()) / 1e6


def _results(rows: list[dict]) -> list[dict[str, str]]:
    """The table of measured numbers, controls as words in the last column."""
    table = []
    for row in (row for row in rows if row["control"] is None):
        under = [r for r in rows if r["task"] == row["task"] and r["control"] is not None]
        controls = [f"{CONTROL_NAMES[r['control']]}: {percent(r['value'])}" for r in under]
        table.append(
            {
                "task": task_name(row["task"]),
                "metric": METRIC_NAMES[row["metric"]],
                "value": percent(row["value"]),
                "interval": f"{percent(row['low'])} to {percent(row['high'])}",
                "n": str(row["n"]),
                "baseline": percent(row["baseline"]),
                "controls": ", ".join(controls),
            }
        )
    return table


def _commit() -> str | None:
    """The commit of this checkout, where it is one."""
    asked = ["git", "-C", str(MODEL_CARD.parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
