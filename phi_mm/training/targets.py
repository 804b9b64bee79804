"""Which tokens a batch teaches, and which conversation each of them belongs to."""

from collections.abc import Mapping

import torch
from torch import nn


def supervised_targets(inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The targets of a batch in the order of the model's logits, and the number of the conversation
    that each is of.

    Every conversation has targets; those that are packed together start at position 0.

    Args:
        inputs: what the collator gives, with `labels` (B, L).

    Returns:
        Two tensors (supervised positions,).
    """
    targets = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    supervised = targets != -100
    place = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
    if "position_ids" in inputs:
        place = (inputs["position_ids"] == 0).flatten().cumsum(0).view_as(targets)
    _, conversation = torch.unique_consecutive(place[supervised], return_inverse=True)
    return targets[supervised], conversation
