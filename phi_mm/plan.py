"""What learns in a run: the fate of every module, and its rate. The `tune` section of a recipe."""

import difflib
from dataclasses import dataclass, field
from typing import Literal

from huggingface_hub.dataclasses import strict

TOWERS = ("vision_tower", "audio_tower")
PROJECTORS = ("multi_modal_projector", "audio_projector")
MODULES = ("language_model", *TOWERS, *PROJECTORS)
ADAPTED = ("lora", "qlora")
Fate = Literal["frozen", "full", "lora", "qlora"]


@strict
@dataclass(kw_only=True)
class TuneSection:
    """What becomes of each module, the rates of those that do not learn at
    `training.learning_rate` (LLaVA's `mm_projector_lr`, for every module), and the length of a
    gradient, before clipping, from which nothing is to be learnt.
    """

    language_model: Fate
    vision_tower: Fate = "frozen"
    audio_tower: Fate = "frozen"
    multi_modal_projector: Fate = "full"
    audio_projector: Fate = "full"
    learning_rates: dict[str, float] = field(default_factory=dict)
    gradient_norm_limit: float | None = None

    def fate(self, module: str) -> Fate:
        """Of one of MODULES."""
        return vars(self)[module]

    def modules(self, *fates: Fate) -> list[str]:
        """The modules that have one of these fates, also those that the model may not have."""
        return [module for module in MODULES if self.fate(module) in fates]

    @property
    def adapted(self) -> bool:
        """Whether some module has LoRA."""
        return bool(self.modules(*ADAPTED))


@dataclass(frozen=True)
class Surroundings:
    """What else in a recipe decides whether a plan can be meant."""

    modules: tuple[str, ...]  # those that the model has and that its forward pass uses
    cached: bool  # tower outputs are read from disk
    aligned: bool  # projectors come from an earlier run
    by_modality: bool  # adapters are kept apart


def check_plan(tune: TuneSection, run: Surroundings) -> None:
    """Refuses a plan that makes no sense, or whose result could not be saved whole.

    Raises:
        ValueError: naming the line to change.
    """
    for projector in PROJECTORS:
        _check_projector(projector, tune.fate(projector), run)
    for tower in TOWERS:
        _check_tower(tower, tune.fate(tower), run)
    adapted_towers = [tower for tower in TOWERS if tune.fate(tower) == "lora"]
    if adapted_towers and tune.language_model == "full":
        raise ValueError(
            f"tune.{adapted_towers[0]} is lora beside a language model that is tuned in full, and "
            f"whose checkpoint holds no adapter: set tune.{adapted_towers[0]}=full"
        )
    if run.by_modality and tune.language_model not in ADAPTED:
        raise ValueError(
            f"adapters is by_modality but tune.language_model is {tune.language_model}: set lora "
            "or qlora, or adapters=shared"
        )
    if run.by_modality and adapted_towers:
        raise ValueError(
            f"adapters is by_modality but tune.{adapted_towers[0]} is lora: the two adapters are "
            f"the language model's; set tune.{adapted_towers[0]}=full, or adapters=shared"
        )
    learning = [m for m in run.modules if tune.fate(m) != "frozen"]
    if not learning:
        raise ValueError(
            f"nothing would learn: {', '.join(run.modules)} are all of this model and frozen by "
            "`tune`"
        )
    _check_rates(tune.learning_rates, learning)
    if tune.gradient_norm_limit is not None and not tune.gradient_norm_limit > 0:
        raise ValueError(
            f"got tune.gradient_norm_limit={tune.gradient_norm_limit}, expected more than 0, or "
            "null for any finite gradient"
        )


def _check_projector(projector: str, fate: Fate, run: Surroundings) -> None:
    if fate in ADAPTED:
        raise ValueError(
            f"tune.{projector} is {fate}: a projector is small and new, and there is nothing in it "
            "to adapt or to save memory on; set full or frozen"
        )
    if projector in run.modules and fate == "frozen" and not run.aligned:
        raise ValueError(
            f"tune.{projector} is frozen without model.init_from: it would stay as it was drawn; "
            "set full, or name the run that trained it"
        )


def _check_tower(tower: str, fate: Fate, run: Surroundings) -> None:
    if fate == "qlora":
        raise ValueError(
            f"tune.{tower} is qlora: only the language model may be in 4-bit, the towers are small "
            "beside it; set lora"
        )
    if fate != "frozen" and tower not in run.modules:
        raise ValueError(
            f"tune.{tower} is {fate}, but no gradient would reach it: the model has none, or uses "
            "it for transcripts alone; set frozen"
        )
    if fate != "frozen" and run.cached:
        raise ValueError(
            f"tune.{tower} is {fate}, but features is cached: what a tower said before it learnt "
            "would be read for ever; set features=live"
        )


def _check_rates(rates: dict[str, float], learning: list[str]) -> None:
    for module, rate in rates.items():
        if module not in MODULES:
            near = difflib.get_close_matches(module, MODULES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown module {module!r} in tune.learning_rates; the nearest is {near!r}"
            )
        if module not in learning:
            raise ValueError(
                f"tune.learning_rates.{module} is given, but that module does not learn: remove it"
            )
        if not rate > 0:
            raise ValueError(
                f"got tune.learning_rates.{module}={rate}, expected more than 0: set "
                f"tune.{module}=frozen for a module that is not to learn"
            )
