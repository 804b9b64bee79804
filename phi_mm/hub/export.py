"""From a run folder to an artefact: one folder that is a Hub repository and needs nothing else.

phi-mm export RUN DIR
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from modeling_phi_mm import PhiMMConfig
from phi_mm.assembly import load_run
from phi_mm.checkout import LICENSE
from phi_mm.hub.card import write_card
from phi_mm.hub.verify import Answered, verify
from phi_mm.recipes import Recipe, load_recipe
from processing import PhiMMProcessor

# Where and how transformers loaded a config or a tokenizer: nobody else has that place.
ORIGIN = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
# All of them give the model that answers; `register_for_auto_class` writes only one.
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
)


def export(run: Path, out: Path, metrics: Path | None = None) -> list[Answered]:
    """Writes the run's artefact to `out`, and proves in a fresh process that it answers alike.

    Args:
        run: a run folder.
        out: a folder that does not exist yet.
        metrics: a metrics.json for the model card; by default the run's own, if it was evaluated.

    Returns:
        The probes with the artefact's answers.

    Raises:
        ValueError: `out` exists, `run` is no finished run, a local path would be published, or the
            artefact does not do what the run does.
    """
    with written_whole(out) as part:
        model, processor = load_run(run, merge=True)
        model = model.cpu()  # where the fresh process will compute too
        recipe = load_recipe(run / "recipe.yaml")
        save_artefact(model, processor, part)
        write_card(part, recipe, model, metrics or run / "metrics.json")
        check_paths(part, recipe)
        return verify(part, processor, model)


@contextmanager
def written_whole(out: Path, replace: bool = False) -> Iterator[Path]:
    """A hidden folder beside `out` that gets its name at the very end.

    So what is called `out` is complete and has been verified; a failure leaves nothing.

    Args:
        out: the folder.
        replace: put it in the place of one that exists.

    Raises:
        ValueError: `out` exists, and is not to be replaced.
    """
    if out.exists() and not replace:
        raise ValueError(f"got {out}, which exists: delete it, or give another folder")
    part, old = (out.with_name(f".{out.name}.{kind}") for kind in ("part", "old"))
    for left in (part, old):  # by an earlier attempt that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield part
        if out.exists():
            out.rename(old)
        part.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_artefact(model: PreTrainedModel, processor: PhiMMProcessor, folder: Path) -> None:
    """Weights, configs, tokenizer, chat template, licence and the code that reads them."""
    register_code(model, processor)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    drop_origin(folder)
    shutil.copy(LICENSE, folder / "LICENSE")


def register_code(model: PreTrainedModel, processor: PhiMMProcessor) -> None:
    """From now on, whatever `save_pretrained` writes of these two holds the code that reads it."""
    PhiMMConfig.register_for_auto_class("AutoConfig")
    type(processor).register_for_auto_class("AutoProcessor")
    type(model).register_for_auto_class("AutoModel")
    name = f"{type(model).__module__.rpartition('.')[2]}.{type(model).__name__}"
    model.config.auto_map = dict.fromkeys(AUTO_CLASSES, name)


def check_paths(folder: Path, recipe: Recipe) -> None:
    """Refuses an artefact that tells where on this machine its parts came from.

    Raises:
        ValueError: naming the file and the path.
    """
    parts = (recipe.model.text, recipe.model.vision, recipe.model.audio, recipe.run_dir)
    local = {str(Path(part).resolve()) for part in parts if part and Path(part).exists()}
    local |= {str(part) for part in parts if part and "/" in str(part) and Path(part).exists()}
    for path in folder.rglob("*"):
        if path.suffix not in (".json", ".md", ".jinja", ".py", ".txt"):
            continue
        text = path.read_text(encoding="utf-8")
        for name in sorted({str(Path.cwd()), *local}):
            if name != "/" and name in text:
                raise ValueError(f"got the local path {name} in {path.name}, expected none")


def drop_origin(folder: Path) -> None:
    """Takes the notes named in ORIGIN out of the configs of model and tokenizer."""
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        cleaned = _without(content, ORIGIN)
        if cleaned != content:
            text = json.dumps(cleaned, indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


def _without(tree: object, keys: tuple[str, ...]) -> object:
    if not isinstance(tree, dict):
        return tree
    return {key: _without(value, keys) for key, value in tree.items() if key not in keys}
