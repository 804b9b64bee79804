"""The keys and values of each conversation so far, so that its next turn computes only what is new.

What is kept is used again as far as the next prompt is the same, token by token and medium by
medium. A template may write an answer otherwise than the model did; then the part before it is
what is shared.
"""

from collections.abc import Hashable
from dataclasses import dataclass

from transformers import Cache, PreTrainedConfig

from .decoding import new_cache
from .prompt import Prompt
from .store import BoundedStore


def bytes_per_token(config: PreTrainedConfig, number: int) -> int:
    """What keys and values of one position take.

    Args:
        config: of the artefact.
        number: bytes of one number of them.
    """
    text = config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * width * number


@dataclass
class Prefix:
    """What was computed for a conversation: one key for each position of the cache."""

    keys: list[Hashable]
    regime: Hashable
    cache: Cache


class PrefixStore:
    """Prefixes by conversation, within a budget of bytes."""

    def __init__(self, config: PreTrainedConfig, budget: int):
        self.config = config
        self.kept: BoundedStore[Prefix] = BoundedStore(budget)

    def take(self, conversation: str, prompt: Prompt) -> tuple[Cache, int]:
        """A cache to go on with, and how many positions of the prompt are in it.

        It is no longer in the store: generating changes it.
        """
        prefix = self.kept.pop(conversation)
        if prefix is None or prefix.regime != self._regime(prompt):
            return new_cache(), 0
        shared = common_prefix(prefix.keys, prompt.keys)
        if shared == 0:
            return new_cache(), 0
        prefix.cache.crop(shared - prefix.cache.get_seq_length())
        return prefix.cache, shared

    def keep(self, conversation: str, prompt: Prompt, new: list[int], cache: Cache) -> None:
        """Keeps what was computed for a prompt and the tokens generated after it."""
        keys = [*prompt.keys, *new][: cache.get_seq_length()]
        size = sum(layer.trim() for layer in cache.layers)
        self.kept.put(conversation, Prefix(keys, self._regime(prompt), cache), size)

    def _regime(self, prompt: Prompt) -> Hashable:
        """What else keys and values depend on: LoRA by modality is switched on for the whole
        prompt by what stands in it, and long RoPE turns all positions otherwise beyond a length.
        """
        adapters = frozenset(getattr(self.config, "modality_adapters", None) or ())
        return adapters & prompt.modalities, self.is_long(len(prompt.keys))

    def is_long(self, positions: int) -> bool:
        """Whether a pass that reaches so many positions turns all of its own the long way."""
        rope = self.config.text_config.rope_parameters
        if rope["rope_type"] != "longrope":
            return False
        return positions > rope["original_max_position_embeddings"]


def common_prefix(old: list[Hashable], new: list[Hashable]) -> int:
    """Positions that two prompts share from the start: never all of the new one, whose last
    position is needed to go on, and never a part of a medium.
    """
    shared = next(
        (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
        min(len(old), len(new)),
    )
    shared = min(shared, len(new) - 1)
    while shared and isinstance(new[shared], tuple) and new[shared][1] > 0:
        shared -= 1
    return shared
