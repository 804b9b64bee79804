"""The repositories of the real bases: every weight in them is taken, and nothing else is expected.

pytest tests/training/test_published.py

Names and depths are the published ones; widths are cut down, which no name depends on.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published import CONFIGS, PARAMETERS, count, save_weights, shapes, write_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPModel,
    WhisperForConditionalGeneration,
)

from phi_mm.parts import load_audio, load_text, load_vision

NARROW = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
NO_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
CLASSES = {
    "phi": (AutoModelForCausalLM, load_text),
    "phi3": (AutoModelForCausalLM, load_text),
    "clip": (CLIPModel, load_vision),
    "whisper": (WhisperForConditionalGeneration, load_audio),
}


def narrow(name: str) -> dict[str, Any]:
    """A published config with its own depth, heads of two channels or so, and few words."""
    config = json.loads(json.dumps(CONFIGS[name]))
    if config["model_type"] == "clip":
        for tower in ("text_config", "vision_config"):
            heads = config[tower]["num_attention_heads"]
            config[tower] |= {"hidden_size": 4 * heads, "intermediate_size": 64}
        return config
    if config["model_type"] == "whisper":
        width = 4 * config["encoder_attention_heads"]
        sides = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        ids = NO_IDS | {"decoder_start_token_id": 3, "vocab_size": 512}
        return config | {"d_model": width} | sides | ids
    width = 8 * config["num_attention_heads"]
    config |= NARROW | {"hidden_size": width} | NO_IDS
    if config["rope_scaling"]:
        channels = int(8 * config.get("partial_rotary_factor", 1.0)) // 2
        for length in ("short_factor", "long_factor"):
            config["rope_scaling"][length] = [1.0] * channels
    return config


@pytest.fixture
def repository(tmp_path: Path):
    def make(name: str) -> Path:
        config = narrow(name)
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_weights(config, tmp_path)
        return tmp_path

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_as_many_weights_as_published(name: str, tmp_path: Path):
    """Ours by name and shape, and transformers' model of the published config."""
    assert count(CONFIGS[name]) == PARAMETERS[name]
    config = AutoConfig.from_pretrained(write_config(name, tmp_path / "config"))
    with torch.device("meta"):
        cls, _ = CLASSES[config.model_type]
        model = cls.from_config(config) if cls is AutoModelForCausalLM else cls(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_of_the_repository_is_taken(repository, name: str):
    folder = repository(name)
    stored = load_file(folder / "model.safetensors")
    load = CLASSES[CONFIGS[name]["model_type"]][1]
    part = load(str(folder), torch.float32)  # raises on a missing or unexpected name
    left_out = ("text_model.", "text_projection", "visual_projection", "logit_scale")
    kept = [v for k, v in stored.items() if not k.startswith(left_out) and v.is_floating_point()]
    taken = sum(parameter.numel() for parameter in part.parameters())
    assert taken == sum(value.numel() for value in kept)
    sums = sorted(value.double().sum().item() for value in kept)
    assert sums == sorted(p.double().sum().item() for p in part.parameters())


@pytest.mark.parametrize("name", ["phi-2", "phi-3.5-mini", "clip-l-336", "whisper-small"])
def test_a_weight_too_many_or_too_few_is_told(repository, name: str):
    folder = repository(name)
    weights = load_file(folder / "model.safetensors")
    load = CLASSES[CONFIGS[name]["model_type"]][1]
    lost = max(key for key in shapes(narrow(name)) if ".layers.1." in key and "text" not in key)
    weights[lost.replace(".layers.1.", ".layers.99.")] = weights.pop(lost)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of .* are missing: .*layers.1"):
        load(str(folder), torch.float32)
