"""What vLLM's Transformers backend asks of a repository, checked without vLLM.

It reads the base model from `auto_map.AutoModel`, runs the processor once for every item, cuts its
output by modality, and puts its own attention into the language model.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AttentionInterface,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from phi_mm.parts import QuietLoading

BASE_MODEL = "modeling_phi_mm.PhiMMModel"
ATTENTION = "phi_mm_vllm_check"


def write_vllm_config(folder: Path) -> None:
    """Makes AutoModel mean the base model in folder/config.json; the other classes stay."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"]["AutoModel"] = BASE_MODEL
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_vllm(folder: Path) -> None:
    """Loads the folder's own code and tries what vLLM will ask of it.

    Raises:
        ValueError: naming every requirement that is missed.
    """
    missed = missed_by_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if not missed:
        model_class = get_class_from_dynamic_module(BASE_MODEL, str(folder))
        with QuietLoading():  # the head is there and not loaded, as it must be
            model = model_class.from_pretrained(folder).eval()
        settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        name = settings["auto_map"]["AutoProcessor"]
        processor = get_class_from_dynamic_module(name, str(folder)).from_pretrained(folder)
        missed = missed_by_processor(processor, model.config)
        missed += missed_by_model(model, processor) if not missed else []
    if missed:
        raise ValueError(f"{folder} cannot be served by vLLM: {'; '.join(missed)}")


def missed_by_config(config: dict) -> list[str]:
    """Requirements that config.json misses, each in a sentence."""
    missed = []
    if config["auto_map"].get("AutoModel") != BASE_MODEL:
        missed.append(
            f"auto_map.AutoModel is {config['auto_map'].get('AutoModel')}, expected {BASE_MODEL}: "
            "vLLM adds a head of its own"
        )
    if config.get("audio_route", "encoder") != "encoder":
        missed.append(
            f"audio_route is {config['audio_route']!r}, expected 'encoder': vLLM runs no second "
            "model that writes recordings down"
        )
    if config.get("modality_adapters"):
        missed.append(
            f"modality_adapters is {config['modality_adapters']}, expected none: vLLM chooses LoRA "
            "by request, not by what a row holds"
        )
    audio = config.get("audio_config")
    if audio is not None and "max_source_positions" not in audio:
        missed.append("audio_config has no max_source_positions, by which vLLM counts audio tokens")
    return missed


def missed_by_processor(processor: ProcessorMixin, config: PreTrainedConfig) -> list[str]:
    """Requirements that the processor misses, each in a sentence."""
    missed = []
    sees, hears = config.vision_config is not None, config.audio_config is not None
    if type(processor).__call__ is not ProcessorMixin.__call__:
        missed.append(
            "the processor overrides __call__, expected the base class's, which tells where "
            "placeholders were replaced"
        )
    if hasattr(processor, "image_processor") != sees:
        missed.append(
            "the processor's attribute image_processor is there without a vision tower, or not "
            "there with one: vLLM tells by it whether a model sees"
        )
    if sees and not hasattr(processor, "_get_num_multimodal_tokens"):
        missed.append("the processor has no _get_num_multimodal_tokens: export the run again")
    missed += [
        f"feature_extractor has no {name}, by which vLLM makes recordings"
        for name in ("sampling_rate", "chunk_length")
        if hears and not hasattr(processor.feature_extractor, name)
    ]
    if missed:
        return missed
    return _missed_by_counts(processor, sees) + _missed_by_outputs(processor, sees, hears)


def _missed_by_counts(processor: ProcessorMixin, sees: bool) -> list[str]:
    if not sees:
        return []
    counted = processor._get_num_multimodal_tokens(image_sizes=[(10_000, 10_000)])
    tokens, rows = counted["num_image_tokens"], counted["num_image_patches"]
    given = processor(text=processor.image_token, images=[_picture()], return_tensors="pt")
    found = int((given["input_ids"] == processor.image_token_id).sum())
    if (tokens, rows) == ([found], [1]):
        return []
    return [
        f"_get_num_multimodal_tokens counts {tokens} tokens and {rows} rows for a picture, "
        f"expected [{found}] and [1]"
    ]


def _missed_by_outputs(processor: ProcessorMixin, sees: bool, hears: bool) -> list[str]:
    missed, owners = [], {}
    inputs = _inputs(processor, sees, hears)
    if sees:
        owners["image"] = processor.image_processor.model_input_names
    if hears:
        owners["audio"] = processor.feature_extractor.model_input_names
    claimed = {key for names in owners.values() for name in names for key in (name, f"{name}_mask")}
    offsets = inputs.pop("text_replacement_offsets")
    for key in inputs.keys() - claimed - {"input_ids", "attention_mask"}:
        missed.append(f"the processor's {key} belongs to no sub-processor: vLLM would drop it")
    if {offset["type"] for offset in offsets[0]} != set(owners):
        missed.append("the processor reports no replacement for every medium")
    for offset in offsets[0]:
        ids = torch.tensor(processor.tokenizer(offset["replacement"])["input_ids"])
        expected = getattr(processor, f"{offset['type']}_token_id")
        if int(ids.mode().values) != expected:
            missed.append(f"the commonest token of an {offset['type']} is not its placeholder")
    return missed


def missed_by_model(model: PreTrainedModel, processor: ProcessorMixin) -> list[str]:
    """Requirements that the base model misses, each in a sentence."""
    missed = []
    if not model._supports_attention_backend:
        missed.append("_supports_attention_backend is False: vLLM cannot put its attention in")
        return missed
    sees, hears = model.config.vision_config is not None, model.config.audio_config is not None
    inputs = _inputs(processor, sees, hears)
    with torch.no_grad():
        if sees:
            found = model.get_image_features(inputs["pixel_values"], return_dict=True)
            if not isinstance(found.pooler_output, torch.Tensor | list | tuple):
                missed.append("get_image_features has no tensor in pooler_output")
        if hears:
            mask = inputs["input_features_mask"]
            found = model.get_audio_features(
                inputs["input_features"], input_features_mask=mask, return_dict=True
            )
            if not isinstance(found.pooler_output, torch.Tensor):
                missed.append("get_audio_features has no tensor in pooler_output")
        missed += _missed_by_attention(model)
    return missed


def _missed_by_attention(model: PreTrainedModel) -> list[str]:
    """Whether what vLLM passes along reaches every attention layer of the language model."""
    reached = []

    def attention(module: torch.nn.Module, *args: object, **kwargs: object) -> tuple:
        reached.append((module.layer_idx, kwargs.pop("attention_instances", None)))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register(ATTENTION, attention)
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": ATTENTION})
    embeds = model.get_input_embeddings()(torch.zeros(1, 3, dtype=torch.long))
    marks = {"attention_instances": "vLLM's own"}
    model(
        inputs_embeds=embeds,
        position_ids=torch.arange(3)[None],
        use_cache=False,
        return_dict=False,
        **marks,
    )
    model.set_attn_implementation({"text_config": before})
    expected = [(n, "vLLM's own") for n in range(model.config.text_config.num_hidden_layers)]
    if reached != expected:
        return ["keyword arguments do not reach every attention layer of the language model"]
    return []


def _inputs(processor: ProcessorMixin, sees: bool, hears: bool) -> dict:
    """A picture and a recording of one window with their placeholders, as vLLM passes them."""
    text, media = [], {}
    if sees:
        text.append(processor.image_token)
        media["images"] = [_picture()]
    if hears:
        text.append(processor.audio_token)
        seconds = processor.feature_extractor.chunk_length
        length = seconds * processor.feature_extractor.sampling_rate
        media["audio"] = [np.zeros(length, dtype=np.float32)]
    return dict(
        processor(
            text=" ".join(text), return_text_replacement_offsets=True, return_tensors="pt", **media
        )
    )


def _picture() -> Image.Image:
    return Image.new("RGB", (32, 24), (120, 130, 140))
