"""Artefacts of random weights, in the sizes of the models that people use."""

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    PhiConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from modeling_phi_mm import PhiMMConfig, PhiMMForConditionalGeneration
from phi_mm.hub.export import save_artefact
from processing import PhiMMProcessor

# The language model; CLIP-B/32 is CLIPVisionConfig's default, Whisper-base is below.
PHI = {
    "phi-1.5": PhiConfig(),
    "phi-2": PhiConfig(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        partial_rotary_factor=0.4,
    ),
    "toy": PhiConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
}
SMALL_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def whisper(width: int, layers: int) -> WhisperConfig:
    """Whisper-base is 512 wide and has 6 layers."""
    return WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
    )


def write_random(size: str, like: Path, folder: Path) -> None:
    """An artefact with random weights in bfloat16.

    Args:
        size: a key of `PHI`.
        like: an artefact whose tokenizer and template are taken; its words do not matter here.
        folder: is made.
    """
    old = PhiMMProcessor.from_pretrained(like)
    tokenizer, text = old.tokenizer, PHI[size]
    text.bos_token_id = text.eos_token_id = tokenizer.eos_token_id
    config = PhiMMConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**SMALL_CLIP if size == "toy" else {}),
        audio_config=whisper(64, 1) if size == "toy" else whisper(512, 6),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio|>"),
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = PhiMMForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    media = [config.image_token_id, config.audio_token_id]
    model.generation_config.suppress_tokens = [*media, tokenizer.eos_token_id]  # none ends early
    processor = PhiMMProcessor(
        image_processor=CLIPImageProcessorPil(),
        feature_extractor=WhisperFeatureExtractor(),
        tokenizer=tokenizer,
        num_image_tokens=config.num_image_tokens,
        audio_stack=config.audio_stack,
        chat_template=old.chat_template,
    )
    save_artefact(model, processor, folder)
