"""Real voices on the tiny default: what each audio route learns of spoken digits, by speaker.

    python benchmarks/own_recordings.py runs/demo RECORDINGS

RECORDINGS is a folder of `<digit>_<speaker>_<number>.wav`, as github.com/Jakobovski/
free-spoken-digit-dataset has them. One speaker is never heard in training, and every fifth
recording of the others is kept back. A table comes on stdout, and one line of JSON last.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

from transformers.utils import logging as transformers_logging

from phi_mm.assembly import load_run
from phi_mm.checkout import TINY_RECIPES, launch_train
from phi_mm.evaluation import answers
from phi_mm.evaluation.intervals import wilson
from phi_mm.evaluation.tasks import Item, load_items
from phi_mm.tiny.wordings import NUMBERS

ROUTES = ("encoder", "transcript", "transcript_embeddings", "decoder")
QUESTION = "say this again: <audio>"
KEPT_BACK = 5  # every so many
PROCESSES, BATCH = 2, 16  # that train together, and their rows of a step
ROOM = 8  # tokens of an answer


def write_rows(recordings: Path, out: Path, unheard: str) -> tuple[Path, dict[str, Path]]:
    """The rows to train on, and a file of held-out ones for each speaker."""
    train, test = [], defaultdict(list)
    for path in sorted(recordings.glob("*.wav")):
        digit, speaker, number = path.stem.split("_")
        row = {
            "id": path.stem,
            "audio": str(path.resolve()),
            "conversations": [
                {"from": "human", "value": QUESTION},
                {"from": "gpt", "value": NUMBERS[int(digit)]},
            ],
        }
        if speaker == unheard or int(number) % KEPT_BACK == 0:
            test[speaker].append(row)
        else:
            train.append(row)
    out.mkdir(parents=True, exist_ok=True)
    files = {speaker: out / f"{speaker}.json" for speaker in test}
    for speaker, path in files.items():
        path.write_text(json.dumps(test[speaker]))
    (out / "train.json").write_text(json.dumps(train))
    return out / "train.json", files


def train(route: str, rows: Path, demo: Path, out: Path, steps: int, seed: int) -> float:
    """Minutes that the training of a route took."""
    changed = {
        "model.audio_route": route,
        "model.init_from": str(demo / "stage1") if route == "encoder" else None,
        "data.train": str(rows),
        "training.output_dir": str(out / route),
        "training.max_steps": steps,
        "training.seed": seed,
        "training.per_device_train_batch_size": BATCH // PROCESSES,
    }
    if route != "encoder":  # Whisper writes, and what it wrote is kept
        changed |= {"features": "cached", "data.augmentation": None, "tune.audio_tower": "frozen"}
        own = {} if route == "transcript" else {"audio_projector": 3e-3}
        changed["tune.learning_rates"] = own
    begun = time.monotonic()
    path = TINY_RECIPES / "recordings.yaml"
    launch_train([str(path), *(f"{k}={json.dumps(v)}" for k, v in changed.items())], PROCESSES)
    return (time.monotonic() - begun) / 60


def measure(run: Path, tests: dict[str, Path]) -> dict[str, dict]:
    """For each speaker how many digits are right, with a 95 % interval."""
    model, processor = load_run(run, merge=True)
    told = {}
    for speaker, path in sorted(tests.items()):
        items = load_items(path, speaker)
        prompts = [item.prompt for item in items]
        said = answers.answer(model, processor, prompts, ROOM, BATCH, f"{run.name}, {speaker}")
        told[speaker] = _counted(items, said)
    return told


def _counted(items: list[Item], said: list[str]) -> dict:
    right = sum(item.reference == text for item, text in zip(items, said, strict=True))
    low, high = wilson(right, len(items))
    return {"value": right / len(items), "low": low, "high": high, "n": len(items)}


def table(routes: dict[str, dict], unheard: str) -> str:
    """The results for people."""
    speakers = [*routes[ROUTES[0]]["speakers"]]
    titles = [f"{name}, never heard" if name == unheard else name for name in speakers]
    lines = [f"{'route':<22} {'minutes':>7}" + "".join(f"{title:>30}" for title in titles)]
    for route, told in routes.items():
        cells = [
            f"{one['value']:.1%} ({one['low']:.1%} to {one['high']:.1%})"
            for one in told["speakers"].values()
        ]
        lines.append(
            f"{route:<22} {told['minutes']:7.1f}" + "".join(f"{cell:>30}" for cell in cells)
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("demo", type=Path, help="a folder that `phi-mm demo` filled")
    parser.add_argument("recordings", type=Path, help="folder of <digit>_<speaker>_<number>.wav")
    parser.add_argument("--out", type=Path, help="of rows and runs (DEMO/recordings)")
    parser.add_argument("--unheard", default="nicolas", help="who is never heard (%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="of training (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training (%(default)s)")
    given = parser.parse_args()
    if not (given.demo / "stage1/recipe.yaml").is_file():
        parser.error(f"got {given.demo}, expected the folder of a demo: phi-mm demo")
    if not any(given.recordings.glob(f"*_{given.unheard}_*.wav")):
        parser.error(
            f"got {given.recordings}, expected <digit>_<speaker>_<number>.wav in it, some of "
            f"{given.unheard}"
        )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    out = given.out or given.demo / "recordings"
    rows, tests = write_rows(given.recordings, out, given.unheard)
    routes = {}
    for route in ROUTES:
        print(f"training {route}", file=sys.stderr, flush=True)
        minutes = train(route, rows, given.demo, out, given.steps, given.seed)
        routes[route] = {"minutes": minutes, "speakers": measure(out / route, tests)}
    print(table(routes, given.unheard))
    print(json.dumps({"unheard": given.unheard, "routes": routes}))


if __name__ == "__main__":
    main()
