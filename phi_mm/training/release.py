"""What a run in training gives to the Hub: what may be published of a checkpoint, and a card."""

import json
import shutil
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from modeling_phi_mm.adapters_phi_mm import FOLDER
from phi_mm.checkout import LICENSE
from phi_mm.hub.card import write_adapter_card, write_card
from phi_mm.hub.export import check_paths, drop_origin
from phi_mm.hub.folder import ADAPTER_CONFIG, check_folder, is_published
from phi_mm.recipes import load_recipe


def write_release(
    checkpoint: Path, folder: Path, model: PreTrainedModel | PeftModel, run_dir: Path
) -> list[str]:
    """Fills `folder` anew with what may be published of a checkpoint; returns the files' names.

    Args:
        checkpoint: a checkpoint, or the run folder once it is saved.
        folder: where nothing else is kept.
        model: the one that is trained.
        run_dir: holds recipe.yaml, and metrics.json if the run was evaluated.

    Raises:
        ValueError: as `check_folder` and `check_paths`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.is_file() and is_published(path.name):
            shutil.copy(path, folder / path.name)
    for inner in ("transcript_tokenizer", FOLDER):
        if (checkpoint / inner).is_dir():
            shutil.copytree(checkpoint / inner, folder / inner)
    recipe, metrics = load_recipe(run_dir / "recipe.yaml"), run_dir / "metrics.json"
    drop_origin(folder)
    adapter = folder / ADAPTER_CONFIG
    if adapter.is_file():  # the parts were joined here: there is no repository of the whole base
        config = json.loads(adapter.read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
        adapter.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if recipe.tune.language_model == "full":
        write_card(folder, recipe, model, metrics)
    else:
        write_adapter_card(folder, recipe, None, metrics)
    shutil.copy(LICENSE, folder / "LICENSE")
    check_paths(folder, recipe)
    return check_folder(folder)
