"""Tests of the espeak-ng voices: pytest tests/tiny/test_speech.py"""

import builtins
import multiprocessing
import random

import numpy as np
import pytest

from phi_mm.tiny.speech import (
    SAMPLE_RATE,
    TEST_VOICES,
    TRAIN_VOICES,
    VALIDATION_VOICES,
    Speaker,
    coloured_noise,
    record,
    speak,
)

QUESTION = "what colour is the star at the top left?"


def _say_sum(voice: str) -> float:
    return float(np.abs(Speaker().say(QUESTION, voice).audio).sum())


@pytest.mark.parametrize("voice", [*TRAIN_VOICES, *VALIDATION_VOICES, *TEST_VOICES])
def test_the_same_arguments_give_the_same_samples_whatever_was_said_before(voice):
    first = Speaker().say(QUESTION, voice)
    Speaker().say("something quite different.", "en+Reed", rate=230)  # which draws from C's rand
    again = Speaker().say(QUESTION, voice)
    np.testing.assert_array_equal(first.audio, again.audio)
    assert first.word_times == again.word_times


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_say_the_same(method):
    here = _say_sum("en-us+m7")
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(_say_sum, ["en-us+m7"]) == [here]


def test_a_seed_fixes_the_utterance():
    one, two, other = (speak(QUESTION, random.Random(seed), "train") for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.audio, two.audio)
    assert one.voice == two.voice
    assert not np.array_equal(one.audio[:1000], other.audio[:1000])


def test_duration_says_16_kHz_and_rate_shortens_it():
    slow, fast = (Speaker().say(QUESTION, "en+m3", rate=rate) for rate in (140, 220))
    assert 2.0 < len(slow.audio) / SAMPLE_RATE < 3.0
    assert len(slow.audio) > 1.3 * len(fast.audio)


def test_word_times_name_every_word_in_order_inside_the_audio():
    spoken = speak(QUESTION, random.Random(5), "train")
    assert [word for word, _, _ in spoken.word_times] == QUESTION.split()
    edges = [edge for _, start, end in spoken.word_times for edge in (start, end)]
    assert edges == sorted(edges)
    assert edges[0] >= 0 and edges[-1] <= len(spoken.audio) / SAMPLE_RATE
    assert min(end - start for _, start, end in spoken.word_times) > 0.03


def test_words_are_loud_where_their_times_say():
    said = Speaker().say("red, blue", "en+f1", rate=140)
    (_, start, end), (_, after, last) = said.word_times
    assert end == after and abs(last - len(said.audio) / SAMPLE_RATE) < 1e-9
    alone = Speaker().say("blue", "en+f1", rate=140)
    assert abs((last - after) - len(alone.audio) / SAMPLE_RATE) < 0.12


def test_every_voice_sets_and_sounds_different():
    voices = TRAIN_VOICES + VALIDATION_VOICES + TEST_VOICES
    speaker = Speaker()
    heard = {speaker.say("a red star", voice).audio.tobytes() for voice in voices}
    assert len(heard) == len(voices)


def test_held_out_variants_are_never_drawn_for_training():
    rng = random.Random(0)
    drawn = {speak("red star", rng, "train").voice.split("+")[1] for _ in range(150)}
    held = {voice.split("+")[1] for voice in VALIDATION_VOICES + TEST_VOICES}
    assert len(drawn) >= 20
    assert not drawn & held


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_recordings_are_in_range_and_not_clipped(split):
    rng = random.Random(1)
    for _ in range(10):
        audio = speak(QUESTION, rng, split).audio
        assert audio.dtype == np.float32 and audio.ndim == 1
        assert 0.09 < np.abs(audio).max() < 0.91


def test_long_texts_are_spoken_fast_enough_for_the_window_or_refused():
    text = "there is a small red star at the top left and a large blue circle"
    rng = random.Random(0)
    assert max(len(speak(text, rng, "train").audio) for _ in range(10)) <= 4 * SAMPLE_RATE
    with pytest.raises(ValueError, match="got 30 words"):
        speak(f"{text} {text}", rng, "train")


def test_record_places_speech_and_sets_the_noise_level():
    generator = np.random.default_rng(0)
    speech = np.sin(np.arange(4000) / 5).astype(np.float32)
    noise = coloured_noise(8000, 0.5, generator)
    assert np.mean(noise**2) == pytest.approx(1, abs=1e-3)
    mixed = record(speech, noise, 2000, np.random.default_rng(1))
    inside, outside = np.mean(mixed[2000:6000] ** 2), np.mean(mixed[:2000] ** 2)
    assert 8 < 10 * np.log10(inside / outside) < 42


@pytest.mark.parametrize("text", ["", "  "])
def test_empty_text_is_refused(text):
    with pytest.raises(ValueError, match="expected words"):
        speak(text, random.Random(0), "train")


def test_unknown_voice_split_and_rate_are_refused():
    with pytest.raises(ValueError, match="got voice 'en\\+nobody'"):
        Speaker().say("red", "en+nobody")
    with pytest.raises(ValueError, match="got voice 'klingonese'"):
        Speaker().say("red", "klingonese")
    with pytest.raises(ValueError, match="got split 'tests'"):
        speak("red", random.Random(0), "tests")
    with pytest.raises(ValueError, match="got rate 20"):
        Speaker().say("red", "en+m1", rate=20)


def test_a_missing_loader_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name == "espeakng_loader":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install espeakng-loader"):
        Speaker()
