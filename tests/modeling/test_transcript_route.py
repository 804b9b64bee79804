"""The `transcript` route: Whisper's words enter Phi as ordinary text."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, WhisperConfig, WhisperForConditionalGeneration

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
    with pytest.raises(ValueError, match="without transcript_tokenizer"):
        make_phi_mm()[1].transcribe_segments(RECORDING, model)


def test_windows_that_are_written_down_end_in_pauses(transcript_phi_mm):
    """Speech with a pause from 0.80 to 0.95 s, and from 1.70 to 1.85 s; windows of one second."""
    _, processor = transcript_phi_mm
    speech = (0.3 * np.sin(np.arange(40_000) / 7)).astype(np.float32)
    for start, end in ((0.80, 0.95), (1.70, 1.85)):
        speech[round(start * 16_000) : round(end * 16_000)] *= 0.01
    windows = processor.split_windows(speech)
    assert np.array_equal(np.concatenate(windows), speech)
    first, second = len(windows[0]), len(windows[0]) + len(windows[1])
    assert 0.80 < first / 16_000 < 0.95 and 1.70 < second / 16_000 < 1.85
    assert max(map(len, windows)) <= 16_000 and len(windows) == 3
    [whole] = processor.split_windows(speech[:16_000])
    assert len(whole) == 16_000
    assert len(processor.split_windows(speech[:16_001])) == 2


def test_a_long_recording_is_written_down_in_windows_with_their_times(transcript_phi_mm):
    model, processor = transcript_phi_mm
    recording = (0.3 * np.sin(np.arange(150_000) / 7)).astype(np.float32)
    told = []
    segments = processor.transcribe_segments(
        recording, model, progress=lambda done, there: told.append((done, there))
    )
    windows = processor.split_windows(recording)
    ends = np.cumsum([len(window) for window in windows]) / 16_000
    assert [segment["end"] for segment in segments] == ends.tolist()
    assert [segment["start"] for segment in segments] == [0, *ends[:-1].tolist()]
    assert [there for _, there in told] == [150_000 / 16_000] * len(told)
    assert [done for done, _ in told] == [ends[7], ends[-1]] and len(windows) > 8
    said = [{"role": "user", "content": [{"type": "audio", "audio": recording}]}]
    [part] = processor.transcribe(said, model)[0]["content"]
    assert " ".join(segment["text"] for segment in segments) == part["text"]


def test_times_of_a_window_become_times_of_the_recording(transcript_phi_mm, samples):
    _, other = transcript_phi_mm
    tokenizer = AutoTokenizer.from_pretrained(samples / "tokenizers/whisper-base_hf")
    processor = PhiMMProcessor(
        feature_extractor=other.feature_extractor,
        tokenizer=other.tokenizer,
        transcript_tokenizer=tokenizer,
        chat_template=other.chat_template,
    )
    written = "<|startoftranscript|><|en|><|transcribe|><|0.00|> hello there<|1.20|><|1.40|> and"
    ids = tokenizer(written, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    assert processor.read_segments(ids, 30.0, 52.5) == [
        {"start": 30.0, "end": pytest.approx(31.2), "text": "hello there"},
        {"start": pytest.approx(31.4), "end": 52.5, "text": "and"},
    ]
