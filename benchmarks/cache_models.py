"""Random models of the shapes that people use, and rows for them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    PhiConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from modeling_phi_mm import PhiMMConfig, PhiMMForConditionalGeneration
from phi_mm.assembly import LORA_TARGETS, projectors
from phi_mm.parts import AUDIO_TOKEN, IMAGE_TOKEN
from processing import PhiMMProcessor, chat_template_for

TOKENIZER = Path(__file__).parents[1] / "checkpoints" / "tiny-phi"
SECONDS, RATE = 10, 16_000  # of a recording
ANSWER = "the quick brown fox jumps over the lazy dog and is seen by nobody at all. " * 3


@dataclass(frozen=True)
class Shape:
    """A tower before the first layers of a Phi-2 (a much smaller Phi for the toy)."""

    name: str
    vision: CLIPVisionConfig | None = None
    audio: WhisperConfig | None = None
    text_width: int = 2560
    text_layers: int = 2
    lora_rank: int = 128

    def adapt(
        self, model: PhiMMForConditionalGeneration, lora: bool
    ) -> PhiMMForConditionalGeneration | PeftModel:
        """Stage 1 (only projectors learn) or stage 2 (and LoRA), as `phi_mm.assembly.adapt`."""
        model.requires_grad_(False)
        for projector in projectors(model).values():
            projector.requires_grad_(True)
        if not lora:
            return model
        targets, names = LORA_TARGETS["phi"], list(projectors(model))
        return get_peft_model(
            model, LoraConfig(r=self.lora_rank, target_modules=targets, modules_to_save=names)
        )


def _clip(side: int, patch: int, width: int, layers: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        image_size=side,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )


SHAPES = (
    Shape("CLIP-B/32", vision=_clip(224, 32, 768, 12)),
    Shape("CLIP-L/336", vision=_clip(336, 14, 1024, 24)),
    Shape(
        "Whisper-base",
        audio=WhisperConfig(
            d_model=512,
            encoder_layers=6,
            decoder_layers=6,
            encoder_attention_heads=8,
            decoder_attention_heads=8,
            encoder_ffn_dim=2048,
            decoder_ffn_dim=2048,
        ),
    ),
)
TOY = Shape("toy", vision=_clip(32, 8, 64, 2), text_width=80, lora_rank=4)


def build(shape: Shape) -> tuple[PhiMMForConditionalGeneration, PhiMMProcessor]:
    """The model, and a processor with the tiny default's tokenizer: its words do not matter."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, AUDIO_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = PhiMMConfig(
        text_config=PhiConfig(
            hidden_size=shape.text_width,
            intermediate_size=4 * shape.text_width,
            num_hidden_layers=shape.text_layers,
            num_attention_heads=max(shape.text_width // 80, 1),
            partial_rotary_factor=0.4,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=shape.vision,
        audio_config=shape.audio,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO_TOKEN),
    )
    torch.manual_seed(0)
    model = PhiMMForConditionalGeneration(config)
    side = shape.vision.image_size if shape.vision else 0
    size = {"height": side, "width": side}
    processor = PhiMMProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size)
        if shape.vision
        else None,
        feature_extractor=WhisperFeatureExtractor() if shape.audio else None,
        tokenizer=tokenizer,
        num_image_tokens=config.num_image_tokens if shape.vision else 0,
        audio_stack=config.audio_stack,
        chat_template=chat_template_for(tokenizer),
    )
    return model, processor


def write_rows(folder: Path, shape: Shape, count: int) -> list[dict]:
    """Rows with a picture of COCO's size or a recording each, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        if shape.vision is not None:
            path = folder / f"{number}.jpg"
            coarse = rng.integers(0, 256, (15, 20, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(path)
            part = {"type": "image", "image": str(path)}
        else:
            path = folder / f"{number}.flac"
            soundfile.write(path, rng.normal(0, 0.1, SECONDS * RATE).astype(np.float32), RATE)
            part = {"type": "audio", "audio": str(path)}
        asked = {"role": "user", "content": [part, {"type": "text", "text": "what is it?"}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}
        rows.append({"messages": [asked, said]})
    return rows
