"""The memory of one training process and the work of one step, predicted from a recipe."""

from collections import Counter
from dataclasses import astuple, dataclass

import torch
from transformers import TrainingArguments

from phi_mm.estimate.skeleton import build_skeleton, four_bit, read_config
from phi_mm.estimate.step import Row, Stage, Step
from phi_mm.recipes import Recipe

# Bytes of optimiser state for each weight that learns. 8-bit states have a scale for every 256.
EIGHT_BIT = 1 + 4 / 256
OPTIMISERS = {
    "sgd": 0,
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "paged_adamw_32bit": 8,
    "adamw_8bit": 2 * EIGHT_BIT,
    "adamw_bnb_8bit": 2 * EIGHT_BIT,
    "paged_adamw_8bit": 2 * EIGHT_BIT,
    "lion_32bit": 4,
    "paged_lion_32bit": 4,
    "lion_8bit": EIGHT_BIT,
    "paged_lion_8bit": EIGHT_BIT,
}
# Bytes of a 4-bit weight: a scale for every 64, in float32 or in 8 bits with scales of their own.
FOUR_BIT = 1 / 2 + 4 / 64
FOUR_BIT_TWICE = 1 / 2 + 1 / 64 + 4 / (64 * 256)
SHALLOW = (2, 3)  # layers of the language model that a step is taken with


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process at the fullest moment of a step.

    Args:
        weights: by how they are stored: 4-bit, bfloat16, float32, LoRA, ...
        optimiser: states of the optimiser.
        exchange: copies of the gradients in the buckets of DistributedDataParallel.
        scratch: the largest 4-bit matrix, unpacked to be multiplied.
        step: activations, logits and gradients, and the work of the step.
    """

    weights: dict[str, float]
    optimiser: float
    exchange: float
    scratch: float
    step: Step

    @property
    def fixed(self) -> float:
        """What does not depend on the batch."""
        return sum(self.weights.values()) + self.optimiser + self.exchange + self.scratch

    @property
    def total(self) -> float:
        """All of it."""
        return self.fixed + self.step.bytes


class Rehearsal:
    """Training steps of a recipe on tensors without values.

    All layers of the language model are alike, so a step is taken with two of them and with three,
    and what the third adds stands for each of the others.

    Args:
        recipe: whose parts' configs are read, and none of their weights.
        checkpointing: activation checkpointing; None for the recipe's own choice.
        processes: how many train together, each with the whole model.

    Raises:
        ValueError: a config that cannot be read, or an optimiser whose states are not known here.
    """

    def __init__(self, recipe: Recipe, checkpointing: bool | None = None, processes: int = 1):
        self.recipe, self.processes = recipe.pinned(), processes
        self.optimiser = recipe.training.get("optim", TrainingArguments.optim)
        if self.optimiser not in OPTIMISERS:
            raise ValueError(
                f"got training.optim={self.optimiser}, expected one of {', '.join(OPTIMISERS)}: "
                "how large the states of others are is not known here"
            )
        own = bool(recipe.training.get("activation_checkpointing"))
        self.checkpointing = own if checkpointing is None else checkpointing
        self.config = read_config(recipe.model)
        self._whole = build_skeleton(self.recipe, self.config)
        self._layers = self.config.text_config.num_hidden_layers
        self._depths = [depth for depth in SHALLOW if depth < self._layers] or [self._layers]
        self._taken: dict[tuple[int, Row], Estimate] = {}
        self._stages = [
            Stage(self.recipe, self.config, d, self.checkpointing) for d in self._depths
        ]

    def take(self, size: int, row: Row) -> Estimate:
        """One step of `size` rows that are all like `row`."""
        if (size, row) not in self._taken:
            self._taken[size, row] = self._estimate(size, row)
        return self._taken[size, row]

    def _estimate(self, size: int, row: Row) -> Estimate:
        learning = [p for p in self._whole.parameters() if p.requires_grad]
        packed = four_bit(self._whole, self.recipe)
        compute = self.recipe.dtype.itemsize
        return Estimate(
            weights=self._weights(packed),
            optimiser=OPTIMISERS[self.optimiser] * sum(p.numel() for p in learning),
            exchange=sum(p.nbytes for p in learning) if self.processes > 1 else 0,
            scratch=max((p.numel() * compute for p in packed.values()), default=0),
            step=self._step(size, row),
        )

    def _step(self, size: int, row: Row) -> Step:
        first, *second = [stage.take(size, row) for stage in self._stages]
        if not second:
            return first
        more = self._layers - self._depths[0]
        grown = zip(astuple(first), astuple(second[0]), strict=True)
        return Step(*(low + (high - low) * more for low, high in grown))

    def _weights(self, packed: dict[str, torch.nn.Parameter]) -> dict[str, float]:
        twice = self.recipe.quantization.get("bnb_4bit_use_double_quant", False)
        sizes: Counter[str] = Counter()
        for name, parameter in self._whole.named_parameters():
            if name in packed:
                sizes["4-bit"] += parameter.numel() * (FOUR_BIT_TWICE if twice else FOUR_BIT)
            elif ".lora_" in name:
                sizes["LoRA"] += parameter.nbytes
            else:
                sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
        return dict(sizes)
