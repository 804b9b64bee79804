"""What trains, what is 4-bit and what is frozen in an assembled model: a table and a check."""

import re
from dataclasses import dataclass

from torch import nn

PARTS = (
    "vision_tower",
    "audio_tower",
    "multi_modal_projector",
    "audio_projector",
    "language_model",
    "lm_head",
)
_PART = re.compile(rf"(?:^|\.)({'|'.join(PARTS)})\.")


@dataclass(frozen=True)
class Row:
    """One line: parameters of one part that share storage and fate."""

    part: str
    parameters: int
    storage: str  # float32, bfloat16, ..., 4-bit
    trains: bool


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

    def check(self) -> None:
        """Refuse a run that is not what it says.

        Raises:
            ValueError: nothing learns, a tower would be adapted, or something besides the language
                model is in 4-bit.
        """
        if not self.trainable:
            raise ValueError("nothing would learn: this model has no projector and no LoRA")
        for row in self.rows:
            part = row.part.removesuffix(" (LoRA)")
            if part.endswith("tower") and (row.trains or row.part != part):
                raise ValueError(f"the frozen {part} would be adapted: got {row}, expected none")
            if row.storage == "4-bit" and part != "language_model":
                raise ValueError(f"{part} is in 4-bit: only the language model may be")

    def __str__(self) -> str:
        lines = [f"{'module':<24}{'parameters':>15}  {'storage':<10}{'fate'}"]
        for row in self.rows:
            fate = "trains" if row.trains else "frozen"
            lines.append(f"{row.part:<24}{row.parameters:>15,}  {row.storage:<10}{fate}")
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"{'total':<24}{self.total:>15,}")
        lines.append(f"{'trains':<24}{self.trainable:>15,}  ({share:.2f} %)")
        return "\n".join(lines)


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
        part = match[1] + (" (LoRA)" if ".lora_" in name else "")
        four_bit = type(parameter).__name__ == "Params4bit"
        size = parameter.quant_state.shape.numel() if four_bit else parameter.numel()
        storage = "4-bit" if four_bit else str(parameter.dtype).removeprefix("torch.")
        key = (part, storage, parameter.requires_grad)
        counts[key] = counts.get(key, 0) + size
    order = {part: i for i, part in enumerate(PARTS)}
    keys = sorted(counts, key=lambda key: (order[key[0].removesuffix(" (LoRA)")], key))
    return Summary(tuple(Row(part, counts[part, s, t], s, t) for part, s, t in keys))
