"""What trains, what is 4-bit and what is frozen in an assembled model: a table and a check."""

import re
from dataclasses import dataclass

from torch import nn

from phi_mm.plan import ADAPTED, TuneSection
from phi_mm.recipes import Recipe

PARTS = (
    "vision_tower",
    "audio_tower",
    "multi_modal_projector",
    "audio_projector",
    "language_model",
    "lm_head",
)
LORA = " (LoRA)"
_PART = re.compile(rf"(?:^|\.)({'|'.join(PARTS)})\.")


@dataclass(frozen=True)
class Row:
    """One line: parameters of one part that share storage and fate."""

    part: str
    parameters: int
    storage: str  # float32, bfloat16, ..., 4-bit
    trains: bool

    @property
    def module(self) -> str:
        """The part, whether or not the row is its LoRA."""
        return self.part.removesuffix(LORA)

    @property
    def lora(self) -> bool:
        """Whether the row is LoRA of its part."""
        return self.part.endswith(LORA)


@dataclass(frozen=True)
class Summary:
    """All rows of a model; `str()` is the printed table."""

    rows: tuple[Row, ...]

    @property
    def total(self) -> int:
        """Parameters of the whole model; a 4-bit weight counts as the matrix it stands for."""
        return sum(row.parameters for row in self.rows)

    @property
    def trainable(self) -> int:
        """Parameters that receive gradients."""
        return sum(row.parameters for row in self.rows if row.trains)

    def check(self, tune: TuneSection) -> None:
        """Refuse a run that is not what its plan says.

        Raises:
            ValueError: nothing learns, something learns or is adapted that should not or does not
                that should, or something besides the language model is in 4-bit.
        """
        if not self.trainable:
            raise ValueError("nothing would learn: no weight of this model is open")
        for module in sorted({row.module for row in self.rows}):
            rows = [row for row in self.rows if row.module == module]
            fate = tune.fate("language_model" if module == "lm_head" else module)
            if module == "lm_head" and fate != "full":
                fate = "frozen"  # LoRA leaves it alone
            adapted, opened = (
                [row for row in rows if row.trains and row.lora == lora] for lora in (True, False)
            )
            if bool(adapted) != (fate in ADAPTED) or bool(opened) != (fate == "full"):
                raise ValueError(
                    f"got {module} with {_count(adapted)} weights of LoRA and {_count(opened)} of "
                    f"its own that learn, expected it {fate}"
                )
        for row in self.rows:
            if row.storage == "4-bit" and row.module != "language_model":
                raise ValueError(f"{row.part} is in 4-bit: only the language model may be")

    def __str__(self) -> str:
        lines = [f"{'module':<24}{'parameters':>15}  {'storage':<10}{'fate'}"]
        for row in self.rows:
            fate = "trains" if row.trains else "frozen"
            lines.append(f"{row.part:<24}{row.parameters:>15,}  {row.storage:<10}{fate}")
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"{'total':<24}{self.total:>15,}")
        lines.append(f"{'trains':<24}{self.trainable:>15,}  ({share:.2f} %)")
        return "\n".join(lines)


def describe_plan(recipe: Recipe) -> str:
    """The plan as a table: the fate of every module that the model has, and its rate."""
    tune, default = recipe.tune, recipe.training_arguments().learning_rate
    lines = [f"{'module':<24}{'plan':<8}{'rate':>9}"]
    for module in recipe.modules:
        fate = tune.fate(module)
        rate = f"{tune.learning_rates.get(module, default):9.1e}" if fate != "frozen" else ""
        lines.append(f"{module:<24}{fate:<8}{rate}".rstrip())
    return "\n".join(lines)


def _count(rows: list[Row]) -> str:
    return f"{sum(row.parameters for row in rows):,}"


def summarise(model: nn.Module) -> Summary:
    """Counts the parameters of `model` (bare or PEFT-wrapped) by part, storage and fate.

    PEFT's spare copy of each projector (`original_module`) is not part of the model and left out.

    Raises:
        ValueError: a parameter outside the known parts.
    """
    counts: dict[tuple[str, str, bool], int] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        match = _PART.search(name)
        if match is None:
            raise ValueError(f"got parameter {name}, expected it in one of {', '.join(PARTS)}")
        part = match[1] + (LORA if ".lora_" in name else "")
        four_bit = type(parameter).__name__ == "Params4bit"
        size = parameter.quant_state.shape.numel() if four_bit else parameter.numel()
        storage = "4-bit" if four_bit else str(parameter.dtype).removeprefix("torch.")
        key = (part, storage, parameter.requires_grad)
        counts[key] = counts.get(key, 0) + size
    order = {part: i for i, part in enumerate(PARTS)}
    keys = sorted(counts, key=lambda key: (order[key[0].removesuffix(LORA)], key))
    return Summary(tuple(Row(part, counts[part, s, t], s, t) for part, s, t in keys))
