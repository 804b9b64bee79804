"""A training run written down: a YAML file plus `section.key=value` overrides, as typed arguments.

Sections `model`, `data`, `tune` and `evaluation` are small dataclasses of this project; `training`,
`lora` and `quantization` take the fields of the libraries' own classes. A key that nobody would
read is an error. Relative paths are relative to the current directory.
"""

import difflib
import inspect
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments

from phi_mm.arguments import HALF, TRAINING_DEFAULTS, check_arguments
from phi_mm.datasets.augmentation import AugmentationSection
from phi_mm.datasets.mixture import check_source
from phi_mm.files import write_whole
from phi_mm.plan import Surroundings, TuneSection, check_plan
from phi_mm.precision import automatic_dtype


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
    audio_padded: bool = True
    transcript_language: str | None = None  # of the recordings, where Whisper need not detect it
    transcript_task: Literal["transcribe", "translate"] | None = None  # translate: into English
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of frozen weights
    init_from: str | list[str] | None = None  # run folders of earlier stages: their projectors


@strict
@dataclass(kw_only=True)
class DataSection:
    """Sources as `phi_mm.datasets.mixture` takes them; a bare path means {path: ...}.

    `on_bad_row` of a source is error, or skip with `skip_at_most`, a count or a share.
    """

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]] = field(default_factory=list)
    max_length: int | None = None
    packed_length: int | None = None  # tokens of a row that several conversations share
    group_by_modality: bool = False  # batches of like length that are also of one kind
    augmentation: AugmentationSection | None = None  # of recordings, in training alone


@strict
@dataclass(kw_only=True)
class DistillationSection:
    """How much of what the text model says to the words of a recording is learnt from it."""

    temperature: float = 2.0
    weight: float = 1.0


COLUMNS = {"id", "question", "answer", "image", "audio", "kind", "transcript"}


@strict
@dataclass(kw_only=True)
class EvaluationTask:
    """One measurement of the trained run, carried out by phi_mm.evaluation.

    Attributes:
        data: rows as training takes them; with `columns`, JSON lines or a list of another form.
        columns: what of `COLUMNS` stands in which of the file's own columns.
        media: folder of the files that such rows name.
        prompt: what is asked, around `{question}`.
    """

    task: str
    data: str
    metric: str
    control: str | None = None
    columns: dict[str, str] | None = None
    media: str | None = None
    prompt: str = "{question}"

    def validate_columns(self) -> None:
        """Raises ValueError for columns that nobody reads, or too few of them."""
        given = self.columns
        if given is None:
            if self.media is not None or self.prompt != "{question}":
                raise ValueError("got media or prompt without columns, expected columns beside")
            return
        if unknown := sorted(given.keys() - COLUMNS):
            raise ValueError(f"got columns {unknown}, expected of {sorted(COLUMNS)}")
        if "answer" not in given or not given.keys() & {"question", "audio"}:
            raise ValueError(f"got columns {given}, expected answer, and question or audio")
        if "{question}" not in self.prompt:
            raise ValueError(f"got prompt={self.prompt!r}, expected {{question}} in it")


@dataclass(kw_only=True)
class Recipe:
    """A whole run. `lora`, `quantization` and `training` stay the given fields until asked for."""

    model: ModelSection
    data: DataSection
    tune: TuneSection
    training: dict[str, Any]
    features: Literal["live", "cached"] = "live"
    features_dir: str | None = None
    features_dtype: Literal["tower", "float16", "int8"] = "tower"
    adapters: Literal["shared", "by_modality"] = "shared"
    lora: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    distillation: DistillationSection | None = None
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
    def modules(self) -> tuple[str, ...]:
        """The modules that a forward pass of this model uses."""
        modules = ["language_model"]
        if self.model.vision is not None:
            modules += ["vision_tower", "multi_modal_projector"]
        if self.model.audio is not None and self.model.audio_route == "encoder":
            modules.append("audio_tower")  # elsewhere it writes transcripts, without a gradient
        if self.model.audio is not None and self.model.audio_route != "transcript":
            modules.append("audio_projector")
        return tuple(modules)

    @property
    def aligned_runs(self) -> list[Path]:
        """The run folders that `model.init_from` names."""
        named = self.model.init_from or []
        return [Path(run) for run in ([named] if isinstance(named, str) else named)]

    @property
    def on_cpu(self) -> bool:
        """Whether the run stays on the CPU, whatever the machine has."""
        return bool(self.training.get("use_cpu"))

    def pinned(self) -> "Recipe":
        """This recipe with `model.dtype: auto` replaced by what the hardware chooses.

        The arithmetic (`training.bf16`, `training.fp16`) is chosen with it where the recipe names
        neither. A language model that is tuned in full keeps float32 weights.
        """
        if self.model.dtype != "auto":
            return self
        chosen = automatic_dtype(self.model.text, self.on_cpu)
        stored = "float32" if self.tune.language_model == "full" else chosen
        named = "bf16" in self.training or "fp16" in self.training
        arithmetic = {} if named else HALF.get(chosen, {})
        model = replace(self.model, dtype=stored)
        return replace(self, model=model, training=self.training | arithmetic)

    @property
    def streams(self) -> bool:
        """Whether training rows are read from a source as training goes on."""
        return any(source.get("streaming") for source in self.data.train)

    @property
    def data_seed(self) -> int:
        """Of what is drawn from the data, and of its order."""
        given = self.training.get("data_seed")
        return self.training.get("seed", TrainingArguments.seed) if given is None else given

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which frozen weights are kept."""
        return getattr(torch, self.pinned().model.dtype)

    @property
    def computes(self) -> str:
        """The dtype of the arithmetic."""
        pinned = self.pinned()
        halves = [name for name, keys in HALF.items() if keys.items() <= pinned.training.items()]
        return halves[0] if halves else pinned.model.dtype

    def training_arguments(self) -> TrainingArguments:
        """transformers' own arguments."""
        memory = {"dataloader_pin_memory": torch.cuda.is_available()}  # pinning helps only a GPU
        if self.streams:  # else one process reads, and cuts media tensors as if one were a row
            memory["accelerator_config"] = {"dispatch_batches": False}
        return TrainingArguments(**memory | self.pinned().training)

    def bitsandbytes_config(self) -> BitsAndBytesConfig:
        """The 4-bit settings of a `qlora` run (NF4 unless the recipe says otherwise)."""
        defaults = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        defaults["bnb_4bit_compute_dtype"] = self.pinned().model.dtype
        return BitsAndBytesConfig(**defaults | self.quantization)


def load_recipe(path: Path | str, overrides: list[str] = ()) -> Recipe:
    """Read `path`, apply `section.key=value` overrides and check every key and type.

    Raises:
        ValueError: an unknown key (naming the nearest), a wrong type, a missing section, an
            override that is not `dotted.key=value`, or a combination that cannot be meant.
    """
    tree = _read(Path(path))
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


def _read(path: Path) -> dict[str, Any]:
    """The raw tree of a file, on top of that of its `base` (a path from its own folder)."""
    tree = parse_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ValueError(f"got {path} holding {type(tree).__name__}, expected a YAML mapping")
    base = tree.pop("base", None)
    return tree if base is None else _merged(_read(path.parent / base), tree)


def _merged(base: Any, own: Any) -> Any:
    """`own` where it speaks, `base` elsewhere. Mappings are merged by key, all else replaced."""
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return own
    return base | {key: _merged(base.get(key), value) for key, value in own.items()}


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
    if data.get("augmentation") is not None:
        data["augmentation"] = _section(
            AugmentationSection, data["augmentation"], "data.augmentation"
        )
    features = _choice(tree, "features", "live", "cached")
    adapters = _choice(tree, "adapters", "shared", "by_modality")
    return Recipe(
        model=_section(ModelSection, tree["model"], "model"),
        data=_section(DataSection, data, "data"),
        tune=_section(TuneSection, tree["tune"], "tune"),
        training=TRAINING_DEFAULTS | _library(TrainingArguments, tree["training"], "training"),
        features=features,
        features_dir=tree.get("features_dir"),
        features_dtype=_choice(tree, "features_dtype", "tower", "float16", "int8"),
        adapters=adapters,
        lora=_library(LoraConfig, tree.get("lora"), "lora"),
        quantization=_library(BitsAndBytesConfig, tree.get("quantization"), "quantization"),
        distillation=_optional(DistillationSection, tree, "distillation"),
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


def _optional(cls: type, tree: dict[str, Any], name: str) -> Any:
    """A section that may be absent."""
    return None if tree.get(name) is None else _section(cls, tree[name], name)


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
    for source in sources:
        check_source(source)
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
    surroundings = Surroundings(
        modules=recipe.modules,
        cached=recipe.features == "cached",
        aligned=bool(recipe.aligned_runs),
        by_modality=recipe.adapters == "by_modality",
    )
    check_plan(recipe.tune, surroundings)
    mode = recipe.tune.language_model
    if recipe.quantization and mode != "qlora":
        raise ValueError(
            f"section quantization is given but tune.language_model is {mode}: "
            "add quantization=null"
        )
    if recipe.lora and not recipe.tune.adapted:
        raise ValueError("section lora is given but nothing in `tune` is lora: add lora=null")
    for owned in ("target_modules", "modules_to_save"):
        if owned in recipe.lora:
            raise ValueError(f"lora.{owned} follows from `tune` and the model's type: remove it")
    if mode == "full" and recipe.model.dtype not in ("auto", "float32"):
        raise ValueError(
            f"got model.dtype={recipe.model.dtype} to tune it in full, expected float32 "
            "(small steps are lost in half precision): set training.bf16 to compute in half"
        )
    check_arguments(recipe.training)
    _check_streams(recipe)
    _check_batches(recipe.data, recipe.training.get("train_sampling_strategy", "random"))
    if recipe.distillation is not None:
        _check_distillation(recipe)
    if recipe.model.audio is not None and recipe.features == "live":
        _check_live_route(recipe.model.audio_route)
    if recipe.data.augmentation is not None:
        _check_augmentation(recipe)
    spec = recipe.model
    if (spec.transcript_language or spec.transcript_task) and spec.audio_route == "encoder":
        raise ValueError(
            "model.transcript_language or model.transcript_task is given, but model.audio_route is "
            "encoder, which writes nothing down: leave them out, or take another route"
        )
    if recipe.features_dir and recipe.features == "live":
        raise ValueError("features_dir is given but features is live: set features: cached")
    if recipe.features_dtype != "tower" and recipe.features == "live":
        raise ValueError("features_dtype is given but features is live: set features: cached")


def _check_live_route(route: str) -> None:
    if route != "encoder":
        raise ValueError(
            f"got features: live with model.audio_route={route}, with which Whisper would write "
            "every recording down at every step: set features: cached, where it does so once"
        )


def _check_augmentation(recipe: Recipe) -> None:
    if recipe.features == "cached":
        raise ValueError(
            "data.augmentation is given but features is cached: they are computed once, from the "
            "recordings as they are; set features: live, or remove the section"
        )
    if recipe.model.audio is None:
        raise ValueError(
            "data.augmentation is given but the model hears nothing: give model.audio, or remove "
            "the section"
        )


def _check_batches(data: DataSection, strategy: str) -> None:
    if data.packed_length is not None and strategy != "random":
        raise ValueError(
            f"got training.train_sampling_strategy={strategy} and data.packed_length, which makes "
            "batches of its own: remove one of them"
        )
    if data.packed_length is not None and (
        data.max_length is None or data.max_length > data.packed_length
    ):
        raise ValueError(
            f"got data.max_length={data.max_length} and data.packed_length={data.packed_length}, "
            "expected a conversation to fit the row that it shares: set data.max_length to as much "
            "or less"
        )
    if data.group_by_modality and strategy != "group_by_length":
        raise ValueError(
            f"got data.group_by_modality and training.train_sampling_strategy={strategy}, expected "
            "group_by_length, whose batches it makes of one kind: set it, and no data.packed_length"
        )


def _check_streams(recipe: Recipe) -> None:
    if any(source.get("streaming") for source in recipe.data.validation):
        raise ValueError("got streaming in data.validation, expected it in data.train alone")
    if not recipe.streams:
        return
    if recipe.training.get("max_steps", -1) < 1:
        raise ValueError(
            "got streaming in data.train without training.max_steps, expected it: a stream has no "
            "length"
        )
    for key, needs_all in (
        ("features: cached", recipe.features == "cached"),
        ("data.packed_length", recipe.data.packed_length is not None),
        ("distillation", recipe.distillation is not None),
        (
            "training.train_sampling_strategy",
            recipe.training.get("train_sampling_strategy", "random") != "random",
        ),
    ):
        if needs_all:
            raise ValueError(f"got streaming with {key}, which needs all rows: leave it out")


def _check_distillation(recipe: Recipe) -> None:
    if recipe.tune.language_model == "full":
        raise ValueError(
            "distillation is given but tune.language_model is full: nothing is left of the text "
            "model that is to teach; set lora, or remove the section"
        )
    if "audio_tower" not in recipe.modules:
        raise ValueError(
            "distillation is given but no recording reaches the language model: give model.audio "
            "with audio_route=encoder, or remove the section"
        )
    for name, value in asdict(recipe.distillation).items():
        if not value > 0:
            raise ValueError(f"got distillation.{name}={value}, expected more than 0")
