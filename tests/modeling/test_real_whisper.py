"""Real clips through every route, with real Whisper shapes (fewer layers) and tokenizer."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, WhisperConfig, WhisperFeatureExtractor

from modeling_phi_mm import PhiMMConfig, PhiMMForConditionalGeneration
from processing import PhiMMProcessor

# Width, heads, mel bands and vocabulary of openai/whisper-base and whisper-large-v3.
WHISPERS = {"base": (512, 8, 80, 51865), "large-v3": (1280, 20, 128, 51866)}
# 20 ms frames by path: 1.1, 11, 29.4 and 64.8 s.
CLIPS = {
    "pocketsphinx_speech/cards/001.wav": 55,
    "jfk/jfk.flac": 550,
    "librispeech_bits/ortx/models/phi-4/1272-128104-0004-8k.wav": 1470,
    "librispeech_bits/librosa/audio/glacier-bay-humpback.ogg": 3241,
}
TOKENS = [14, 138, 368, 2 * 375 + 61]  # four frames together, in each window of 1500
WINDOWS = [1, 1, 1, 3]
WRITTEN = 3  # tokens that Whisper is let write of a window, the last of which may be no word


def whisper(name: str, samples: Path):
    """Config, feature extractor, tokenizer and generation settings."""
    width, heads, mels, vocabulary = WHISPERS[name]
    sides = ("encoder", "decoder")
    config = WhisperConfig(
        d_model=width,
        num_mel_bins=mels,
        vocab_size=vocabulary,
        **{f"{side}_attention_heads": heads for side in sides},
        **{f"{side}_ffn_dim": 4 * width for side in sides},
        **{f"{side}_layers": 1 for side in sides},
    )
    folder = samples / "tokenizers/whisper-base_hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = GenerationConfig.from_pretrained(folder).to_dict()
    # Random weights would end at once, or write nothing but marks.
    marks = list(range(tokenizer.eos_token_id, vocabulary))
    settings |= {"max_new_tokens": WRITTEN, "suppress_tokens": marks, "begin_suppress_tokens": None}
    return config, WhisperFeatureExtractor(feature_size=mels), tokenizer, settings


@pytest.mark.parametrize(
    ("name", "route"),
    [
        *(("base", route) for route in ("encoder", "transcript", "transcript_embeddings")),
        *((name, "decoder") for name in WHISPERS),
        ("large-v3", "encoder"),
    ],
)
def test_real_clips_go_through_every_route(samples, make_phi_mm, name: str, route: str):
    config, extractor, words, settings = whisper(name, samples)
    small, old = make_phi_mm(vision=False)
    torch.manual_seed(0)
    model = PhiMMForConditionalGeneration(
        PhiMMConfig(
            text_config=small.config.text_config,
            audio_config=config,
            audio_token_id=small.config.audio_token_id,
            audio_route=route,
            transcript_generation_config=settings,
        )
    ).eval()
    processor = PhiMMProcessor(
        feature_extractor=extractor,
        tokenizer=old.tokenizer,
        transcript_tokenizer=None if route == "encoder" else words,
        audio_stack=model.config.audio_stack,
        chat_template=old.chat_template,
    )
    count = 2 if name == "large-v3" else 4  # its windows take long
    clips = [str(samples / path) for path in CLIPS][:count]
    asked = [[{"role": "user", "content": [{"type": "audio", "audio": clip}]}] for clip in clips]
    windows = [len(processor.split_windows(processor.load_audio(clip))) for clip in clips]
    assert windows == WINDOWS[:count]
    expected = TOKENS[:count]
    if route != "encoder":
        asked = processor.transcribe(asked, model)
        parts = [turns[0]["content"][0] for turns in asked]
        expected = [WRITTEN * count for count in windows]
        if route == "transcript":
            assert all(part["text"] for part in parts)
            expected = [0] * len(clips)
        else:
            shapes = [tuple(part["audio_embeds"].shape) for part in parts]
            assert shapes == [(count, config.d_model) for count in expected]
    inputs = processor.apply_chat_template(
        asked,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    found = (inputs["input_ids"] == model.config.audio_token_id).sum(dim=1)
    assert found.tolist() == expected
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 2
