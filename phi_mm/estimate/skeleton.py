"""The model of a recipe without its weights: what the parts' configs alone tell of it."""

import copy

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    WhisperConfig,
)

from modeling_phi_mm import PhiMMConfig, PhiMMForConditionalGeneration
from phi_mm.assembly import adapt, join_configs, keep_learning_in_float32
from phi_mm.recipes import ModelSection, Recipe

PLACEHOLDERS = [0, 1]  # any two ids: only their number matters to memory


def read_config(spec: ModelSection) -> PhiMMConfig:
    """The configuration that `assemble` would give, but for the ids of the placeholders.

    Raises:
        ValueError: a part's config cannot be read.
    """
    text = _read(AutoConfig, spec.text, "text")
    vision = _read(CLIPVisionConfig, spec.vision, "vision") if spec.vision else None
    audio = _read(WhisperConfig, spec.audio, "audio") if spec.audio else None
    return join_configs(spec, text, vision, audio, PLACEHOLDERS)


def build_skeleton(
    recipe: Recipe, config: PhiMMConfig, layers: int | None = None
) -> PreTrainedModel | PeftModel:
    """The assembled model on the meta device, with so many layers of the language model, or all.

    What would be in 4-bit has the recipe's dtype here; `four_bit` names it.
    """
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
    with torch.device("meta"):
        model = PhiMMForConditionalGeneration._from_config(config, dtype=recipe.dtype)
        keep_learning_in_float32(model, recipe.tune)
        return adapt(model, recipe)


def four_bit(model: nn.Module, recipe: Recipe) -> dict[str, nn.Parameter]:
    """The weights that bitsandbytes quantises, by name."""
    if recipe.tune.language_model != "qlora":
        return {}
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "language_model." in name and ".lora_" not in name
    }


def _read(config_class: type, name: str, part: str) -> PreTrainedConfig:
    try:
        return config_class.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"cannot read the config of model.{part}={name}: it is no folder with a config.json, "
            "and the Hub did not give it. With a network it is downloaded (a few kB); without one "
            f"give a folder that holds it: model.{part}=FOLDER"
        ) from error
