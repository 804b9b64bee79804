"""Several conversations in one row of a batch, none of which attends to another.

transformers knows such rows by `position_ids` that start anew, and makes a mask of them, L x L for
every row. That mask is for `eager` and `flex_attention`; here are the ways that compute nothing
between conversations.

Shapes: B rows, L positions, M modalities, H heads, W width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    find_packed_sequence_indices,
    sdpa_mask,
    sliding_window_causal_mask_function,
)


def find_conversations(
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor | None,
    past_key_values: Cache | None,
) -> torch.LongTensor | None:
    """(B, L): which conversation of its row a token belongs to; None when no row holds several.

    With an attention mask or a cache a row is one conversation, as in transformers.
    """
    if position_ids is None or attention_mask is not None or past_key_values is not None:
        return None
    return find_packed_sequence_indices(position_ids)


def packed_arguments(conversations: torch.LongTensor, attention: str) -> dict[str, Any]:
    """What a language model must be told besides the `position_ids` of packed rows.

    Args:
        conversations: (B, L), of `find_conversations`.
        attention: name of the model's implementation.
    """
    # A model that makes itself a cache takes every row for one conversation.
    arguments: dict[str, Any] = {"use_cache": False}
    rows, length = conversations.shape
    numbers = conversations + length * torch.arange(rows, device=conversations.device).unsqueeze(1)
    _, lengths = torch.unique_consecutive(numbers.flatten(), return_counts=True)
    if "flash" in attention:
        # transformers itself looks for conversations in a batch of a single row only.
        ends = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        arguments |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        longest = int(lengths.max())
        arguments |= {"max_length_q": longest, "max_length_k": longest}
    elif "sdpa" in attention:
        # A mask of four axes is taken for made, so that no other is.
        arguments |= {"attention_mask": conversations.new_empty(0, 0, 0, 0)}
        arguments |= {"conversation_lengths": lengths.tolist()}
    return arguments


def by_conversation(attend: Callable) -> Callable:
    """`attend`, an attention function of transformers, on every conversation by itself.

    The work grows with the squares of the conversations' lengths, not with that of the row.
    """

    def split(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        conversation_lengths: list[int] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if conversation_lengths is None:
            return attend(module, query, key, value, attention_mask, **kwargs)
        rows, _, length, _ = query.shape
        # (B, H, L, W) to a piece (1, H, length, W) for every conversation
        pieces = zip(
            *(
                states.transpose(0, 1).flatten(1, 2).unsqueeze(0).split(conversation_lengths, 2)
                for states in (query, key, value)
            ),
            strict=True,
        )
        outputs = [
            attend(module, *piece, _window(piece[0], kwargs.get("sliding_window")), **kwargs)[0]
            for piece in pieces
        ]
        return torch.cat(outputs, 1).unflatten(1, (rows, length)).squeeze(0), None

    return split


def _window(query: torch.Tensor, sliding_window: int | None) -> torch.BoolTensor | None:
    """The mask of a conversation (1, H, L, W), None where that it is causal says all."""
    length = query.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    return sdpa_mask(
        batch_size=1,
        q_length=length,
        kv_length=length,
        mask_function=sliding_window_causal_mask_function(sliding_window),
        allow_is_causal_skip=False,
        device=query.device,
    )


def any_in_conversation(
    found: torch.BoolTensor, conversations: torch.LongTensor
) -> torch.BoolTensor:
    """(B, L, M): true at all tokens of a conversation (B, L) that is true somewhere in `found`."""
    index = conversations.unsqueeze(-1).expand_as(found)
    counts = torch.zeros_like(index).scatter_add(1, index, found.long())
    return counts.gather(1, index) > 0


__all__ = ["any_in_conversation", "by_conversation", "find_conversations", "packed_arguments"]
