"""Recordings made harder for training: what rooms, microphones and speakers do to speech.

All functions take and give mono float32 samples (n,) and draw from the generator that they are
given, so the same generator gives the same samples.
"""

from dataclasses import dataclass

import numpy as np
import soxr
import torch
from huggingface_hub.dataclasses import strict

SPEEDS = (0.5, 2.0)  # nobody speaks outside of these
KEPT = 0.5  # of a recording, however much is dropped from its ends
TIME_SHARE = 0.2  # of the sounding frames, that one mask hides at most (SpecAugment's p)
ECHO = 0.5  # energy of a room's echo beside that of the direct sound
STEEPEST = 2.0  # of a noise's spectrum, 1/f^a: from white over pink to brown


@strict
@dataclass(kw_only=True)
class AugmentationSection:
    """What is done to a recording in training; what is left out is not done.

    Attributes:
        probability: of each of the following, drawn apart for each recording.
        gain_db: loudness, from and to; what becomes louder than full scale is clipped.
        snr_db: of white to brown noise, from and to, against the whole recording.
        speed: from and to; pitch moves with it, as when a tape runs faster.
        reverb_seconds: in which a room's echo falls by 60 dB, from and to.
        drop_seconds: at most so much is lost at the start, and at the end.
        time_masks, time_mask_seconds: stretches of the mel spectrum that are hidden, and the
            longest (SpecAugment, arXiv:1904.08779).
        frequency_masks, frequency_mask_bands: the same for neighbouring mel bands.
    """

    probability: float = 1.0
    gain_db: list[int | float] | None = None
    snr_db: list[int | float] | None = None
    speed: list[int | float] | None = None
    reverb_seconds: list[int | float] | None = None
    drop_seconds: float = 0.0
    time_masks: int = 0
    time_mask_seconds: float = 0.4
    frequency_masks: int = 0
    frequency_mask_bands: int = 12

    def validate_ranges(self) -> None:
        """Raises ValueError for a range that is none, or outside of what can be meant."""
        limits = {"gain_db": (-80, 40), "snr_db": (-20, 80), "speed": SPEEDS}
        limits["reverb_seconds"] = (0.01, 10)
        for name, (least, most) in limits.items():
            given = getattr(self, name)
            if given is None:
                continue
            if len(given) != 2 or not least <= given[0] <= given[1] <= most:
                raise ValueError(
                    f"got {name}={given}, expected [from, to] between {least} and {most}"
                )

    def validate_numbers(self) -> None:
        """Raises ValueError for a probability that is none, or less than nothing of something."""
        if not 0 < self.probability <= 1:
            raise ValueError(f"got probability={self.probability}, expected more than 0, up to 1")
        for name in ("drop_seconds", "time_masks", "frequency_masks"):
            if getattr(self, name) < 0:
                raise ValueError(f"got {name}={getattr(self, name)}, expected 0 or more")
        for name in ("time_mask_seconds", "frequency_mask_bands"):
            if not getattr(self, name) > 0:
                raise ValueError(f"got {name}={getattr(self, name)}, expected more than 0")

    def validate_effect(self) -> None:
        """Raises ValueError where nothing would be done."""
        if not any((*self._ranges(), self.drop_seconds, self.time_masks, self.frequency_masks)):
            raise ValueError("got nothing to do, expected one of gain_db, snr_db, speed, ...")

    def _ranges(self) -> tuple:
        return self.gain_db, self.snr_db, self.speed, self.reverb_seconds


def augment(
    samples: np.ndarray,
    rate: int,
    chosen: AugmentationSection,
    rng: np.random.Generator,
    own_speed: bool = False,
) -> np.ndarray:
    """A recording as another speaker, room and microphone would have it, in this order.

    Args:
        rate: in Hz.
        own_speed: leave out the changes of speed; all else is drawn as with them.
    """

    def drawn(span: list | None) -> float | None:
        value = rng.uniform(*span) if span else 0.0
        return value if rng.random() < chosen.probability and span else None

    ends = drawn([0, chosen.drop_seconds]), drawn([0, chosen.drop_seconds])
    speed, reverb = drawn(chosen.speed), drawn(chosen.reverb_seconds)
    snr, gain = drawn(chosen.snr_db), drawn(chosen.gain_db)
    samples = drop_ends(samples, *(round((seconds or 0) * rate) for seconds in ends))
    if speed is not None and not own_speed:
        samples = change_speed(samples, rate, speed)
    if reverb is not None:
        samples = reverberate(samples, rate, reverb, rng)
    if snr is not None:
        samples = add_noise(samples, snr, rng)
    return samples if gain is None else change_gain(samples, gain)


def drop_ends(samples: np.ndarray, first: int, last: int) -> np.ndarray:
    """Without so many samples at its start and end, or fewer: half of it stays."""
    most = int(len(samples) * (1 - KEPT) / 2)
    return samples[min(first, most) : len(samples) - min(last, most)]


def change_speed(samples: np.ndarray, rate: int, factor: float) -> np.ndarray:
    """Faster by a factor, so that round(n / factor) samples remain, at least one."""
    length = max(1, round(len(samples) / factor))
    faster = soxr.resample(samples, rate * factor, rate)[:length]
    return np.pad(faster, (0, length - len(faster)))


def reverberate(
    samples: np.ndarray, rate: int, seconds: float, rng: np.random.Generator
) -> np.ndarray:
    """As in a room whose echo falls by 60 dB in so many seconds: as long and as loud as before.

    The echo is noise that decays exponentially, as Moorer's (1979), behind the direct sound.
    """
    times = np.arange(1, max(2, round(seconds * rate))) / rate
    echo = rng.standard_normal(len(times)) * 10 ** (-3 * times / seconds)
    echo *= np.sqrt(ECHO / (echo**2).sum())
    size = 1 << (len(samples) + len(echo)).bit_length()
    room = np.fft.rfft(np.concatenate([[1.0], echo]), size)
    wet = np.fft.irfft(np.fft.rfft(samples, size) * room, size)[: len(samples)]
    loudness = _rms(wet)
    return (wet * (_rms(samples) / loudness if loudness else 1.0)).astype(np.float32)


def add_noise(samples: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """With noise of a spectrum between white and brown, exactly so many dB below the recording.

    Silence stays silent: nothing is to be heard beside it.
    """
    noise = _coloured(len(samples), rng.uniform(0, STEEPEST), rng)
    loudness = _rms(noise)
    if loudness == 0:  # of a single sample
        return samples
    noise *= _rms(samples) / loudness * 10 ** (-snr_db / 20)
    return (samples + noise).astype(np.float32)


def change_gain(samples: np.ndarray, gain_db: float) -> np.ndarray:
    """Louder by so many dB, clipped at full scale as a microphone does."""
    return np.clip(samples * np.float32(10 ** (gain_db / 20)), -1.0, 1.0)


def mask_mel(
    mel: torch.Tensor, frames: int, rate: float, chosen: AugmentationSection, rng
) -> torch.Tensor:
    """A window's mel spectrum with stretches of time and of bands at its mean.

    Args:
        mel: (bands, F) of one window.
        frames: of them that sound; behind them is padding, which stays.
        rate: frames in a second.
        rng: a numpy generator.
    """
    masked, level = mel.clone(), mel[:, :frames].mean()
    longest = min(round(chosen.time_mask_seconds * rate), int(TIME_SHARE * frames))
    for _ in range(chosen.time_masks):
        start, end = _stretch(longest, frames, chosen.probability, rng)
        masked[:, start:end] = level
    for _ in range(chosen.frequency_masks):
        widest = min(chosen.frequency_mask_bands, len(mel) - 1)
        start, end = _stretch(widest, len(mel), chosen.probability, rng)
        masked[start:end, :frames] = level
    return masked


def _stretch(
    longest: int, length: int, probability: float, rng: np.random.Generator
) -> tuple[int, int]:
    """From and to; of no length where nothing is to be hidden."""
    width = int(rng.integers(0, longest + 1))
    start = int(rng.integers(0, length - width + 1))
    return (start, start + width) if rng.random() < probability else (start, start)


def _coloured(length: int, steepness: float, rng: np.random.Generator) -> np.ndarray:
    """Noise whose power falls as 1/f^steepness, with no offset."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum[1:] *= np.arange(1, len(spectrum)) ** (-steepness / 2)
    spectrum[0] = 0
    return np.fft.irfft(spectrum, length)


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
