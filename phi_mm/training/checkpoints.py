"""Where a run goes on: the last whole checkpoint of the same recipe, or the beginning."""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phi_mm.files import write_whole
from phi_mm.recipes import Recipe, load_recipe, save_recipe

logger = logging.getLogger(__name__)

SEAL = "checksums.json"
STATE = "trainer_state.json"
# Sections whose change makes another run; `training` may change (more steps, other logging).
SAME_RUN = (
    "model",
    "data",
    "tune",
    "adapters",
    "lora",
    "quantization",
    "distillation",
    "features_dtype",
)


def begin_or_resume(recipe: Recipe) -> Path | None:
    """The checkpoint to resume from, None to start anew; writes recipe.yaml to the run folder.

    `training.resume_from_checkpoint` is `auto` (the last whole checkpoint, if any), the path of
    one, or null for a fresh start.

    Raises:
        ValueError: the folder holds another recipe's run, or checkpoints although a fresh start was
            asked for, or the checkpoint that was asked for is not whole.
    """
    recipe = recipe.pinned()  # the run is loaded as it was trained, on whatever machine
    asked = recipe.training["resume_from_checkpoint"]
    last = last_checkpoint(recipe.run_dir)
    if asked is None and last is not None:
        raise ValueError(
            f"got resume_from_checkpoint=null, but {recipe.run_dir} holds {last.name}: delete the "
            "folder or give another training.output_dir"
        )
    found = last if asked == "auto" else asked and Path(asked)
    if found not in (None, last) and (torn := find_tear(found)):
        raise ValueError(
            f"got resume_from_checkpoint={found}, in which {torn}: give another, or auto for the "
            "last whole one"
        )
    saved = recipe.run_dir / "recipe.yaml"
    if found is not None and saved.is_file():
        _check_same_run(load_recipe(saved), recipe)
    save_recipe(recipe, saved)
    if found is not None:
        logger.info("resuming from %s", found)
    return found


def last_checkpoint(run_dir: Path) -> Path | None:
    """The highest checkpoint that was written to its end and is as it was written."""
    folders = run_dir.glob("checkpoint-*")
    for folder in sorted(folders, key=lambda f: int(f.name.rpartition("-")[2]), reverse=True):
        torn = find_tear(folder)
        if torn is None:
            return folder
        logger.warning("passing over %s: %s", folder, torn)
    return None


def seal(folder: Path) -> None:
    """Notes the checksums of all files of a checkpoint that lacks but the Trainer's state."""
    sums = {
        path.relative_to(folder).as_posix(): _checksum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != STATE and not path.name.startswith(SEAL)
    }
    write_whole(folder / SEAL, json.dumps(sums, indent=1))


def find_tear(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when it is whole.

    The Trainer writes its state after everything else, so a readable one closes a checkpoint. That
    all else is there and as it was written, whatever was deleted or lost since, the seal says.
    """
    contents = {}
    for name in (STATE, SEAL):
        try:
            contents[name] = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return f"{name} is missing"
        except ValueError:
            return f"{name} is cut off"
    for name, checksum in contents[SEAL].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _checksum(folder / name) != checksum:
            return f"{name} is not as it was written"
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
