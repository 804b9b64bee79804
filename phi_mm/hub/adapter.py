"""From a run folder with LoRA to an adapter repository, for a base that others have.

phi-mm push RUN --repo NAME --adapter-only --base REPO
"""

import json
import shutil
from pathlib import Path

from phi_mm.checkout import LICENSE
from phi_mm.hub.card import write_adapter_card
from phi_mm.hub.export import check_paths, drop_origin
from phi_mm.hub.folder import ADAPTER_CONFIG
from phi_mm.recipes import Recipe, load_recipe
from processing import PhiMMProcessor

WEIGHTS = "adapter_model.safetensors"


def lora_recipe(run: Path) -> Recipe:
    """The recipe of a run that has an adapter.

    Raises:
        ValueError: no finished run, or one without LoRA.
    """
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"got {run}, expected a run folder with recipe.yaml: train it first")
    recipe = load_recipe(run / "recipe.yaml")
    if recipe.adapters == "by_modality":
        raise ValueError(
            f"got {run} of adapters=by_modality, which answer only together and with projectors "
            "of their own, expected adapters=shared: phi-mm export and push the whole model"
        )
    if not recipe.tune.adapted or not (run / WEIGHTS).is_file():
        raise ValueError(
            f"got {run} of tune.language_model={recipe.tune.language_model} "
            f"{'with' if (run / WEIGHTS).is_file() else 'without'} {WEIGHTS}, expected a finished "
            "run of lora or qlora: phi-mm export makes a whole model of any run"
        )
    return recipe


def write_adapter(run: Path, folder: Path, base: str, processor: PhiMMProcessor) -> None:
    """Writes the adapter of a run, made for `base`, to `folder`.

    Raises:
        ValueError: no finished run of lora or qlora, or a local path would be published.
    """
    recipe = lora_recipe(run)
    folder.mkdir(parents=True)
    shutil.copy(run / WEIGHTS, folder / WEIGHTS)
    config = json.loads((run / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base, "revision": None}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    type(processor).register_for_auto_class("AutoProcessor")
    processor.save_pretrained(folder)
    drop_origin(folder)
    shutil.copy(LICENSE, folder / "LICENSE")
    write_adapter_card(folder, recipe, base, run / "metrics.json")
    check_paths(folder, recipe)
