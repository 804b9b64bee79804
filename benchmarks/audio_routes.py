"""The four routes from Whisper to Phi on the demo's world: what each understands and costs.

    python benchmarks/audio_routes.py runs/demo

Every route is trained alike, projectors first and then QLoRA, on the demo's rows and on typed
questions about recordings, and answers the same held-out questions: as recorded (10 to 40 dB), and
with noise added. Then a question of so many seconds is asked until the first token comes, each
route in a process of its own, turn about. A table comes on stdout, and one line of JSON last.
"""

import argparse
import json
import statistics
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from measuring import Worker, peak_of, seconds_of
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from phi_mm.assembly import load_run
from phi_mm.checkout import TINY_RECIPES, launch_train
from phi_mm.datasets.augmentation import add_noise
from phi_mm.evaluation import answers
from phi_mm.evaluation.tasks import Task, load_items, score
from phi_mm.recipes import load_recipe
from processing import PhiMMProcessor

ROUTES = ("encoder", "transcript", "transcript_embeddings", "decoder")
TASKS = {
    "asr": "wer",
    "audio_qa": "exact_match",
    "image_qa_spoken": "exact_match",
    "listening": "exact_match",
}
NOISES = (None, 20, 10, 5)  # dB, speech over noise; None as recorded
SECONDS = (2, 10, 30, 300)
PROCESSES = 2  # that train together
BATCH = 64  # questions answered at once
ROOM = 40  # tokens of an answer
Messages = list[dict]


def train(route: str, demo: Path, out: Path, steps: tuple[int, int], seed: int) -> dict:
    """Both stages of a route; minutes, with transcripts and features, and what is trained."""
    begun = time.monotonic()
    for stage, count in zip(("stage1", "stage2"), steps, strict=True):
        launch_train(_arguments(stage, route, demo, out, count, seed), PROCESSES)
    run = out / route / "stage2"
    weights = load_file(run / "adapter_model.safetensors")
    return {
        "minutes": (time.monotonic() - begun) / 60,
        "trained": sum(weight.numel() for weight in weights.values()),
    }


def _arguments(stage: str, route: str, demo: Path, out: Path, steps: int, seed: int) -> list[str]:
    path = TINY_RECIPES / f"{stage}.yaml"
    recipe = load_recipe(path)
    changed = {
        "model.audio_route": route,
        "training.output_dir": str(out / route / stage),
        "training.seed": seed,
        "training.max_steps": steps,
        "training.per_device_train_batch_size": recipe.training["per_device_train_batch_size"]
        // PROCESSES,
        "data.train": [str(demo / "world" / name) for name in (f"{stage}.json", "listening.json")],
        "data.validation": [],
        "features_dir": str(out / route / "features"),
        "evaluation": [],
    }
    if recipe.model.init_from:
        changed["model.init_from"] = str(out / route / "stage1")
    if recipe.tune.learning_rates:
        own = load_recipe(path, [f"model.audio_route={route}", "tune.learning_rates={}"]).modules
        rates = recipe.tune.learning_rates
        changed["tune.learning_rates"] = {name: rates[name] for name in rates if name in own}
    return [str(path), *(f"{key}={json.dumps(value)}" for key, value in changed.items())]


def measure(run: Path, demo: Path, limit: int | None, seed: int) -> list[dict]:
    """The scores of a run, and of its Whisper alone, in every noise."""
    recipe = load_recipe(run / "recipe.yaml")
    model, processor = load_run(run, merge=True)
    rows = []
    for name, metric in TASKS.items():
        task = Task(name, metric, load_items(demo / "world/test" / f"{name}.json", name, limit))
        for noise in NOISES:
            prompts = [_noisy(item.prompt, item.id, noise, processor, seed) for item in task.items]
            title = f"{recipe.model.audio_route}, {name}, {noise or 'no'} dB"
            said = answers.answer(model, processor, prompts, ROOM, BATCH, title)
            rows.append({"task": name, "snr_db": noise, **_scored(task, said, seed)})
            if name == "asr" and recipe.model.audio_route == ROUTES[0]:
                said = answers.transcribe(recipe, processor, prompts, BATCH, "Whisper alone")
                rows.append({"task": "asr_base", "snr_db": noise, **_scored(task, said, seed)})
    return rows


def _scored(task: Task, said: list[str], seed: int) -> dict:
    value, _, (low, high), _ = score(task, said, np.random.default_rng(seed))
    return {"value": value, "low": low, "high": high, "n": len(said)}


def _noisy(
    prompt: Messages, name: str, snr_db: float | None, processor: PhiMMProcessor, seed: int
) -> Messages:
    """The question with noise over its recording: the same for all routes."""

    def change(part: dict) -> dict:
        if part["type"] != "audio" or snr_db is None:
            return part
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        return {**part, "audio": add_noise(processor.load_audio(part["audio"]), snr_db, rng)}

    return [{**turn, "content": [change(part) for part in turn["content"]]} for turn in prompt]


class Listener:
    """A trained run that is asked about recordings of given lengths.

    Args:
        sound: recordings, which are put one after another until there are enough seconds.
    """

    def __init__(self, run: Path, sound: list[Path]):
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.model, self.processor = load_run(run, merge=True)
        self.rate = self.processor.feature_extractor.sampling_rate
        self.sound = np.concatenate([self.processor.load_audio(str(path)) for path in sound])
        self.ask(1)  # what comes first is slower

    def seconds(self, length: int) -> float:
        """Seconds from a recording of `length` seconds to the answer's first token."""
        return seconds_of(lambda: self.ask(length), torch.device("cpu"))

    def peak(self, length: int) -> float:
        """Megabytes that this takes beside the model."""
        return peak_of(lambda: self.ask(length), torch.device("cpu"))

    def ask(self, length: int) -> None:
        recording = np.resize(self.sound, length * self.rate)
        messages = [{"role": "user", "content": [{"type": "audio", "audio": recording}]}]
        answers.answer(self.model, self.processor, [messages], 1, 1, "")


def time_routes(runs: dict[str, Path], sound: list[Path], rounds: int) -> dict[str, list[dict]]:
    """For each route, seconds to the first token and peak memory by length of the recording."""
    workers = {route: Worker(Listener, run, sound) for route, run in runs.items()}
    told: dict[str, list[dict]] = {route: [] for route in runs}
    for length in SECONDS:
        taken: dict[str, list[float]] = {route: [] for route in runs}
        for number in range(rounds):
            for route, worker in workers.items():
                _tell(f"{length} s of sound, round {number + 1}, {route}")
                taken[route].append(worker.call("seconds", length))
        for route, worker in workers.items():
            found = {"first_token_seconds": statistics.median(taken[route])}
            told[route].append({"seconds": length, **found, "peak_mb": worker.call("peak", length)})
    for worker in workers.values():
        worker.close()
    return told


def table(routes: dict[str, dict]) -> str:
    """The results for people."""
    conditions = ["as recorded", *(f"{noise} dB" for noise in NOISES[1:])]
    lines = [f"{'':<32}" + "".join(f"{name:>14}" for name in conditions)]
    whisper = [row for row in routes[ROUTES[0]]["scores"] if row["task"] == "asr_base"]
    lines.append(_line("asr: Whisper alone", whisper))
    for task in TASKS:
        for route, told in routes.items():
            scores = [row for row in told["scores"] if row["task"] == task]
            lines.append(_line(f"{task}: {route}", scores))
    lines.append(
        f"\n{'':<22} {'trained':>9} {'minutes':>8} | first token, s"
        + "".join(f"{length:>7} s" for length in SECONDS)
        + " | peak, MB"
        + "".join(f"{length:>6} s" for length in SECONDS)
    )
    for route, told in routes.items():
        cost = told["cost"]
        lines.append(
            f"{route:<22} {told['trained']:9,} {told['minutes']:8.1f} | {'':<14}"
            + "".join(f"{row['first_token_seconds']:9.3f}" for row in cost)
            + f" | {'':<8}"
            + "".join(f"{row['peak_mb']:8.0f}" for row in cost)
        )
    return "\n".join(lines)


def _line(name: str, scores: list[dict]) -> str:
    half = (f"{row['value']:.1%} ±{(row['high'] - row['low']) / 2:.1%}" for row in scores)
    return f"{name:<32}" + "".join(f"{told:>14}" for told in half)


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("demo", type=Path, help="a folder that `phi-mm demo` filled")
    parser.add_argument("--out", type=Path, help="of the runs (DEMO/routes)")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(300, 600), help="of both stages %(default)s"
    )
    parser.add_argument("--limit", type=int, help="questions of each task (all)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training and noise (%(default)s)")
    given = parser.parse_args()
    if not (given.demo / "world/manifest.json").is_file():
        parser.error(f"got {given.demo}, expected the folder of a demo: phi-mm demo")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    out = given.out or given.demo / "routes"
    routes = {}
    for route in ROUTES:
        _tell(f"training {route}")
        routes[route] = train(route, given.demo, out, given.steps, given.seed)
    runs = {route: out / route / "stage2" for route in ROUTES}
    sound = sorted((given.demo / "world/audio").glob("test_sentence_*.flac"))[:100]
    # Before this process computes: see `Worker`.
    for route, cost in time_routes(runs, sound, given.rounds).items():
        routes[route]["cost"] = cost
    for route, run in runs.items():
        routes[route]["scores"] = measure(run, given.demo, given.limit, given.seed)
    print(table(routes))
    print(json.dumps({"steps": given.steps, "routes": routes}))


if __name__ == "__main__":
    main()
