"""The real tokenizers and preprocessors of Phi, CLIP and Whisper, assembled into processors."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    PhiConfig,
    WhisperFeatureExtractor,
)

from modeling_phi_mm import PhiMMConfig
from processing import PhiMMCollator, PhiMMProcessor, chat_template_for

CLIP_L_336 = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "num_attention_heads": 16}
TEXT_ONLY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "Phi."},
    {"role": "user", "content": "Since when?"},
]


def real_tokenizer(samples: Path, name: str):
    tokenizer = AutoTokenizer.from_pretrained(samples / "tokenizers/onnxruntime-extensions" / name)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<|image|>", "<|audio|>"]}, replace_extra_special_tokens=False
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def real_processor(samples: Path, name: str, image_pool: int, audio_stack: int) -> PhiMMProcessor:
    tokenizer = real_tokenizer(samples, name)
    image_id, audio_id = tokenizer.convert_tokens_to_ids(["<|image|>", "<|audio|>"])
    config = PhiMMConfig(
        text_config=PhiConfig(),
        vision_config=CLIPVisionConfig(**CLIP_L_336),
        image_token_id=image_id,
        audio_token_id=audio_id,
        image_pool=image_pool,
    )
    return PhiMMProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        ),
        feature_extractor=WhisperFeatureExtractor.from_pretrained(
            samples / "tokenizers/whisper-base_hf"
        ),
        tokenizer=tokenizer,
        num_image_tokens=config.num_image_tokens,
        audio_stack=audio_stack,
        chat_template=chat_template_for(tokenizer),
    )


def conversation(samples: Path) -> list[dict]:
    photograph = next((samples / "minimind_v_images/eval_images").glob("*car.jpg"))
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": str(photograph)},
                {"type": "audio", "audio": str(samples / "jfk/jfk.wav")},
                {"type": "text", "text": "Describe both."},
            ],
        },
        {"role": "assistant", "content": "A car, and a speech."},
    ]


@pytest.mark.parametrize("name", ["phi-2", "phi-3-mini"])
@pytest.mark.parametrize(
    ("image_pool", "audio_stack", "image_tokens", "audio_tokens"),
    [(1, 8, 576, 69), (2, 4, 144, 138)],  # 11 s are 550 encoder frames
)
def test_placeholder_counts(samples, name, image_pool, audio_stack, image_tokens, audio_tokens):
    processor = real_processor(samples, name, image_pool, audio_stack)
    batch = PhiMMCollator(processor)([{"messages": conversation(samples)}])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert int((ids == processor.image_token_id).sum()) == image_tokens
    assert int((ids == processor.audio_token_id).sum()) == audio_tokens
    assert batch["pixel_values"].shape == (1, 3, 336, 336)
    assert batch["input_features"].shape == (1, 80, 3000)
    end = "<|endoftext|>" if name == "phi-2" else "<|end|>"
    assert processor.decode(labels[labels != -100]).strip() == f"A car, and a speech.{end}"


def test_thirty_seconds_are_1500_frames(samples):
    processor = real_processor(samples, "phi-2", 1, 8)
    assert processor.frames_per_window == 1500
    minute = np.zeros(60 * 16_000, dtype=np.float32)
    assert len(processor(audio=[minute])["input_features"]) == 2
    assert processor.count_audio_tokens(processor.count_frames(len(minute))) == 2 * 188


def test_whisper_large_v3_has_128_mels(samples):
    folder = samples / "tokenizers/onnxruntime-extensions/models/whisper-large-v3"
    processor = PhiMMProcessor(
        feature_extractor=WhisperFeatureExtractor.from_pretrained(folder),
        tokenizer=real_tokenizer(samples, "phi-2"),
    )
    inputs = processor(audio=[np.zeros(160, dtype=np.float32)])
    assert inputs["input_features"].shape == (1, 128, 3000)


@pytest.mark.parametrize(
    ("name", "rows", "ids"),
    [("phi-2", 51200, [50295, 50296]), ("phi-3-mini", 32064, [32011, 32012])],
)
def test_special_tokens_take_spare_rows(samples, name, rows, ids):
    """Phi-2 and Phi-3-mini have more embedding rows than tokens, so nothing is resized."""
    tokenizer = real_tokenizer(samples, name)
    assert tokenizer.convert_tokens_to_ids(["<|image|>", "<|audio|>"]) == ids
    assert len(tokenizer) <= rows


@pytest.mark.parametrize("name", ["phi-3-mini", "phi-4-mini"])
def test_text_renders_as_by_the_models_own_template(samples, name, make_phi_mm):
    folder = samples / "tokenizers/onnxruntime-extensions" / name
    own = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    # Phi-4-mini's vocabulary is not among the samples; its template needs none.
    tokenizer = (
        make_phi_mm("phi3")[1].tokenizer if name == "phi-4-mini" else real_tokenizer(samples, name)
    )
    theirs = tokenizer.apply_chat_template(
        TEXT_ONLY, chat_template=own, tokenize=False, add_generation_prompt=True
    )
    template = "phi4" if name == "phi-4-mini" else "phi3"
    ours = (Path(__file__).parents[2] / "processing" / f"{template}.jinja").read_text()
    processor = PhiMMProcessor(tokenizer=tokenizer, chat_template=ours)
    assert processor.apply_chat_template(TEXT_ONLY, add_generation_prompt=True) == theirs
    if name == "phi-3-mini":
        assert chat_template_for(tokenizer) == ours


def test_clips_own_preprocessor_sees_the_same_square(samples):
    """A square photograph comes out as CLIP's own preprocessor has it, to the last bit."""
    processor = real_processor(samples, "phi-2", 1, 8)
    square = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    expected = processor.image_processor(square, return_tensors="pt")["pixel_values"]
    ours = processor(images=[square], return_tensors="pt")["pixel_values"]
    assert (ours == expected).all()
