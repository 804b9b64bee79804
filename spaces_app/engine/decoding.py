"""Several answers, one pass: each has its own keys and values, and all take their next token
together, so that the weights are read once for all of them.

On a CPU a token of one answer and a token of eight take about the same time, for it is the reading
of the weights that takes it. Nothing is padded: only attention, which reads no weights, is computed
answer by answer, so what an answer becomes does not depend on which others are beside it.

Shapes: B answers, H heads, L positions, D head width.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ROOM = 256  # positions by which keys and values grow
SUFFIX = "_side_by_side"


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer in room that is larger than they are: `DynamicLayer` copies all of
    them for every token.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (B, H, L, D); returns all there is."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.key_room = key_states[..., :0, :]
            self.value_room = value_states[..., :0, :]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.key_room.shape[-2]:
            self.key_room = _grown(self.key_room[..., :start, :], end)
            self.value_room = _grown(self.value_room[..., :start, :], end)
        self.key_room[..., start:end, :] = key_states
        self.value_room[..., start:end, :] = value_states
        self.keys, self.values = self.key_room[..., :end, :], self.value_room[..., :end, :]
        return self.keys, self.values

    def trim(self) -> int:
        """Lets go of the room that is free; returns the bytes that are taken."""
        self.keys = self.key_room = self.keys.clone()
        self.values = self.value_room = self.values.clone()
        return self.keys.nbytes + self.values.nbytes


def _grown(states: torch.Tensor, length: int) -> torch.Tensor:
    """States (B, H, L, D) at the start of room for `length` positions and some more."""
    room = -(-length // ROOM) * ROOM
    grown = states.new_empty(*states.shape[:-2], room, states.shape[-1])
    grown[..., : states.shape[-2], :] = states
    return grown


def new_cache() -> Cache:
    """An empty cache of one answer."""
    return Cache(layer_class_to_replicate=GrowingLayer)


class SideBySide:
    """Caches of several answers, for a pass in which each has one new position.

    A model takes it in place of a cache when it attends as `attend_side_by_side` lets it, and is
    given positions and a mask.
    """

    def __init__(self, caches: list[Cache]):
        self.caches = caches

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Appends row after row of (B, H, 1, D); returns (1, H, L, D) for each answer."""
        rows = zip(self.caches, key_states.split(1), value_states.split(1), strict=True)
        updated = [cache.update(key, value, layer_idx) for cache, key, value in rows]
        return [key for key, _ in updated], [value for _, value in updated]


def attend_side_by_side(model: PreTrainedModel) -> None:
    """Lets the language model take a `SideBySide` in place of a cache; else nothing is changed."""
    usual = model.model.language_model.config._attn_implementation
    if usual.endswith(SUFFIX):
        return
    name = usual + SUFFIX
    AttentionInterface.register(name, _row_by_row(ALL_ATTENTION_FUNCTIONS[usual]))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[usual])
    model.set_attn_implementation({"text_config": name})


def _row_by_row(attend: Callable) -> Callable:
    """`attend`, an attention function of transformers, also for keys and values in lists."""

    def attend_rows(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | list[torch.Tensor],
        value: torch.Tensor | list[torch.Tensor],
        attention_mask: torch.Tensor | None,
        sliding_window: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(key, torch.Tensor):
            kwargs["sliding_window"] = sliding_window
            return attend(module, query, key, value, attention_mask, **kwargs)
        near = slice(-sliding_window if sliding_window else None, None)
        rows = [
            attend(module, q, k[..., near, :], v[..., near, :], None, **kwargs)[0]
            for q, k, v in zip(query.split(1), key, value, strict=True)
        ]
        return torch.cat(rows), None

    return attend_rows
