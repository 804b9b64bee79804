"""What is left to do when somebody stops speaking: heard while he spoke, against all at the end.

    python benchmarks/audio_stream.py runs/demo/routes

From the last sample to the first token of the answer, for each route that `audio_routes.py` has
trained, turn about in one process. A table comes on stdout, and one line of JSON last.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

import numpy as np
import torch
from audio_routes import ROUTES
from measuring import seconds_of
from transformers.utils import logging as transformers_logging

from phi_mm.assembly import load_run
from phi_mm.evaluation import answers
from phi_mm.tiny.language import sentence
from phi_mm.tiny.speech import speak

SECONDS = (2, 10, 30, 300)
CHUNK = 0.1  # seconds, as a microphone gives them
CPU = torch.device("cpu")


class Listener:
    """A trained run that is asked about a recording."""

    def __init__(self, run: Path):
        self.model, self.processor = load_run(run, merge=True)
        self.rate = self.processor.feature_extractor.sampling_rate

    def at_the_end(self, recording: np.ndarray) -> float:
        """Seconds to the first token, when nothing was heard before."""
        part = {"type": "audio", "audio": recording}
        return seconds_of(lambda: self._answer(part), CPU)

    def streamed(self, recording: np.ndarray) -> float:
        """Seconds to the first token, when all but the last chunk was heard before."""
        stream, width = self.processor.stream_audio(self.model), round(CHUNK * self.rate)
        chunks = [recording[start : start + width] for start in range(0, len(recording), width)]
        for chunk in chunks[:-1]:
            stream.add(chunk)

        def rest() -> None:
            stream.add(chunks[-1])
            self._answer(stream.finish())

        return seconds_of(rest, CPU)

    def _answer(self, part: dict) -> None:
        answers.answer(
            self.model, self.processor, [[{"role": "user", "content": [part]}]], 1, 1, ""
        )


def talk(seconds: int, rate: int, seed: int) -> np.ndarray:
    """Sentences of synthetic voices, one after another."""
    rng, said, length = random.Random(seed), [], 0
    while length < seconds * rate:
        said.append(speak(sentence(rng, "test"), rng, "test").audio)
        length += len(said[-1])
    return np.concatenate(said)[: seconds * rate]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("routes", type=Path, help="a folder that audio_routes.py filled")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is said (%(default)s)")
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(f"{'route':<22} {'sound':>6} {'at the end, s':>14} {'streamed, s':>12} {'ratio':>6}")
    told = []
    for route in ROUTES:
        run = given.routes / route / "stage2"
        if not (run / "recipe.yaml").is_file():
            parser.error(f"got {given.routes}, expected {run}: run benchmarks/audio_routes.py")
        listener = Listener(run)
        for seconds in SECONDS:
            recording = talk(seconds, listener.rate, given.seed)
            ways = (listener.at_the_end, listener.streamed)
            taken = [[way(recording) for way in ways] for _ in range(given.rounds + 1)][1:]
            whole, rest = (statistics.median(way) for way in zip(*taken, strict=True))
            told.append({"route": route, "seconds": seconds, "at_the_end": whole, "streamed": rest})
            print(f"{route:<22} {seconds:>4} s {whole:14.3f} {rest:12.3f} {rest / whole:5.2f}x")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
