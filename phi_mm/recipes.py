"""A training run written down: a YAML file plus `section.key=value` overrides, as typed arguments.

Sections `model`, `data`, `tune` and `evaluation` are small dataclasses of this project; `training`,
`lora` and `quantization` take the fields of the libraries' own classes. A key that nobody would
read is an error. Relative paths are relative to the current directory.
"""

import difflib
import inspect
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments

from phi_mm.files import write_whole

# What transformers' defaults get wrong for us; a recipe may still say otherwise.
TRAINING_DEFAULTS: dict[str, Any] = {
    "remove_unused_columns": False,  # the collator reads `messages`, which no forward() names
    "label_names": ["labels"],  # found by signature otherwise, which PEFT's wrapper hides
    "prediction_loss_only": True,  # validation logits are vocabulary-wide: they would fill memory
    "include_num_input_tokens_seen": "no",
    "ddp_find_unused_parameters": False,  # the model puts idle projectors into the graph itself
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # a NaN must be seen, not averaged away
    "save_total_limit": 2,
    "resume_from_checkpoint": "auto",  # a killed run goes on where its last whole checkpoint was
    "report_to": "none",
}


@strict
@dataclass(kw_only=True)
class ModelSection:
    """Which pretrained parts (local folders or Hub ids) are joined, and how."""

    text: str
    vision: str | None = None
    audio: str | None = None
    vision_feature_layer: int = -2
    image_pool: int = 1
    image_tokens_per_cell: int = 1
    projector_norm: bool = False
    projector_positions: bool = False
    projector_hidden_size: int | None = None
    projector_hidden_act: str = "gelu"
    audio_stack: int = 4
    audio_route: str = "encoder"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    init_from: str | None = None  # run folder of an earlier stage, whose projectors are taken


@strict
@dataclass(kw_only=True)
class DataSection:
    """Sources as `phi_mm.datasets.mixture` takes them; a bare path means {path: ...}."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]] = field(default_factory=list)
    max_length: int | None = None


@strict
@dataclass(kw_only=True)
class TuneSection:
    """What learns. Projectors always do, at their own rate when one is given."""

    language_model: Literal["frozen", "lora", "qlora", "full"]
    projector_learning_rate: float | None = None


@strict
@dataclass(kw_only=True)
class EvaluationTask:
    """One measurement of the trained run, carried out by phi_mm.evaluation."""

    task: str
    data: str
    metric: str
    control: str | None = None


@dataclass(kw_only=True)
class Recipe:
    """A whole run. `lora`, `quantization` and `training` stay the given fields until asked for."""

    model: ModelSection
    data: DataSection
    tune: TuneSection
    training: dict[str, Any]
    features: Literal["live", "cached"] = "live"
    features_dir: str | None = None
    adapters: Literal["shared", "by_modality"] = "shared"
    lora: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    evaluation: list[EvaluationTask] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        """The run folder: `training.output_dir`."""
        return Path(self.training["output_dir"])

    @property
    def features_folder(self) -> Path:
        """Where tower outputs are kept: `features_dir`, or inside the run folder."""
        return Path(self.features_dir) if self.features_dir else self.run_dir / "features"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which frozen weights are kept."""
        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[self.model.dtype]

    def training_arguments(self) -> TrainingArguments:
        """transformers' own arguments."""
        memory = {"dataloader_pin_memory": torch.cuda.is_available()}  # pinning helps only a GPU
        return TrainingArguments(**memory | self.training)

    def bitsandbytes_config(self) -> BitsAndBytesConfig:
        """The 4-bit settings of a `qlora` run (NF4 unless the recipe says otherwise)."""
        defaults = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        defaults["bnb_4bit_compute_dtype"] = self.model.dtype
        return BitsAndBytesConfig(**defaults | self.quantization)


def load_recipe(path: Path | str, overrides: list[str] = ()) -> Recipe:
    """Read `path`, apply `section.key=value` overrides and check every key and type.

    Raises:
        ValueError: an unknown key (naming the nearest), a wrong type, a missing section, an
            override that is not `dotted.key=value`, or a combination that cannot be meant.
    """
    tree = parse_yaml(Path(path).read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ValueError(f"got {path} holding {type(tree).__name__}, expected a YAML mapping")
    for override in overrides:
        _override(tree, override)
    recipe = _build(tree)
    _check_combination(recipe)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML that `load_recipe` reads back equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)
    write_whole(path, text)


class _Loader(yaml.SafeLoader):
    """SafeLoader by the rules of YAML 1.2 where those of 1.1 surprise.

    2e-4 is a number (1.1 wants 2.0e-4), and only true and false are truth values, so that
    `save_strategy: no` is the word.
    """

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^([Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF")
)


def parse_yaml(text: str) -> Any:
    """YAML as recipes and overrides are read."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)


def _override(tree: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value` to the raw tree, in place."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ValueError(f"got override {override!r}, expected section.key=value")
    *sections, key = dotted.lstrip("-").split(".")
    for section in sections:
        child = tree.get(section)
        if child is None:
            child = tree[section] = {}
        if not isinstance(child, dict):
            raise ValueError(f"got override {override!r}, but {section} is not a section")
        tree = child
    tree[key] = parse_yaml(text)


def _build(tree: dict[str, Any]) -> Recipe:
    """The raw tree as a Recipe, every key checked against its section."""
    _check_keys(tree, {f.name for f in fields(Recipe)}, "recipe")
    missing = [name for name in ("model", "data", "tune", "training") if not tree.get(name)]
    if missing:
        raise ValueError(f"the recipe lacks the section(s) {', '.join(missing)}")
    data = dict(tree["data"])
    for key in ("train", "validation"):
        if key in data:
            data[key] = _sources(data[key], f"data.{key}")
    features = _choice(tree, "features", "live", "cached")
    adapters = _choice(tree, "adapters", "shared", "by_modality")
    return Recipe(
        model=_section(ModelSection, tree["model"], "model"),
        data=_section(DataSection, data, "data"),
        tune=_section(TuneSection, tree["tune"], "tune"),
        training=TRAINING_DEFAULTS | _library(TrainingArguments, tree["training"], "training"),
        features=features,
        features_dir=tree.get("features_dir"),
        adapters=adapters,
        lora=_library(LoraConfig, tree.get("lora"), "lora"),
        quantization=_library(BitsAndBytesConfig, tree.get("quantization"), "quantization"),
        evaluation=[
            _section(EvaluationTask, task, f"evaluation[{i}]")
            for i, task in enumerate(tree.get("evaluation") or [])
        ],
    )


def _choice(tree: dict[str, Any], key: str, *allowed: str) -> str:
    """A top-level word, the first of those allowed where it is absent."""
    given = tree.get(key, allowed[0])
    if given not in allowed:
        raise ValueError(f"got {key}={given!r}, expected {' or '.join(allowed)}")
    return given


def _section(cls: type, given: Any, name: str) -> Any:
    """One of our strict dataclasses from a mapping."""
    if not isinstance(given, dict):
        raise ValueError(f"got {given!r} for {name}, expected a mapping of keys to values")
    _check_keys(given, {f.name for f in fields(cls)}, name)
    try:
        return cls(**_widened(cls, given))
    except (StrictDataclassError, TypeError) as error:
        raise ValueError(f"section {name}: {error}") from error


def _widened(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """`given` with whole numbers made floats where the class declares a float."""
    floats = {f.name for f in fields(cls) if f.type in (float, float | None)}
    return {k: float(v) if k in floats and type(v) is int else v for k, v in given.items()}


def _library(cls: type, given: Any, name: str) -> dict[str, Any]:
    """Keyword arguments of a library's class, refused when the class would not take them."""
    given = given or {}
    if not isinstance(given, dict):
        raise ValueError(f"got {given!r} for {name}, expected a mapping of keys to values")
    parameters = inspect.signature(cls.__init__).parameters
    _check_keys(given, set(parameters) - {"self", "kwargs"}, name)
    return dict(given)


def _sources(given: Any, name: str) -> list[dict[str, Any]]:
    """A path, a source or a list of either, as a list of sources."""
    listed = given if isinstance(given, list) else [given]
    for source in listed:
        if not isinstance(source, str | dict):
            raise ValueError(f"got {source!r} in {name}, expected a path or a mapping with `path`")
    sources = [{"path": source} if isinstance(source, str) else source for source in listed]
    if any("path" not in source for source in sources):
        raise ValueError(f"a source in {name} has no `path`: {sources}")
    return sources


def _check_keys(given: dict[str, Any], known: set[str], section: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {key!r} in section {section}; the nearest is {near!r}")


def _check_combination(recipe: Recipe) -> None:
    """Refuse settings that would be read by nobody, before anything is loaded."""
    if not recipe.training.get("output_dir"):
        raise ValueError("training.output_dir is missing: give the run folder")
    if recipe.model.vision is None and recipe.model.audio is None:
        raise ValueError("model.vision and model.audio are both missing: give at least one tower")
    mode = recipe.tune.language_model
    if recipe.quantization and mode != "qlora":
        raise ValueError(
            f"section quantization is given but tune.language_model is {mode}: "
            "add quantization=null"
        )
    if recipe.lora and mode not in ("lora", "qlora"):
        raise ValueError(f"section lora is given but tune.language_model is {mode}: add lora=null")
    if recipe.adapters == "by_modality" and mode not in ("lora", "qlora"):
        raise ValueError(
            f"adapters is by_modality but tune.language_model is {mode}: set lora or qlora, or "
            "adapters=shared"
        )
    for owned in ("target_modules", "modules_to_save"):
        if owned in recipe.lora:
            raise ValueError(f"lora.{owned} is chosen by the language model's type: remove it")
    if mode == "full" and recipe.model.dtype != "float32":
        raise ValueError(
            f"got model.dtype={recipe.model.dtype} to tune it in full, expected float32 "
            "(small steps are lost in half precision): set training.bf16 to compute in half"
        )
    if recipe.training.get("label_smoothing_factor"):
        raise ValueError("training.label_smoothing_factor: the Trainer would not shift the labels")
    _check_hub(recipe.training)
    if recipe.features_dir and recipe.features == "live":
        raise ValueError("features_dir is given but features is live: set features: cached")


def _check_hub(training: dict[str, Any]) -> None:
    given = [key for key in training if key.startswith("hub_") and training[key] is not None]
    if "hub_token" in given:
        raise ValueError(
            "training.hub_token would be written to recipe.yaml: run `hf auth login`, or set "
            "HF_TOKEN"
        )
    if not training.get("push_to_hub"):
        if given:
            raise ValueError(f"training.{given[0]} is given without push_to_hub: add it")
        return
    if not training.get("hub_model_id"):
        raise ValueError("training.push_to_hub is given without hub_model_id: name the repository")
    strategy = training.get("hub_strategy", "every_save")
    if strategy not in ("end", "every_save"):
        raise ValueError(
            f"got training.hub_strategy={strategy}, expected end or every_save: whole checkpoints "
            "hold optimizer state, which is nothing to publish"
        )
