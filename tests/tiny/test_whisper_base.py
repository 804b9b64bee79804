"""Tests of the tiny Whisper's builder and checkpoint: pytest tests/tiny/test_whisper_base.py"""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor, pipeline

from phi_mm.tiny.language import sentence
from phi_mm.tiny.scenes import COLOURS, SHAPES
from phi_mm.tiny.speech import SAMPLE_RATE, Speaker, speak
from phi_mm.tiny.whisper_base import build, encode, make_model, make_processor, train
from phi_mm.tiny.whisper_data import (
    Batches,
    Utterances,
    jumble,
    load_utterances,
    log_mel,
    word_counts,
    words_of,
)
from phi_mm.tiny.whisper_gate import Transcriber, edits, word_error_rate

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "tiny-whisper"
TEXTS = ["a red star.", "a small blue circle?"]


@pytest.fixture(scope="module")
def processor():
    return make_processor([word for text in TEXTS for word in words_of(text)])


@pytest.fixture(scope="module")
def utterances():
    said = [Speaker().say(text, "en+m1") for text in TEXTS * 4]
    return Utterances(
        TEXTS * 4,
        [(each.audio * 32767).astype(np.int16) for each in said],
        [np.array([times[1:] for times in each.word_times], np.float32) for each in said],
    )


def make_batches(processor, utterances, kind=Batches):
    words = sorted({word for text in TEXTS for word in words_of(text)})
    return kind(
        utterances,
        [processor.tokenizer(f" {text}").input_ids for text in utterances.texts],
        processor.tokenizer("").input_ids,
        {word: index for index, word in enumerate(words, 1)},
        processor.feature_extractor.mel_filters,
        seed=0,
        size=4,
    )


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [("a b c", "a b c", 0), ("a b c", "a c", 1), ("a b", "x a y", 2), ("", "a b", 2), ("a", "", 1)],
)
def test_edits_are_counted_in_words(reference, hypothesis, expected):
    assert edits(reference.split(), hypothesis.split()) == expected


def test_word_error_rate_weighs_by_words_and_ignores_punctuation():
    references = ["What colour is the star?", "two."]
    assert word_error_rate(references, ["what colour is a star", "two"]) == pytest.approx(1 / 6)


def test_log_mel_equals_the_feature_extractor_also_when_cut():
    extractor = WhisperFeatureExtractor(feature_size=40, chunk_length=4)
    filters = torch.from_numpy(extractor.mel_filters).float()
    audio = speak("where is the star?", random.Random(0), "train").audio
    expected = extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    padded = torch.from_numpy(np.pad(audio, (0, 4 * SAMPLE_RATE - len(audio))))[None]
    torch.testing.assert_close(log_mel(padded, filters), expected, atol=1e-6, rtol=0)
    frames = -(-len(audio) // 320) * 2
    cut = log_mel(padded[:, : frames * 160], filters)
    # The last frame reaches past the cut.
    torch.testing.assert_close(cut[..., :-1], expected[..., : frames - 1], atol=1e-6, rtol=0)


def test_encode_equals_the_encoder_on_full_windows_and_takes_shorter_ones(processor):
    model = make_model(processor, 0).eval()
    mel = torch.randn(2, 40, 400, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.model.encoder(mel).last_hidden_state
        torch.testing.assert_close(encode(model, mel), expected)
        assert encode(model, mel[..., :120]).shape == (2, 60, 128)


def test_jumbles_hold_every_word_and_name_no_pair():
    counts = Counter({"red": 50, "star": 9, "stars": 9, "the": 90, "rare": 1})
    rng = random.Random(0)
    texts = [words_of(jumble(rng, counts)) for _ in range(400)]
    found = {pair for words in texts for pair in zip(words, words[1:], strict=False)}
    assert ("red", "the") in found and ("star", "red") in found
    assert not any(a in COLOURS and b.startswith(SHAPES) for a, b in found)
    assert Counter(word for words in texts for word in words)["rare"] > 200


def test_a_batch_depends_on_its_step_alone(processor, utterances):
    one, two = (make_batches(processor, utterances) for _ in range(2))
    first = [one[step] for step in range(4)]
    assert torch.equal(first[3].mel, two[3].mel)
    assert torch.equal(first[3].tokens, two[3].tokens)
    assert first[0].mel.shape != first[2].mel.shape or not torch.equal(first[0].mel, first[2].mel)


def test_frames_carry_the_words_in_order_and_fit_the_mel(processor, utterances):
    batches = make_batches(processor, utterances)
    names = {1: "a", 2: "blue", 3: "circle", 4: "red", 5: "small", 6: "star", 0: ""}
    spoken = 0
    for step in range(4):
        batch = batches[step]
        assert batch.mel.shape[0] == 4 and batch.mel.shape[2] == 2 * batch.frames.shape[1]
        for frames, tokens in zip(batch.frames, batch.tokens, strict=True):
            text = processor.tokenizer.decode(tokens[tokens >= 0], skip_special_tokens=True)
            runs = [names[int(f)] for f, g in zip(frames, [-1, *frames], strict=False) if f != g]
            assert [word for word in runs if word] == words_of(text)
            spoken += bool(text)
    assert spoken >= 12


def test_utterances_are_kept_and_the_same_for_a_seed(tmp_path):
    counts = word_counts(0, 50)
    first = load_utterances(tmp_path / "a", 0, 5, counts)
    other = load_utterances(tmp_path / "b", 0, 5, counts)
    (shard,) = (tmp_path / "a").rglob("*.npz")
    written = shard.stat().st_mtime_ns
    again = load_utterances(tmp_path / "a", 0, 5, counts)
    assert shard.stat().st_mtime_ns == written
    for each in (other, again):
        assert each.texts == first.texts
        for sound, same in zip(first.audio, each.audio, strict=True):
            np.testing.assert_array_equal(sound, same)


class Interrupted(Batches):
    def __getitem__(self, step):
        if step == 4:
            raise KeyboardInterrupt
        return super().__getitem__(step)


def test_a_resumed_training_equals_a_straight_one(tmp_path, processor, utterances):
    straight, resumed = make_model(processor, 0), make_model(processor, 0)
    batches = make_batches(processor, utterances)
    train(straight, batches, 6, 7, tmp_path / "straight.pt", save_every=2)
    with pytest.raises(KeyboardInterrupt):
        interrupted = make_batches(processor, utterances, Interrupted)
        train(resumed, interrupted, 6, 7, tmp_path / "resumed.pt", save_every=2)
    resumed = make_model(processor, 1)
    train(resumed, batches, 6, 7, tmp_path / "resumed.pt", save_every=2)
    for name, weight in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, atol=0, rtol=0, msg=name)


def test_build_writes_a_checkpoint_that_the_pipeline_takes(tmp_path):
    out = tmp_path / "whisper"
    build(out, 0, tmp_path / "work", steps=2, utterances=32, cases=6)
    rows = json.loads((out / "gate.json").read_text())
    assert all(set(row) == {"name", "value", "n", "split"} for row in rows)
    assert "WER: test voices, test sentences" in {row["name"] for row in rows}
    assert "Gate: word error rate" in (out / "README.md").read_text()
    transcribe = pipeline("automatic-speech-recognition", model=str(out))
    heard = transcribe([np.zeros(SAMPLE_RATE, np.float32), np.zeros(2 * SAMPLE_RATE, np.float32)])
    assert [set(each) for each in heard] == [{"text"}, {"text"}]


@pytest.mark.skipif(not CHECKPOINT.exists(), reason="checkpoints/tiny-whisper is not built")
def test_the_checkpoint_hears_held_out_voices_and_sentences():
    rng = random.Random(1)
    texts = [sentence(rng, "test") for _ in range(30)]
    audio = [speak(text, rng, "test").audio for text in texts]
    heard = Transcriber(CHECKPOINT)([*audio, np.zeros(SAMPLE_RATE, np.float32)])
    assert word_error_rate(texts, heard[:-1]) <= 0.1
    assert heard[-1] == ""
