"""Stops a run whose gradient is not finite or too large, and names the rows that it came from."""

import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from phi_mm.training.checkpoints import last_checkpoint
from phi_mm.training.targets import supervised_targets

IDS = "ids"  # key of a batch, taken out before the model sees it
SHOWN = 8  # rows that are named


class NamingCollator:
    """A collator whose batches also say which rows they are made of."""

    def __init__(self, collator: Callable[[list[dict]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, samples: list[dict] | list[list[dict]]) -> dict[str, Any]:
        """The batch, with the rows' ids as a list of strings under `ids`, in reading order."""
        packed = not isinstance(samples[0], dict)
        rows = chain.from_iterable(samples) if packed else samples
        ids = [str(row.get("id", "a row without id")) for row in rows]
        return {**self.collator(samples), IDS: ids}


class GradientGuard:
    """Keeps the batches of one optimiser step until its gradient has been looked at.

    Args:
        limit: largest gradient norm, before clipping, that is learnt from; None for any finite one.
        run_dir: the run folder, whose last checkpoint is named.
    """

    def __init__(self, limit: float | None, run_dir: Path):
        self.limit, self.run_dir = limit, run_dir
        self.batches: list[tuple[list[str], dict[str, torch.Tensor]]] = []

    def keep(self, ids: list[str], inputs: dict[str, torch.Tensor]) -> None:
        """Remembers one batch of the step; the loop holds it until then anyway."""
        self.batches.append((ids, inputs))

    def check(self, norm: float, step: int, model: nn.Module, scaled: bool) -> None:
        """Looks at the gradient norm of a step before anything is learnt from it.

        Args:
            norm: over all processes.
            step: its number.
            model: of this process.
            scaled: float16, where the gradient scaler overflows now and then, skips such a step and
                scales down; only a loss that is itself not finite is an error then.

        Raises:
            ValueError: naming the step's rows, those of the largest loss first.
        """
        kept, self.batches = self.batches, []
        finite = math.isfinite(norm)
        if finite and (self.limit is None or norm <= self.limit):
            return
        own = [row for ids, inputs in kept for row in row_losses(model, ids, inputs)]
        rows = gather_object(own)
        if scaled and not finite and all(math.isfinite(loss) for _, loss in rows):
            return
        raise ValueError(self._complaint(norm, step, rows))

    def _complaint(self, norm: float, step: int, rows: list[tuple[str, float]]) -> str:
        rows.sort(key=lambda row: -row[1] if math.isfinite(row[1]) else -math.inf)
        named = [f"{name!r} (loss {loss:.4g})" for name, loss in rows[:SHOWN]]
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        last = last_checkpoint(self.run_dir)
        whole = f"{last} is whole" if last else "there is no checkpoint yet"
        expected = "a finite one" if self.limit is None else f"at most {self.limit:g}"
        return (
            f"got a gradient norm of {norm:.4g} in step {step}, expected {expected}; its rows, of "
            f"the largest loss first: {', '.join(named)}{more}. Nothing was learnt from them, and "
            f"{whole}: put these rows right or leave them out, or lower training.learning_rate, "
            "and start the same command again"
        )


@torch.no_grad()
def row_losses(
    model: nn.Module, ids: list[str], inputs: dict[str, torch.Tensor]
) -> list[tuple[str, float]]:
    """Each row of a batch with its mean loss, as the model judges it without dropout."""
    training = model.training
    logits = model.eval()(**inputs).logits  # of supervised positions
    model.train(training)
    targets, row_of = supervised_targets(inputs)
    losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return [(name, losses[row_of == row].mean().item()) for row, name in enumerate(ids)]
