"""The cards: model_card.md and adapter_card.md filled in with what a run is and has measured."""

import json
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from phi_mm.checkout import ADAPTER_CARD, MODEL_CARD
from phi_mm.evaluation.page import CONTROL_NAMES, task_name
from phi_mm.evaluation.report import METRIC_NAMES, percent
from phi_mm.evaluation.tasks import BY_A_BASE
from phi_mm.plan import TOWERS
from phi_mm.recipes import Recipe

# Whether it sees and whether it hears: the pipeline tag of the Hub, and further tags.
TASKS = {
    (True, False): ("image-text-to-text",),
    (False, True): ("audio-text-to-text",),
    (True, True): ("any-to-any", "image-text-to-text", "audio-text-to-text"),
}
TUNING = {
    "frozen": "The projectors were trained; the language model is as it was.",
    "lora": "LoRA taught the language model to use them, and was merged into its weights.",
    "qlora": "LoRA taught the language model, in 4-bit, to use them, and was merged into its "
    "dequantised weights.",
    "by_modality": "Two LoRA taught it to use them, one for pictures and one for recordings, kept "
    "apart in `adapters/`: a question in text alone meets the language model's own weights.",
    "full": "The whole language model was trained with them.",
}

TOWERS_TUNED = {"full": "with all its weights", "lora": "by LoRA"}


def write_card(folder: Path, recipe: Recipe, model: PreTrainedModel, metrics: Path) -> None:
    """Writes folder/README.md.

    Args:
        folder: the artefact.
        recipe: of the run.
        model: the merged model, whose parts are counted.
        metrics: metrics.json of the run; without it the card says that nothing was measured.
    """
    rows, measured = _measured(metrics)
    text = _fill(
        MODEL_CARD,
        front_matter=_front_matter(recipe, rows),
        parts=_parts(recipe, model),
        millions=f"{_millions(model.parameters()):.1f}",
        dtype=str(model.dtype).removeprefix("torch."),
        sees=model.config.vision_config is not None,
        hears=model.config.audio_config is not None,
        transcribes=model.config.audio_route != "encoder",
        image_tokens=model.config.num_image_tokens if model.config.vision_config else 0,
        audio_ms=20 * model.config.audio_stack,
        tuning=_tuning(recipe),
        seed=recipe.training.get("seed", 42),
        results=_results(rows),
        measured=measured,
        commit=_commit(),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _tuning(recipe: Recipe) -> str:
    apart = recipe.adapters == "by_modality"
    sentence = TUNING["by_modality" if apart else recipe.tune.language_model]
    return f"{sentence} {_towers(recipe)}".rstrip()


def _towers(recipe: Recipe) -> str:
    """A sentence on every tower that learnt."""
    return " ".join(
        f"The {tower.replace('_', ' ')} learnt too, {TOWERS_TUNED[recipe.tune.fate(tower)]}."
        for tower in TOWERS
        if recipe.tune.fate(tower) != "frozen"
    )


def write_adapter_card(folder: Path, recipe: Recipe, base: str | None, metrics: Path) -> None:
    """Writes folder/README.md for what a run has trained without the parts that it left alone.

    Args:
        folder: holds an adapter, or projectors alone.
        recipe: of the run.
        base: repository of the model that the adapter adapts; None where there is none.
        metrics: metrics.json of the run, if it was evaluated.
    """
    rows, measured = _measured(metrics)
    adapter = recipe.tune.adapted
    origins = {part: _origin(name) for part, name in _bases(recipe).items()}
    text = _fill(
        ADAPTER_CARD,
        front_matter=_front_matter(recipe, rows, base, adapter),
        adapter=adapter,
        base=base,
        towers=_towers(recipe),
        parts=origins,
        in_4_bit=recipe.tune.language_model == "qlora",
        seed=recipe.training.get("seed", 42),
        results=_results(rows),
        measured=measured,
        commit=_commit(),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _measured(metrics: Path) -> tuple[list[dict], str | None]:
    """The rows of a metrics.json and the day they are of; none where nothing was measured."""
    if not metrics.is_file():
        return [], None
    day = date.fromtimestamp(metrics.stat().st_mtime).isoformat()
    return json.loads(metrics.read_text(encoding="utf-8")), day


def _fill(template: Path, **fields: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(**fields)


def _front_matter(
    recipe: Recipe, rows: list[dict], base: str | None = None, adapter: bool = False
) -> str:
    """What the Hub reads: YAML between dashes, with the measured numbers as a model index."""
    tasks = TASKS[recipe.model.vision is not None, recipe.model.audio is not None]
    results = [
        EvalResult(
            task_type=tasks[0],
            dataset_type=row["task"],
            dataset_name=f"{task_name(row['task'])} (held out)",
            metric_type=row["metric"],
            metric_value=round(row["value"], 4),
        )
        for row in rows
        if row["control"] is None and row["task"] not in BY_A_BASE
    ]
    bases = base or [name for name in _bases(recipe).values() if not Path(name).exists()]
    data = ModelCardData(
        license="apache-2.0",
        library_name="peft" if adapter else "transformers",
        pipeline_tag=tasks[0],
        tags=["phi", "multimodal", *tasks[1:], "custom_code"],
        language="en",
        base_model=bases or None,
        base_model_relation="adapter" if bases and adapter else None,
        datasets=_datasets(recipe) or None,
        model_name="phi-mm" if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _datasets(recipe: Recipe) -> list[str]:
    """Training data that the Hub has; local files mean nothing to others."""
    paths = {str(source["path"]) for source in recipe.data.train}
    return sorted(p for p in paths if not p.endswith((".json", ".jsonl")) and not Path(p).exists())


def _bases(recipe: Recipe) -> dict[str, str]:
    spec = recipe.model
    named = {"language model": spec.text, "vision tower": spec.vision, "audio tower": spec.audio}
    return {part: name for part, name in named.items() if name}


def _origin(name: str) -> str:
    """A base as others may read of it: a local folder by its name alone."""
    return Path(name).name if Path(name).exists() else name


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
        weights = [w for module in modules[part] for w in module.parameters()]
        rows.append((part, _origin(name), f"{_millions(weights):.2f}"))
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
