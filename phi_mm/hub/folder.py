"""What may be published: the files of an artefact, and nothing that a run leaves beside them."""

import json
import math
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

ADAPTER_CONFIG = "adapter_config.json"
VOCABULARY = ("tokenizer.json", "vocab.json", "added_tokens.json", "merges.txt", "normalizer.json")
# Files by name, in any folder that is not hidden; everything else is refused.
PUBLISHED = (
    "*_phi_mm.py",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "projectors.safetensors",
    "towers.safetensors",
    "config.json",
    "generation_config.json",
    ADAPTER_CONFIG,
    "processor_config.json",
    "preprocessor_config.json",
    *VOCABULARY,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
)
NEEDED = ("README.md", "LICENSE", "processor_config.json", "tokenizer_config.json")
FRONT_MATTER = ("license", "library_name", "pipeline_tag", "language", "tags")
TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}")
HOME = re.compile(r"(/home/|/Users/|[A-Za-z]:\\+Users\\+)\w[\w.-]*")


def check_folder(folder: Path) -> list[str]:
    """The files to publish, as paths inside `folder`, none of which tells what it should not.

    Raises:
        ValueError: a file of no kind that is published (optimizer state, data, logs, pickles,
            hidden files), a missing one, weights that are torn or no shard of their index, a local
            path, something like an access token, or a card whose front matter is not complete.
    """
    if not folder.is_dir():
        raise ValueError(f"got {folder}, expected a folder: phi-mm export RUN DIR writes one")
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    )
    if refused := [name for name in names if not is_published(name)]:
        raise ValueError(
            f"got {', '.join(refused[:5])}{' ...' if refused[5:] else ''} in {folder}, expected "
            "nothing but code, safetensors weights, configs, processor, tokenizer, template, card "
            "and licence: take the rest out, or export the run to a fresh folder"
        )
    if missing := [name for name in NEEDED if name not in names]:
        raise ValueError(
            f"got {folder} without {', '.join(missing)}: phi-mm export writes a whole folder"
        )
    _check_weights(folder, names)
    for name in names:
        _check_text(folder, name)
    check_card(folder)
    return names


def is_published(name: str) -> bool:
    """Whether a file of this path is of a kind that belongs into a repository of a model."""
    *parents, last = name.split("/")
    hidden = any(part.startswith(".") for part in parents)
    return not hidden and any(fnmatch(last, pattern) for pattern in PUBLISHED)


def check_card(folder: Path) -> None:
    """Refuses a README.md whose front matter the Hub could not read or that leaves a field out.

    huggingface_hub's own `validate` would ask the Hub; what is read here is what it reads.

    Raises:
        ValueError: naming the field.
    """
    try:
        data = ModelCard((folder / "README.md").read_text(encoding="utf-8")).data
    except ValueError as error:
        raise ValueError(f"got a front matter in README.md that is not valid: {error}") from error
    if missing := [name for name in FRONT_MATTER if not data.get(name)]:
        raise ValueError(f"got a README.md without {', '.join(missing)} in its front matter")
    bases = data.get("base_model", [])
    bases = [bases] if isinstance(bases, str) else bases
    for base in bases:
        validate_repo_id(base)
    _check_adapted(folder, bases, data.get("base_model_relation"))
    for result in data.get("eval_results", []):
        if not isinstance(result.metric_value, int | float) or math.isnan(result.metric_value):
            raise ValueError(
                f"got {result.metric_value!r} for {result.metric_type} of {result.dataset_name} "
                "in README.md, expected a number"
            )


def _check_adapted(folder: Path, bases: list[str], relation: str | None) -> None:
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"]
    if base is not None and (bases, relation) != ([base], "adapter"):
        raise ValueError(
            f"got base_model {bases} and base_model_relation {relation} in README.md, expected "
            f"{base} and adapter, as {ADAPTER_CONFIG} has it"
        )


def _check_weights(folder: Path, names: list[str]) -> None:
    weights = [name for name in names if name.endswith(".safetensors")]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        found = {name for name in weights if fnmatch(name, "model*.safetensors")}
        if shards != found:
            raise ValueError(
                f"got the weights {sorted(found)}, expected those of {index.name}: {sorted(shards)}"
            )
    if not weights:
        raise ValueError(f"got {folder} without any weights, expected *.safetensors in it")
    for name in weights:
        try:
            with safe_open(folder / name, framework="pt") as file:
                notes = json.dumps(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"got {name}, which is no whole safetensors file ({error}): export the run again"
            ) from error
        _check_words(folder, name, notes)


def _check_text(folder: Path, name: str) -> None:
    if name.endswith(".safetensors"):
        return
    text = (folder / name).read_text(encoding="utf-8")
    _check_words(folder, name, text)
    if Path(name).name in VOCABULARY:
        return  # its strings are tokens, among them pieces of paths
    if found := HOME.search(text):
        raise ValueError(f"got the local path {found[0]} in {name}, expected none")
    if name.endswith(".json"):
        for value in _strings(json.loads(text)):
            if _is_local(value):
                raise ValueError(f"got the local path {value} in {name}, expected none")


def _check_words(folder: Path, name: str, text: str) -> None:
    if TOKEN.search(text):  # which is not repeated here: messages are logged
        raise ValueError(
            f"got something like an access token in {name}: take it out, and revoke it"
        )
    for here in {str(Path.cwd()), str(folder.resolve())}:
        if len(Path(here).parts) > 2 and here in text:
            raise ValueError(f"got the local path {here} in {name}, expected none")


def _strings(tree: object) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for child in children:
        yield from _strings(child)


def _is_local(value: str) -> bool:
    """A path on somebody's machine: absolute and of some depth, or relative in so many words."""
    relative = value.startswith(("~/", "./", "../"))
    absolute = re.match(r"(/|[A-Za-z]:\\)[^\s/\\]+[/\\][^\s/\\]", value)
    return bool(relative or absolute)
