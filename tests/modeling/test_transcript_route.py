"""The `transcript` route: Whisper's words enter Phi as ordinary text."""

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from modeling_phi_mm import PhiMMForConditionalGeneration
from processing import PhiMMProcessor

GENERATION = {"decoder_start_token_id": 62, "eos_token_id": 61, "pad_token_id": 60, "max_length": 8}
RECORDING = (0.3 * np.sin(np.arange(20_000) / 7)).astype(np.float32)  # two windows of one second


@pytest.fixture(scope="module")
def transcript_phi_mm(make_phi_mm):
    model, encoder_route = make_phi_mm(
        audio_route="transcript", transcript_generation_config=GENERATION
    )
    processor = PhiMMProcessor(
        image_processor=encoder_route.image_processor,
        feature_extractor=encoder_route.feature_extractor,
        tokenizer=encoder_route.tokenizer,
        transcript_tokenizer=make_phi_mm()[1].tokenizer,  # bytes: ids of Whisper's toy vocabulary
        num_image_tokens=encoder_route.num_image_tokens,
        chat_template=encoder_route.chat_template,
    )
    return model, processor


def test_the_whole_whisper_is_kept_and_nothing_is_projected(transcript_phi_mm):
    model, _ = transcript_phi_mm
    assert isinstance(model.model.audio_tower, WhisperForConditionalGeneration)
    assert model.model.audio_projector is None


def test_transcripts_are_whispers_own(transcript_phi_mm):
    model, processor = transcript_phi_mm
    whisper = WhisperForConditionalGeneration(WhisperConfig(**model.config.audio_config.to_dict()))
    whisper.load_state_dict(model.model.audio_tower.state_dict())
    mel = processor(audio=[RECORDING])["input_features"]
    expected = whisper.eval().generate(input_features=mel, **GENERATION)
    assert torch.equal(model.transcribe(mel), expected)


def test_messages_hold_the_transcript_and_generate(transcript_phi_mm, tmp_path):
    model, processor = transcript_phi_mm
    said = [{"role": "user", "content": [{"type": "audio", "audio": RECORDING}]}]
    written = processor.transcribe(said, model)
    ids = model.transcribe(processor(audio=[RECORDING])["input_features"])
    words = processor.transcript_tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert written[0]["content"] == [{"type": "text", "text": " ".join(w.strip() for w in words)}]
    assert said[0]["content"][0]["type"] == "audio"
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = PhiMMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert PhiMMProcessor.from_pretrained(tmp_path).transcribe(said, again) == written
    inputs = processor.apply_chat_template(
        written, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_untranscribed_audio_is_refused(transcript_phi_mm, make_phi_mm):
    model, processor = transcript_phi_mm
    said = [{"role": "user", "content": [{"type": "audio", "audio": RECORDING}]}]
    with pytest.raises(ValueError, match=r"processor.transcribe\(messages, model\)"):
        processor.apply_chat_template(said, tokenize=True)
    with pytest.raises(ValueError, match="got audio_route='encoder', expected 'transcript'"):
        make_phi_mm()[0].transcribe(torch.zeros(1, 8, 100))
    with pytest.raises(ValueError, match="without transcript_tokenizer"):
        make_phi_mm()[1].transcribe(said, model)
