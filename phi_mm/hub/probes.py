"""Four small conversations that every artefact must answer: typed, seen, heard, heard and seen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image, ImageDraw

from processing import PhiMMProcessor

SAMPLE_RATE = 16_000
ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Probe:
    """One conversation and what it tries."""

    name: str
    messages: list[dict[str, Any]]
    max_new_tokens: int = ANSWER_TOKENS


def make_probes(folder: Path, processor: PhiMMProcessor) -> list[Probe]:
    """The probes that a model with these sub-processors can answer; their media go to `folder`.

    The recordings are noise under a hum, of two lengths, the second longer than one audio window,
    so that the cutting into windows is tried too.
    """
    picture, question = folder / "picture.png", _text("what do you see?")
    image = {"type": "image", "image": str(picture)}
    probes = [Probe("typed", _user(question))]
    sees = hasattr(processor, "image_processor")
    if sees:
        _draw(picture)
        probes.append(Probe("picture", _user(image, question)))
    if processor.feature_extractor is not None:
        window = processor.feature_extractor.n_samples
        short = _record(folder / "short.wav", window // 3, seed=0)
        long = _record(folder / "long.wav", window + window // 4, seed=1)
        probes.append(Probe("spoken", _user(short)))
        probes.append(Probe("spoken, long", _user(long, question)))
        if sees:
            probes.append(Probe("spoken, about a picture", _user(image, short)))
    return probes


def _text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def _user(*parts: dict[str, str]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def _draw(path: Path) -> None:
    picture = Image.new("RGB", (96, 64), (235, 230, 220))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((8, 8, 40, 40), fill=(220, 30, 35))
    pen.polygon([(60, 56), (88, 56), (74, 24)], fill=(35, 80, 215))
    picture.save(path)


def _record(path: Path, samples: int, seed: int) -> dict[str, str]:
    time = np.arange(samples) / SAMPLE_RATE
    noise = np.random.default_rng(seed).standard_normal(samples)
    sound = 0.2 * np.sin(2 * np.pi * 150 * time) + 0.02 * noise
    soundfile.write(path, sound.astype(np.float32), SAMPLE_RATE, subtype="PCM_16")
    return {"type": "audio", "audio": str(path)}
