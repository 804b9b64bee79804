"""Measure the tiny Whisper: word error rates through `generate`, for gate.json and README."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from phi_mm.tiny.language import sentence
from phi_mm.tiny.scenes import TEST_PAIRS
from phi_mm.tiny.speech import SAMPLE_RATE, coloured_noise, speak
from phi_mm.tiny.whisper_data import words_of

_LIMIT = 0.05


@dataclass(frozen=True)
class Metric:
    """One row of gate.json: `value` measured on `n` cases of `split`."""

    name: str
    value: float
    n: int
    split: str


def edits(reference: list[str], hypothesis: list[str]) -> int:
    """Levenshtein distance in words."""
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, heard in enumerate(hypothesis, 1):
            diagonal, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, diagonal + (expected != heard)),
            )
    return row[-1]


def word_error_rate(references: list[str], hypotheses: list[str]) -> float:
    """Edits over all words of the references; punctuation and case do not count."""
    pairs = [(words_of(r), words_of(h)) for r, h in zip(references, hypotheses, strict=True)]
    return sum(edits(r, h) for r, h in pairs) / sum(len(r) for r, _ in pairs)


class Transcriber:
    """A saved Whisper checkpoint, greedy, as any user would call it."""

    def __init__(self, checkpoint: Path):
        self.processor = WhisperProcessor.from_pretrained(checkpoint)
        self.model = WhisperForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32
        ).eval()

    @torch.no_grad()
    def __call__(self, audio: list[np.ndarray], batch: int = 50) -> list[str]:
        """Texts of 16 kHz recordings."""
        texts = []
        for start in range(0, len(audio), batch):
            inputs = self.processor.feature_extractor(
                audio[start : start + batch], sampling_rate=SAMPLE_RATE, return_tensors="pt"
            )
            ids = self.model.generate(inputs.input_features)
            texts += self.processor.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]


def _random_words(rng: random.Random, counts: Counter[str]) -> str:
    words = sorted(counts)
    return " ".join(rng.choice(words) for _ in range(rng.randint(2, 7))) + "."


def _names_test_pair(text: str) -> bool:
    words = words_of(text)
    neighbours = set(zip(words, words[1:], strict=False))
    return any((colour, end) in neighbours for colour, shape in TEST_PAIRS
               for end in (shape, f"{shape}s", f"{shape}es"))  # fmt: skip


def measure(checkpoint: Path, seed: int, cases: int, counts: Counter[str]) -> list[Metric]:
    """Word error rates of `checkpoint` for seen and held-out voices and sentences.

    Validation is for choices; the test rows are there to be read once, when nothing changes any
    more. Random words are drawn evenly from the words that training sentences hold.
    """
    transcribe = Transcriber(checkpoint)
    conditions: list[tuple[str, str, Callable[[random.Random], str]]] = [
        ("train voices, train sentences", "train", lambda rng: sentence(rng, "train")),
        ("train voices, test sentences", "train", lambda rng: sentence(rng, "test")),
        ("validation voices, validation sentences", "validation",
         lambda rng: sentence(rng, "validation")),
        ("validation voices, random words", "validation", lambda rng: _random_words(rng, counts)),
        ("test voices, train sentences", "test", lambda rng: sentence(rng, "train")),
        ("test voices, test sentences", "test", lambda rng: sentence(rng, "test")),
        ("test voices, random words", "test", lambda rng: _random_words(rng, counts)),
    ]  # fmt: skip
    rows = []
    for name, split, draw in tqdm(conditions, desc="gate", disable=None):
        rng = random.Random(f"{seed} gate {name}")
        texts = [draw(rng) for _ in range(cases)]
        spoken = [speak(text, rng, split) for text in texts]
        heard = transcribe([each.audio for each in spoken])
        rows.append(Metric(f"WER: {name}", word_error_rate(texts, heard), cases, split))
        exact = sum(map(str.__eq__, texts, heard)) / cases
        rows.append(Metric(f"exact text: {name}", exact, cases, split))
        if name == "test voices, test sentences":
            rows += _details(texts, heard, [each.voice for each in spoken])
    rows.append(_false_alarms(transcribe, seed, cases // 6))
    return [Metric(row.name, round(row.value, 4), row.n, row.split) for row in rows]


def _details(texts: list[str], heard: list[str], voices: list[str]) -> list[Metric]:
    """The test row by voice, and its sentences that name a held-out colour-shape pair."""
    groups = defaultdict(list)
    for text, words, voice in zip(texts, heard, voices, strict=True):
        groups[f"test sentences, voice {voice}"].append((text, words))
        if _names_test_pair(text):
            groups["test voices, sentences naming a held-out pair"].append((text, words))
    return [
        Metric(f"WER: {name}", word_error_rate(*map(list, zip(*pairs, strict=True))),
               len(pairs), "test")
        for name, pairs in sorted(groups.items())
    ]  # fmt: skip


def _false_alarms(transcribe: Transcriber, seed: int, cases: int) -> Metric:
    generator = np.random.default_rng((seed, 4))
    audio = [np.zeros(2 * SAMPLE_RATE, np.float32)]
    for _ in range(cases - 1):
        noise = coloured_noise(2 * SAMPLE_RATE, generator.random(), generator)
        audio.append(noise * np.float32(10 ** generator.uniform(-4, -1)))
    words = sum(text != "" for text in transcribe(audio))
    return Metric("share of silent recordings with any text", words / cases, cases, "test")


def write_gate(out: Path, rows: list[Metric], seed: int, steps: int) -> None:
    """Write `gate.json` (the rows) and `README.md` (the same for people) into the checkpoint."""
    (out / "gate.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    gate = next(row for row in rows if row.name == "WER: test voices, test sentences")
    table = "\n".join(f"| {r.name} | {r.value:.4f} | {r.n} | {r.split} |" for r in rows)
    (out / "README.md").write_text(f"""# tiny-whisper

A Whisper of 4 s windows, 40 mels and 1.3 million weights, trained from scratch on espeak-ng voices
that speak the sentences of the tiny world. It knows no other words and no human voice, and it
predicts no timestamps: cut longer recordings into windows (`chunk_length_s=4` in the ASR pipeline).
Made by `phi-mm tiny build-bases` (seed {seed}, {steps} steps).

Gate: word error rate at most {_LIMIT:.0%} on voices and sentences that training never met, greedy
`generate`: **{gate.value:.2%}**, {"passed" if gate.value <= _LIMIT else "NOT passed"}.

| measure | value | n | split |
|---|---|---|---|
{table}

Held-out voices are other timbres of the same synthesiser, not other people. Words are compared
without punctuation; "exact text" counts it. Random words are drawn evenly from the vocabulary and
make no sentence: the decoder, which has learned sentences, guesses more than the encoder hears.
""")
