"""The frozen towers as the cache needs them: alone, and known by what decides their output."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from modeling_phi_mm import PhiMMConfig
from modeling_phi_mm.media_phi_mm import MediaMixin
from modeling_phi_mm.transcription_phi_mm import WRITTEN_ROUTES
from phi_mm.assembly import load_processor
from phi_mm.parts import load_audio, load_vision, transcript_settings
from phi_mm.recipes import Recipe
from phi_mm.weights import load_learnt_towers
from processing import PhiMMProcessor


class Towers(MediaMixin, nn.Module):
    """The towers of a model without its projectors and its language model."""

    def __init__(
        self, config: PhiMMConfig, vision_tower: nn.Module | None, audio_tower: nn.Module | None
    ):
        super().__init__()
        self.config, self.vision_tower, self.audio_tower = config, vision_tower, audio_tower


def load_towers(recipe: Recipe) -> tuple[Towers, PhiMMProcessor]:
    """What `phi-mm cache` runs, with the processor that `phi_mm.assembly.assemble` gives.

    The same weights as there, where the language model is loaded too: a process for each GPU would
    hold it for nothing.
    """
    spec = recipe.model
    vision = load_vision(spec.vision, recipe.dtype) if spec.vision else None
    audio = load_audio(spec.audio, recipe.dtype) if spec.audio else None
    config = PhiMMConfig(
        vision_config=vision and vision.config.to_dict(),  # a joined config changes its parts
        audio_config=audio and audio.config.to_dict(),
        image_token_id=0,  # placeholders are of no matter here
        audio_token_id=0,
        vision_feature_layer=spec.vision_feature_layer,
        audio_route=spec.audio_route,
        audio_padded=spec.audio_padded,
        transcript_generation_config=audio
        and transcript_settings(audio, spec.transcript_language, spec.transcript_task),
    )
    if vision is not None:
        del vision.encoder.layers[config.num_vision_layers :]
    whole = spec.audio_route in WRITTEN_ROUTES
    towers = Towers(config, vision, audio if whole or audio is None else audio.get_encoder())
    for run_dir in recipe.aligned_runs:
        load_learnt_towers(towers, run_dir)
    return towers.eval(), load_processor(recipe)


def encoders(towers: MediaMixin) -> dict[str, nn.Module]:
    """The towers whose outputs are projected, under `image` and `audio`."""
    heard = towers.config.audio_route != "transcript"  # which has words in their place
    both = {"image": towers.vision_tower, "audio": towers.audio_tower if heard else None}
    return {modality: tower for modality, tower in both.items() if tower is not None}


def fingerprint(tower: nn.Module, processor: PhiMMProcessor, modality: str) -> dict[str, Any]:
    """What decides a tower's output besides its input: weights, layers, dtype, preprocessing."""
    if modality == "image":
        preparation, layers = processor.image_processor, tower.encoder.layers
    else:
        # A tower of the routes that start from a transcript is the whole Whisper.
        preparation, layers = processor.feature_extractor, tower.get_encoder().layers
    settings = {k: v for k, v in preparation.to_dict().items() if k != "mel_filters"}
    return {
        "weights": _weights_hash(tower),
        "layers": len(layers),
        "dtype": str(tower.dtype).removeprefix("torch."),
        **{f"preprocessing {key}": str(value) for key, value in settings.items()},
    }


def writing(towers: MediaMixin) -> dict[str, str]:
    """What decides a transcript, and the features at its words, besides the tower's fingerprint."""
    if towers.config.audio_route not in WRITTEN_ROUTES:
        return {}
    settings = dict(towers.config.transcript_generation_config or {})
    settings.pop("transformers_version", None)
    written = {"Whisper's generation": json.dumps(settings, sort_keys=True)}
    return written | {"windows": "end in pauses"}  # as `PhiMMProcessor.split_windows` cuts them


def _weights_hash(module: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
