"""Recordings: exact token counts at the boundaries, conversions at the door, one clear error for a
bad one.
"""

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from processing import PhiMMProcessor


@pytest.fixture(scope="module")
def whisper_processor(make_phi_mm) -> PhiMMProcessor:
    """A processor with Whisper's real window: 30 s, 3000 mel frames, 1500 encoder frames."""
    _, small = make_phi_mm()
    return PhiMMProcessor(
        feature_extractor=WhisperFeatureExtractor(),
        tokenizer=small.tokenizer,
        audio_stack=8,
        chat_template=small.chat_template,
    )


def tone(samples: int, rate: int = 16000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate)).astype(np.float32)


def placeholders(processor: PhiMMProcessor, recording) -> int:
    message = [{"role": "user", "content": [{"type": "audio", "audio": recording}]}]
    inputs = processor.apply_chat_template(
        message, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return int((inputs["input_ids"] == processor.audio_token_id).sum())


@pytest.mark.parametrize(
    ("samples", "windows", "mel_frames", "tokens_of_8", "tokens_of_4"),
    [
        (1, 1, 1, 1, 1),
        (159, 1, 1, 1, 1),  # one hop is 160 samples
        (160, 1, 1, 1, 1),
        (161, 1, 2, 1, 1),
        (16 * 160, 1, 16, 1, 2),  # 16 mel frames are 8 encoder frames
        (16 * 160 + 1, 1, 17, 2, 3),
        (479_840, 1, 2999, 188, 375),  # 29.99 s
        (480_000, 1, 3000, 188, 375),  # 30 s
        (480_160, 2, 3001, 189, 376),  # 30.01 s
        (976_000, 3, 6100, 2 * 188 + 7, 2 * 375 + 13),  # 61 s
    ],
)
def test_token_counts_follow_the_formula(
    whisper_processor, samples, windows, mel_frames, tokens_of_8, tokens_of_4
):
    inputs = whisper_processor(audio=[tone(samples)], return_tensors="pt")
    assert inputs["input_features"].shape == (windows, 80, 3000)
    assert int(inputs["input_features_mask"].sum()) == mel_frames
    assert len(whisper_processor.split_windows(tone(samples))) == windows
    for stack, expected in ((8, tokens_of_8), (4, tokens_of_4)):
        whisper_processor.audio_stack = stack
        assert placeholders(whisper_processor, tone(samples)) == expected
    whisper_processor.audio_stack = 8


@pytest.mark.parametrize("stack", [1, 3, 4, 7])
def test_processor_and_model_agree_on_every_length(make_phi_mm, stack):
    """The two exported packages count on their own; the model raises where they differ."""
    model, processor = make_phi_mm(audio_stack=stack)
    lengths = [1, 159, 160, 161, 319, 320, 321, 8000, 15999, 16000, 16001, 16161, 32000, 40123]
    recordings = [tone(length) for length in lengths]
    inputs = processor(audio=recordings, return_tensors="pt")
    with torch.no_grad():
        tokens = len(model.get_audio_features(**inputs).pooler_output)
    counted = [processor.count_audio_tokens(processor.count_frames(n)) for n in lengths]
    assert tokens == sum(counted) == sum(placeholders(processor, r) for r in recordings)


def test_a_long_recording_is_cut_into_windows_and_never_truncated(whisper_processor):
    start, end = tone(480_000), tone(16_000) * 0.1
    both = whisper_processor(audio=[np.concatenate([start, end])])["input_features"]
    parts = whisper_processor(audio=[start, end])["input_features"]
    torch.testing.assert_close(torch.as_tensor(both), torch.as_tensor(parts), rtol=0, atol=0)


def test_no_samples_is_an_error(whisper_processor):
    with pytest.raises(ValueError, match="with 0 samples, expected at least one"):
        whisper_processor(audio=[np.zeros(0, dtype=np.float32)])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_an_error(whisper_processor, bad):
    samples = tone(1600)
    samples[7] = bad
    with pytest.raises(ValueError, match="NaN or infinite samples"):
        whisper_processor(audio=[samples])


def test_silence_and_clipping_are_recordings(whisper_processor):
    for samples in (np.zeros(16_000, dtype=np.float32), np.sign(tone(16_000))):
        features = whisper_processor(audio=[samples], return_tensors="pt")["input_features"]
        assert features.isfinite().all() and placeholders(whisper_processor, samples) == 7


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled(whisper_processor, tmp_path, rate):
    seconds, path = 2, tmp_path / f"{rate}.wav"
    soundfile.write(path, tone(seconds * rate, rate), rate)
    for source in (str(path), (tone(seconds * rate, rate), rate)):
        samples = whisper_processor.load_audio(source)
        assert samples.dtype == np.float32 and len(samples) == seconds * 16_000
        middle = slice(8_000, 24_000)  # the edges ring
        np.testing.assert_allclose(samples[middle], tone(32_000)[middle], atol=0.01)


@pytest.mark.parametrize("channels_first", [True, False])
def test_stereo_is_mixed_to_mono(whisper_processor, tmp_path, channels_first):
    left, right = tone(16_000), np.zeros(16_000, dtype=np.float32)
    stereo = np.stack([left, right], axis=0 if channels_first else 1)
    np.testing.assert_allclose(whisper_processor.load_audio((stereo, 16_000)), left / 2, atol=1e-6)
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(
        whisper_processor.load_audio(tmp_path / "s.wav"), left / 2, atol=1e-6
    )


def test_integer_samples_are_scaled(whisper_processor):
    samples = whisper_processor.load_audio((np.array([0, 16384, -32768], dtype=np.int16), 16_000))
    assert samples.tolist() == [0.0, 0.5, -1.0]


def test_a_bad_file_is_named(whisper_processor, tmp_path):
    soundfile.write(tmp_path / "whole.flac", tone(16_000), 16_000)
    whole = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[:40])
    (tmp_path / "words.wav").write_text("this is not a recording")
    (tmp_path / "empty.mp3").write_bytes(b"")
    for name in ("missing.wav", "cut.flac", "words.wav", "empty.mp3"):
        with pytest.raises(ValueError, match=f"got the audio '.*{name}', expected a recording"):
            whisper_processor.load_audio(str(tmp_path / name))


def test_a_mislabelled_recording_is_read_by_its_content(whisper_processor, tmp_path):
    path = tmp_path / "really_flac.wav"
    soundfile.write(path, tone(16_000), 16_000, format="FLAC")
    np.testing.assert_allclose(whisper_processor.load_audio(path), tone(16_000), atol=1e-4)


def test_real_recordings(whisper_processor, samples):
    jfk = {
        k: whisper_processor.load_audio(samples / f"jfk/jfk.{k}") for k in ("wav", "flac", "mp3")
    }
    assert len(jfk["wav"]) == len(jfk["flac"]) == 176_000  # 11 s
    assert placeholders(whisper_processor, samples / "jfk/jfk.wav") == 69  # ceil(550 / 8)
    correlation = np.corrcoef(jfk["wav"][:170_000], jfk["mp3"][:170_000])[0, 1]
    assert correlation > 0.99


def test_mel_features_are_whispers(whisper_processor, samples):
    """Against a log-mel computed by another implementation of Whisper's front end."""
    folder = samples / "librispeech_bits/ortx"
    expected = np.loadtxt(
        (folder / "whisper/expected_output.txt").read_text().replace(",", " ").splitlines()
    )
    speech = folder / "1272-141231-0002.flac"
    for source in (speech, speech.read_bytes(), speech.with_suffix(".wav")):
        mel = whisper_processor(audio=[source], return_tensors="pt")["input_features"][0]
        # The tolerance that is published with it.
        np.testing.assert_allclose(mel[:, : expected.shape[-1]], expected, rtol=1e-3, atol=1e-2)
