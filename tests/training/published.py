"""The repositories of the real bases as published: configs, weights by name and shape.

Names and shapes are written out here from the repositories' own index files and listings, and not
taken from transformers, so that the two can be compared.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PHI = {
    "model_type": "phi",
    "architectures": ["PhiForCausalLM"],
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "qk_layernorm": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 51200,
}
PHI3 = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_hidden_layers": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "torch_dtype": "bfloat16",
}
CLIP_TOWER = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-05}
WHISPER = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "activation_function": "gelu",
    "bos_token_id": 50257,
    "decoder_start_token_id": 50258,
    "eos_token_id": 50257,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "num_mel_bins": 80,
    "pad_token_id": 50257,
    "vocab_size": 51865,
}


def _longrope(channels: int) -> dict[str, Any]:
    """The form of the published factors; their values change no shape."""
    return {"type": "longrope", "short_factor": [1.0] * channels, "long_factor": [2.0] * channels}


def _whisper(width: int, layers: int, heads: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {"d_model": width, "num_hidden_layers": layers}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": layers, f"{side}_attention_heads": heads}
        sizes[f"{side}_ffn_dim"] = 4 * width
    return WHISPER | sizes


def _clip(vision: dict[str, int], text: dict[str, int], projection: int) -> dict[str, Any]:
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": projection,
        "text_config": CLIP_TOWER | {"num_hidden_layers": 12, "projection_dim": projection} | text,
        "vision_config": CLIP_TOWER | {"projection_dim": projection} | vision,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "phi-2": PHI
    | {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "partial_rotary_factor": 0.4,
        "resid_pdrop": 0.1,
    },
    "phi-1.5": PHI
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "partial_rotary_factor": 0.5,
        "resid_pdrop": 0.0,
    },
    "phi-3.5-mini": PHI3
    | {
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rope_scaling": _longrope(48),
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    "phi-4-mini": PHI3
    | {
        "bos_token_id": 199999,
        "eos_token_id": 199999,
        "pad_token_id": 199999,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.75,
        "rope_scaling": _longrope(48),
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "clip-l-336": _clip(
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "image_size": 336,
            "patch_size": 14,
        },
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        projection=768,
    ),
    "clip-b-32": _clip(
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "image_size": 224,
            "patch_size": 32,
        },
        {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
        projection=512,
    ),
    "whisper-small": _whisper(768, 12, 12),
    "whisper-base": _whisper(512, 6, 8),
}
# Weights of each repository, from the sizes of its files on the Hub.
PARAMETERS = {
    "phi-2": 2_779_683_840,
    "phi-1.5": 1_418_270_720,
    "phi-3.5-mini": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "clip-l-336": 427_944_193,
    "clip-b-32": 151_277_313,
    "whisper-small": 241_734_912,
    "whisper-base": 72_593_920,
}


def write_config(name: str, folder: Path) -> Path:
    """config.json of a base, alone in `folder`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every floating-point weight of the repository of such a config, by its published name."""
    return {"phi": _phi, "phi3": _phi3, "clip": _whole_clip, "whisper": _whole_whisper}[
        config["model_type"]
    ](config)


def count(config: dict[str, Any]) -> int:
    """Weights altogether."""
    return sum(math.prod(shape) for shape in shapes(config).values())


def save_weights(config: dict[str, Any], folder: Path) -> None:
    """Random weights under the published names, and what else a file of that repository holds."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.02 * torch.randn(shape, generator=generator)
        for name, shape in shapes(config).items()
    }
    if config["model_type"] == "clip":  # saved by the transformers of its day
        for tower in ("text_model", "vision_model"):
            positions = len(weights[f"{tower}.embeddings.position_embedding.weight"])
            weights[f"{tower}.embeddings.position_ids"] = torch.arange(positions)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm(name: str, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (width,)} | ({f"{name}.bias": (width,)} if bias else {})


def _phi(config: dict[str, Any]) -> Shapes:
    width, inner, rows = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    out: Shapes = {"model.embed_tokens.weight": (rows, width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        out |= _norm(f"{layer}.input_layernorm", width)
        for name in ("q_proj", "k_proj", "v_proj", "dense"):
            out |= _linear(f"{layer}.self_attn.{name}", width, width)
        out |= _linear(f"{layer}.mlp.fc1", width, inner) | _linear(f"{layer}.mlp.fc2", inner, width)
    return out | _norm("model.final_layernorm", width) | _linear("lm_head", width, rows)


def _phi3(config: dict[str, Any]) -> Shapes:
    width, inner, rows = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    fused = width // heads * (heads + 2 * key_heads)
    out: Shapes = {"model.embed_tokens.weight": (rows, width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        out |= _norm(f"{layer}.input_layernorm", width, bias=False)
        out |= _norm(f"{layer}.post_attention_layernorm", width, bias=False)
        out |= _linear(f"{layer}.self_attn.qkv_proj", width, fused, bias=False)
        out |= _linear(f"{layer}.self_attn.o_proj", width, width, bias=False)
        out |= _linear(f"{layer}.mlp.gate_up_proj", width, 2 * inner, bias=False)
        out |= _linear(f"{layer}.mlp.down_proj", inner, width, bias=False)
    out |= _norm("model.norm", width, bias=False)
    tied = config["tie_word_embeddings"]
    return out if tied else out | _linear("lm_head", width, rows, bias=False)


def _whole_clip(config: dict[str, Any]) -> Shapes:
    vision, text = config["vision_config"], config["text_config"]
    width, patch = vision["hidden_size"], vision["patch_size"]
    positions = (vision["image_size"] // patch) ** 2 + 1
    out: Shapes = {
        "logit_scale": (),
        "text_model.embeddings.token_embedding.weight": (49408, text["hidden_size"]),
        "text_model.embeddings.position_embedding.weight": (77, text["hidden_size"]),
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": (positions, width),
    }
    out |= _norm("vision_model.pre_layrnorm", width) | _norm("vision_model.post_layernorm", width)
    out |= _norm("text_model.final_layer_norm", text["hidden_size"])
    for tower, sizes in (("vision_model", vision), ("text_model", text)):
        out |= _clip_layers(tower, sizes)
        name = tower.replace("vision_model", "visual").replace("text_model", "text")
        out |= _linear(f"{name}_projection", sizes["hidden_size"], config["projection_dim"], False)
    return out


def _clip_layers(tower: str, sizes: dict[str, int]) -> Shapes:
    width, inner, out = sizes["hidden_size"], sizes["intermediate_size"], {}
    for i in range(sizes["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        out |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            out |= _linear(f"{layer}.self_attn.{name}", width, width)
        out |= _linear(f"{layer}.mlp.fc1", width, inner) | _linear(f"{layer}.mlp.fc2", inner, width)
    return out


def _whole_whisper(config: dict[str, Any]) -> Shapes:
    width, mels = config["d_model"], config["num_mel_bins"]
    out: Shapes = {
        "model.encoder.conv1.weight": (width, mels, 3),
        "model.encoder.conv1.bias": (width,),
        "model.encoder.conv2.weight": (width, width, 3),
        "model.encoder.conv2.bias": (width,),
        "model.encoder.embed_positions.weight": (config["max_source_positions"], width),
        "model.decoder.embed_tokens.weight": (config["vocab_size"], width),
        "model.decoder.embed_positions.weight": (config["max_target_positions"], width),
    }
    for side in ("encoder", "decoder"):
        out |= _norm(f"model.{side}.layer_norm", width)
        attentions = ("self_attn", "encoder_attn")[: 1 + (side == "decoder")]
        inner = config[f"{side}_ffn_dim"]
        for i in range(config[f"{side}_layers"]):
            layer = f"model.{side}.layers.{i}"
            for attention in attentions:
                out |= _norm(f"{layer}.{attention}_layer_norm", width)
                for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    bias = name != "k_proj"
                    out |= _linear(f"{layer}.{attention}.{name}", width, width, bias)
            out |= _linear(f"{layer}.fc1", width, inner) | _linear(f"{layer}.fc2", inner, width)
            out |= _norm(f"{layer}.final_layer_norm", width)
    return out
