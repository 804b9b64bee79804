"""One model in conversation: what the tests of generation ask it, and how."""

import copy
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, BatchFeature, PreTrainedModel

from processing import PhiMMProcessor

TOKENS = 6
MEDIA = ("pixel_values", "input_features", "input_features_mask")


@dataclass(frozen=True)
class Talk:
    """A model, one prompt with media, and a left-padded batch of three that begins with it."""

    model: PreTrainedModel
    processor: PhiMMProcessor
    one: BatchFeature
    three: BatchFeature

    def say(self, inputs: dict | None = None, **options) -> list[list[int]]:
        """New tokens of `generate`, greedy unless told otherwise; of the one prompt by default."""
        inputs = dict(self.one if inputs is None else inputs)
        settings = {"max_new_tokens": TOKENS, "do_sample": False} | options
        output = self.model.generate(**inputs, **settings)
        past = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        return output[:, past:].tolist()

    @property
    def media(self) -> dict[str, torch.Tensor]:
        return {key: self.one[key] for key in MEDIA if key in self.one}

    @property
    def text(self) -> dict[str, torch.Tensor]:
        return {key: value for key, value in self.one.items() if key not in MEDIA}

    def phi(self, layers: int, vocab_size: int | None = None) -> PreTrainedModel:
        """A random text-only Phi of the same family and vocabulary."""
        config = copy.deepcopy(self.model.config.text_config)
        config.num_hidden_layers = layers
        config.vocab_size = vocab_size or config.vocab_size
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config).eval()
