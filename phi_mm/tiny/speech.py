"""Synthetic speech for the tiny world: espeak-ng voices at 16 kHz, with the time of every word."""

import _ctypes
import contextlib
import ctypes
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soxr

SAMPLE_RATE = 16_000

# A voice is "<accent>+<variant>". No variant of a held-out voice speaks in training, nor does a
# close copy of one: a held-out voice has a new timbre, in an accent that training has heard.
TRAIN_VOICES = (
    "en+m1", "en+f1", "en+m3", "en+f4", "en+linda", "en+Reed", "en+paul", "en+klatt3",
    "en-us+m1", "en-us+f3", "en-us+m7", "en-us+Andy", "en-us+linda", "en-us+ed", "en-us+steph",
    "en-us+Denis", "en-us+f4", "en-gb-x-rp+m3", "en-gb-x-rp+f4", "en-gb-x-rp+steph",
    "en-gb-x-rp+Diogo", "en-gb-x-rp+grandpa", "en-gb-x-rp+Annie", "en-gb-scotland+m1",
    "en-gb-scotland+f3", "en-gb-scotland+max", "en-gb-scotland+shelby", "en-gb-scotland+gustave",
    "en-gb-x-gbclan+m7", "en-gb-x-gbclan+Annie", "en-gb-x-gbclan+f1", "en-gb-x-gbclan+benjamin",
    "en-029+f3", "en-029+Michael", "en-gb-x-gbcwmd+m3", "en-gb-x-gbcwmd+Alicia", "en-us-nyc+m7",
    "en-us-nyc+f1",
)  # fmt: skip
VALIDATION_VOICES = ("en+m8", "en-us+f5", "en-gb-x-rp+m5")
TEST_VOICES = (
    "en+f2", "en-us+m2", "en-us+m4", "en-gb-x-rp+Mario", "en-gb-scotland+m6",
    "en-gb-x-gbclan+belinda",
)  # fmt: skip
_VOICES = {"train": TRAIN_VOICES, "validation": VALIDATION_VOICES, "test": TEST_VOICES}

_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000  # espeak_AUDIO_OUTPUT, initialisation option
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
_END_OF_EVENTS, _WORD = 0, 1  # espeak_EVENT_TYPE
_CHARACTERS, _UTF8 = 1, 1  # espeak_POSITION_TYPE, text encoding flag
_ESPEAK_RATE = 22_050
_LOCK = threading.Lock()  # the library is not re-entrant


@dataclass(frozen=True)
class Utterance:
    """Speech and where its words lie.

    Attributes:
        audio: float32 `[samples]` in -1..1 at 16 kHz.
        word_times: (word, start, end) in seconds, in order, one entry for each word of the text.
        voice: The espeak-ng voice that spoke.
        rate: Words a minute that it was asked for.
    """

    audio: np.ndarray
    word_times: tuple[tuple[str, float, float], ...]
    voice: str
    rate: int


class _Event(ctypes.Structure):
    """espeak_EVENT of espeak-ng's speak_lib.h (its union is read as one number)."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_int64),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class Speaker:
    """espeak-ng's synthesiser.

    espeak-ng keeps its state (pitch flutter, gain control, voice) in the library's global
    variables, so the same call can sound different the second time. The library is therefore
    loaded afresh for every utterance (3 ms): the same arguments always give the same samples, and
    any number of speakers may exist, also in forked or spawned workers.

    Raises:
        ImportError: espeakng_loader is not installed.
    """

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError as error:
            raise ImportError(
                "got no espeakng_loader, expected espeak-ng for speech, "
                "do `pip install espeakng-loader`"
            ) from error
        self._library_path = espeakng_loader.get_library_path()
        self._data = Path(espeakng_loader.get_data_path())

    def say(self, text: str, voice: str, rate: int = 175, pitch: int = 50) -> Utterance:
        """Speak `text` in `voice` at `rate` words a minute and `pitch` 0..99.

        Raises:
            ValueError: empty text, unknown voice, or a rate or pitch out of range.
        """
        if not text.strip():
            raise ValueError(f"got text {text!r}, expected words, do pass something to say")
        if not 80 <= rate <= 450 or not 0 <= pitch <= 99:
            raise ValueError(
                f"got rate {rate} and pitch {pitch}, expected 80..450 and 0..99, do choose in range"
            )
        with self._library() as library:
            self._set_voice(library, voice)
            for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, 50)):
                library.espeak_SetParameter(parameter, value, 0)
            samples, events = _synthesise(library, text)
        audio = soxr.resample(samples.astype(np.float32) / 32768, _ESPEAK_RATE, SAMPLE_RATE)
        audio = _trim(np.clip(audio, -1, 1))
        return Utterance(audio, _word_times(text, events, len(audio) / SAMPLE_RATE), voice, rate)

    @contextlib.contextmanager
    def _library(self) -> Iterator[ctypes.CDLL]:
        """The freshly loaded and initialised C library, unloaded at the end."""
        with _LOCK:
            library = ctypes.CDLL(self._library_path)
            _declare(library)
            rate = library.espeak_Initialize(_SYNCHRONOUS, 0, str(self._data).encode(), _DONT_EXIT)
            try:
                if rate != _ESPEAK_RATE:
                    raise RuntimeError(
                        f"got {rate} from espeak_Initialize with data at {self._data}, expected "
                        f"the sample rate {_ESPEAK_RATE}, do reinstall espeakng-loader"
                    )
                # Breathy voices draw from the library's generator, which the clock would seed, and
                # some of them from C's, which outlives the library.
                library.espeak_ng_SetRandSeed(1)
                ctypes.CDLL("ucrtbase" if os.name == "nt" else None).srand(1)
                yield library
            finally:
                library.espeak_Terminate()
                _ctypes.dlclose(library._handle)

    def _set_voice(self, library: ctypes.CDLL, voice: str) -> None:
        # An unknown variant is ignored by espeak-ng, which would speak in the accent's plain voice.
        _, plus, variant = voice.partition("+")
        known = not plus or (self._data / "voices" / "!v" / variant).is_file()
        if not known or library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(
                f"got voice {voice!r}, expected <accent> or <accent>+<variant> of espeak-ng, "
                "do choose one of TRAIN_VOICES, VALIDATION_VOICES, TEST_VOICES"
            )


def _declare(library: ctypes.CDLL) -> None:
    library.espeak_Initialize.argtypes = [
        ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int
    ]  # fmt: skip
    library.espeak_SetVoiceByName.argtypes = [ctypes.c_char_p]
    library.espeak_SetSynthCallback.argtypes = [_CALLBACK]
    library.espeak_SetSynthCallback.restype = None
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
        ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip


def _synthesise(library: ctypes.CDLL, text: str) -> tuple[np.ndarray, list[tuple[int, float]]]:
    """int16 samples, and for each word event its character position and time in seconds."""
    pieces: list[np.ndarray] = []
    events: list[tuple[int, float]] = []

    @_CALLBACK
    def receive(wav, count, event):
        if wav and count > 0:
            pieces.append(np.ctypeslib.as_array(wav, (count,)).copy())
        index = 0
        while event[index].type != _END_OF_EVENTS:
            if event[index].type == _WORD:
                events.append((event[index].text_position - 1, event[index].audio_position / 1000))
            index += 1
        return 0

    data = text.encode()
    library.espeak_SetSynthCallback(receive)
    code = library.espeak_Synth(data, len(data) + 1, 0, _CHARACTERS, 0, _UTF8, None, None)
    if code != 0 or not pieces:
        raise ValueError(
            f"got no speech for {text!r} (espeak_Synth returned {code}), expected words, "
            "do pass text that can be read aloud"
        )
    return np.concatenate(pieces), events


def _trim(audio: np.ndarray) -> np.ndarray:
    """Cut the pause that espeak-ng leaves at the end of a sentence."""
    loud = np.flatnonzero(np.abs(audio) > 0.002)
    return audio[: loud[-1] + 1] if loud.size else audio


def _word_times(
    text: str, events: list[tuple[int, float]], duration: float
) -> tuple[tuple[str, float, float], ...]:
    """Give every word of `text` its span; a word lasts until the next begins.

    espeak-ng reports some neighbours ("is the") as one event: they share its time by their lengths.
    """
    words, position = [], 0
    for word in text.split():
        position = text.index(word, position)
        words.append((word, position))
        position += len(word)
    starts = [(at, min(time, duration)) for at, time in sorted(events) if at >= 0] or [(0, 0.0)]
    starts[0] = (0, starts[0][1])
    times = []
    for index, (first, begin) in enumerate(starts):
        after = starts[index + 1] if index + 1 < len(starts) else (len(text), duration)
        group = [word for word, at in words if first <= at < after[0]]
        letters = sum(map(len, group))
        for word in group:
            end = begin + (after[1] - begin) * len(word) / letters
            times.append((word, begin, end))
            begin, letters = end, letters - len(word)
    return tuple(times)


def coloured_noise(samples: int, slope: float, generator: np.random.Generator) -> np.ndarray:
    """Noise of unit power and spectrum 1/f^slope (0 white, 1 pink), float32 `[samples]`."""
    length = 1 << (samples - 1).bit_length()  # the transform is slow at lengths with large primes
    spectrum = np.fft.rfft(generator.standard_normal(length))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** (-slope / 2)
    noise = np.fft.irfft(spectrum, length)[:samples]
    return (noise / np.sqrt(np.mean(noise**2))).astype(np.float32)


def record(
    audio: np.ndarray, noise: np.ndarray, lead: int, generator: np.random.Generator
) -> np.ndarray:
    """Place clean speech `lead` samples into `noise` at 10-40 dB, with a peak of 0.1-0.9.

    Args:
        audio: float32 `[samples]`.
        noise: Unit-power noise, float32 `[total]`, total >= lead + samples. Not changed.

    Returns:
        float32 `[total]`, never clipped.
    """
    power = float(np.mean(audio**2))
    mixed = noise * np.sqrt(power * 10 ** (-generator.uniform(10, 40) / 10)).astype(np.float32)
    mixed[lead : lead + len(audio)] += audio
    return mixed * np.float32(generator.uniform(0.1, 0.9) / np.abs(mixed).max())


def pronounce(text: str, rng: random.Random, split: str, longest: float = 4.0) -> Utterance:
    """Say `text` cleanly as a random voice of `split`, at 140-230 words a minute and pitch 25-75.

    Where it would not fit in `longest` seconds (the tiny Whisper's window) the rate is drawn again
    from the faster part of that range.

    Raises:
        ValueError: unknown split, empty text, or text too long even at 230 words a minute.
    """
    if split not in _VOICES:
        raise ValueError(f"got split {split!r}, expected one of {list(_VOICES)}, do name one")
    voice, pitch = rng.choice(_VOICES[split]), rng.randint(25, 75)
    speaker = Speaker()
    for slowest in (140, 160, 180, 200, 220, 230):
        said = speaker.say(text, voice, rng.randint(slowest, 230), pitch)
        if len(said.audio) <= longest * SAMPLE_RATE:
            return said
    raise ValueError(
        f"got {len(text.split())} words lasting {len(said.audio) / SAMPLE_RATE:.1f} s, "
        f"expected at most {longest} s, do shorten {text!r}"
    )


def speak(text: str, rng: random.Random, split: str, longest: float = 4.0) -> Utterance:
    """Record `text` as a random voice of `split`: see `pronounce`, which also says what is raised.

    Up to 0.25 s of silence before and after (as much as `longest` leaves room for), noise between
    white and pink at 10-40 dB, any gain.
    """
    said = pronounce(text, rng, split, longest)
    generator = np.random.default_rng(rng.getrandbits(64))
    spare = int(longest * SAMPLE_RATE) - len(said.audio)
    lead, trail = (rng.randint(0, min(SAMPLE_RATE // 4, spare // 2)) for _ in range(2))
    noise = coloured_noise(lead + len(said.audio) + trail, rng.random(), generator)
    shift = lead / SAMPLE_RATE
    times = tuple((word, start + shift, end + shift) for word, start, end in said.word_times)
    audio = record(said.audio, noise, lead, generator)
    return replace(said, audio=audio, word_times=times)
