"""Where a run goes on: the last whole checkpoint of the same recipe, or the beginning."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phi_mm.recipes import Recipe, load_recipe, save_recipe

logger = logging.getLogger(__name__)

# Sections whose change makes another run; `training` may change (more steps, other logging).
SAME_RUN = ("model", "data", "tune", "adapters", "lora", "quantization")


def begin_or_resume(recipe: Recipe) -> Path | None:
    """The checkpoint to resume from, None to start anew; writes recipe.yaml to the run folder.

    `training.resume_from_checkpoint` is `auto` (the last whole checkpoint, if any), the path of
    one, or null for a fresh start.

    Raises:
        ValueError: the folder holds another recipe's run, or checkpoints although a fresh start was
            asked for.
    """
    asked = recipe.training["resume_from_checkpoint"]
    last = last_checkpoint(recipe.run_dir)
    if asked is None and last is not None:
        raise ValueError(
            f"got resume_from_checkpoint=null, but {recipe.run_dir} holds {last.name}: delete the "
            "folder or give another training.output_dir"
        )
    found = last if asked == "auto" else asked and Path(asked)
    saved = recipe.run_dir / "recipe.yaml"
    if found is not None and saved.is_file():
        _check_same_run(load_recipe(saved), recipe)
    save_recipe(recipe, saved)
    if found is not None:
        logger.info("resuming from %s", found)
    return found


def last_checkpoint(run_dir: Path) -> Path | None:
    """The highest checkpoint that was written to its end: a killed run may leave a torn one."""
    folders = run_dir.glob("checkpoint-*")
    whole = [folder for folder in folders if _is_whole(folder / "trainer_state.json")]
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def _is_whole(state: Path) -> bool:
    """The Trainer writes its state after everything else, so a readable one closes a checkpoint."""
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def _check_same_run(saved: Recipe, recipe: Recipe) -> None:
    before, now = _flat(asdict(saved)), _flat(asdict(recipe))
    changed = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if key.startswith(SAME_RUN) and before.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"{recipe.run_dir} holds a run of another recipe ({'; '.join(changed)}): delete the "
            "folder or give another training.output_dir"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
