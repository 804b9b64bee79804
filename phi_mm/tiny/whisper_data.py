"""Training material of the tiny Whisper: cached utterances, fresh recordings, mels, word labels."""

import json
import os
import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from phi_mm.tiny.language import sentence
from phi_mm.tiny.scenes import COLOURS, SHAPES
from phi_mm.tiny.speech import SAMPLE_RATE, TRAIN_VOICES, coloured_noise, pronounce, record

FRAME = 320  # samples in one encoder position (20 ms)
WINDOW = 4 * SAMPLE_RATE
SILENCE = 0  # frame label; words count from 1
_SHARD = 1000
_IGNORED = -100


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation, as word error rates count them."""
    return re.findall(r"[\w']+", text.lower())


def word_counts(seed: int, sentences: int) -> Counter[str]:
    """How often each word occurs in that many training sentences."""
    rng = random.Random(f"{seed} words")
    return Counter(word for _ in range(sentences) for word in words_of(sentence(rng, "train")))


def jumble(rng: random.Random, counts: Counter[str]) -> str:
    """2-7 random words, most of them drawn without regard to how common they are.

    No colour is followed by a shape, so that no colour-shape pair at all is named by chance.
    """
    vocabulary = sorted(counts)
    words: list[str] = []
    for _ in range(rng.randint(2, 7)):
        if rng.random() < 0.75:
            word = rng.choice(vocabulary)
        else:
            word = rng.choices(vocabulary, [counts[each] for each in vocabulary])[0]
        if not (words and words[-1] in COLOURS and word.startswith(SHAPES)):
            words.append(word)
    return " ".join(words) + rng.choice(".?")


def training_text(rng: random.Random, counts: Counter[str]) -> str:
    """A training sentence, or (a third) words in random order, so that words stand on their own."""
    return jumble(rng, counts) if rng.random() < 0.33 else sentence(rng, "train")


@dataclass(frozen=True)
class Utterances:
    """Clean speech of the training voices.

    Attributes:
        texts: What is said.
        audio: int16 `[samples]` at 16 kHz for each text.
        spans: float32 `[words, 2]` for each text: start and end in seconds of each word of
            `text.split()`.
    """

    texts: list[str]
    audio: list[np.ndarray]
    spans: list[np.ndarray]


def load_utterances(work: Path, seed: int, count: int, counts: Counter[str]) -> Utterances:
    """Synthesise `count` utterances into `work`, or read those that an earlier run left there.

    They are written in shards, each whole or not at all, so that an interrupted run goes on.
    """
    mark = zlib.crc32(repr((TRAIN_VOICES, sorted(counts.items()))).encode())
    folder = work / f"utterances-{seed}-{mark:08x}"
    folder.mkdir(parents=True, exist_ok=True)
    texts, audio, spans = [], [], []
    starts = range(0, count, _SHARD)
    for start in tqdm(starts, desc="speech", unit="shard", disable=None):
        size = min(_SHARD, count - start)
        path = folder / f"{start:06d}-{size}.npz"
        if not path.exists():
            _write_shard(path, random.Random(f"{seed} utterances {start}"), size, counts)
        with np.load(path) as shard:
            texts += json.loads(str(shard["texts"]))
            audio += np.split(shard["samples"], shard["ends"][:-1])
            spans += np.split(shard["spans"], shard["span_ends"][:-1])
    return Utterances(texts, audio, spans)


def _write_shard(path: Path, rng: random.Random, size: int, counts: Counter[str]) -> None:
    texts, audio, spans = [], [], []
    for _ in range(size):
        text = training_text(rng, counts)
        said = pronounce(text, rng, "train")
        texts.append(text)
        audio.append((said.audio * 32767).astype(np.int16))
        spans.append(np.array([times[1:] for times in said.word_times], np.float32))
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        np.savez(
            file,
            texts=json.dumps(texts),
            samples=np.concatenate(audio),
            ends=np.cumsum([len(each) for each in audio]),
            spans=np.concatenate(spans),
            span_ends=np.cumsum([len(each) for each in spans]),
        )
    unfinished.replace(path)


def log_mel(audio: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Whisper's log-mel spectrogram of any length: `[B, samples]` -> `[B, mels, samples / 160]`.

    Equals WhisperFeatureExtractor, which pads to its window first. `filters` is its `mel_filters`,
    `[201, mels]`.
    """
    stft = torch.stft(audio, 400, 160, window=torch.hann_window(400), return_complex=True)
    power = stft[..., :-1].abs().square()
    log = (filters.T @ power).clamp(min=1e-10).log10()
    return (torch.maximum(log, log.amax((1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


@dataclass(frozen=True)
class Batch:
    """One training step.

    Attributes:
        mel: float32 `[B, mels, 2 F]`, shorter than the feature extractor's window.
        frames: int64 `[B, F]`: the word spoken at each encoder position (0 is silence).
        tokens: int64 `[B, L]`: prompt, text and end, padded with -100.
    """

    mel: torch.Tensor
    frames: torch.Tensor
    tokens: torch.Tensor


class Batches:
    """Fresh recordings of cached utterances. Batch `step` depends on the seed and on `step` alone.

    Args:
        token_ids: Prompt, text and end-of-text for each utterance.
        silent_ids: The same for a recording without speech.
        word_ids: Frame label for each word, counted from 1.
        filters: `mel_filters` of the feature extractor.
    """

    def __init__(
        self,
        utterances: Utterances,
        token_ids: list[list[int]],
        silent_ids: list[int],
        word_ids: dict[str, int],
        filters: np.ndarray,
        seed: int,
        size: int = 32,
    ):
        self.utterances, self.token_ids, self.silent_ids = utterances, token_ids, silent_ids
        self.filters = torch.from_numpy(filters).float()
        self.seed, self.size = seed, size
        self.lengths = np.array([len(each) for each in utterances.audio])
        self.labels = [
            np.array([word_ids["".join(words_of(word))] for word in text.split()])
            for text in utterances.texts
        ]
        generator = np.random.default_rng((seed, 1))
        slopes = np.linspace(0, 1, 24)
        self.noises = np.stack([coloured_noise(2 * WINDOW, each, generator) for each in slopes])

    def __getitem__(self, step: int) -> Batch:
        generator = np.random.default_rng((self.seed, 2, step))
        rows = [self._row(index, generator) for index in self._indices(step)]
        samples = -(-max(len(audio) for audio, _, _ in rows) // FRAME) * FRAME
        if generator.random() < 0.12:  # full windows, as in use, so that their silence is known
            samples = WINDOW
        audio = np.zeros((len(rows), samples), np.float32)
        frames = np.full((len(rows), samples // FRAME), SILENCE)
        tokens = np.full((len(rows), max(len(ids) for _, _, ids in rows)), _IGNORED)
        for row, (sound, labels, ids) in enumerate(rows):
            audio[row, : len(sound)] = sound
            frames[row, : len(labels)] = labels
            tokens[row, : len(ids)] = ids
        mel = _hide(log_mel(torch.from_numpy(audio), self.filters), generator)
        return Batch(mel, torch.from_numpy(frames), torch.from_numpy(tokens))

    def _indices(self, step: int) -> np.ndarray:
        """Utterances of similar length: a shuffled epoch, sorted within stretches of 16 batches."""
        epoch, place = divmod(step, len(self.lengths) // self.size)
        generator = np.random.default_rng((self.seed, 3, epoch))
        order = generator.permutation(len(self.lengths))
        for start in range(0, len(order), 16 * self.size):
            stretch = order[start : start + 16 * self.size]
            order[start : start + 16 * self.size] = stretch[np.argsort(self.lengths[stretch])]
        place = generator.permutation(len(self.lengths) // self.size)[place]
        return order[place * self.size : (place + 1) * self.size]

    def _row(self, index: int, generator: np.random.Generator):
        """One recording: float32 `[samples]`, int64 labels for its frames, token ids."""
        noise = self.noises[generator.integers(len(self.noises))]
        noise = noise[generator.integers(WINDOW) :]
        if generator.random() < 0.04:
            length = generator.integers(SAMPLE_RATE // 4, 2 * SAMPLE_RATE)
            level = generator.choice((0.0, 10.0 ** generator.uniform(-4, -1)))
            return noise[:length] * np.float32(level), np.zeros(0, int), self.silent_ids
        # A slightly faster or slower tape is a new voice: it moves the formants too.
        speed = generator.uniform(0.9, 1.12) if generator.random() < 0.6 else 1.0
        audio = self.utterances.audio[index].astype(np.float32) / 32768
        speed = max(speed, len(audio) / WINDOW)
        ticks = np.arange(int(len(audio) / speed)) * speed
        audio = np.interp(ticks, np.arange(len(audio)), audio).astype(np.float32)
        spare = min(SAMPLE_RATE // 4, (WINDOW - len(audio)) // 2)
        lead, trail = generator.integers(spare + 1), generator.integers(spare + 1)
        sound = record(audio, noise[: lead + len(audio) + trail], lead, generator)
        spans = self.utterances.spans[index] / speed + lead / SAMPLE_RATE
        return sound, _frame_labels(self.labels[index], spans), self.token_ids[index]


def _frame_labels(labels: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """The label of the word that is being said in the middle of each 20 ms frame."""
    edges = np.rint(spans * SAMPLE_RATE / FRAME).astype(int)
    frames = np.full(edges[-1, 1], SILENCE)
    for label, (start, end) in zip(labels, edges, strict=True):
        frames[start:end] = label
    return frames


def _hide(mel: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """SpecAugment (Park et al. 2019), lightly: half of the rows lose a few bands and 0.1 s."""
    for row in mel:
        if generator.random() < 0.5:
            band, frame = generator.integers(len(row)), generator.integers(row.shape[1])
            row[band : band + generator.integers(1, len(row) // 6)] = row.mean()
            row[:, frame : frame + generator.integers(1, 11)] = row.mean()
    return mel
