"""Writes the multimodal training world: pictures, recordings and conversations about them.

phi-mm tiny world DIR --seed 0
"""

import hashlib
import json
import logging
import multiprocessing
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from phi_mm.files import write_whole
from phi_mm.tiny import exams, lessons
from phi_mm.tiny.lessons import Item, Recording, about, as_row, asked_about, repetition

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STAGE1_REPETITIONS = 3  # recordings in a row to be written down
STAGE2_REPETITIONS = 2
STAGE2_SHARE = 0.2  # of all recordings that stage 2 has written down again
LISTENED_SHARE = 0.3  # of all recordings that typed questions are asked about
MIXED = 40  # rows of each task in the small mix for the validation loss
CHUNK = 16  # items handed to a worker at a time


def write_world(
    out: Path,
    seed: int,
    images: int = 5000,
    speeches: int = 1200,
    sentences: int = 500,
    texts: int = 1000,
    validation: int = 200,
    test: int = 400,
    workers: int = 2,
) -> dict[str, int]:
    """Write the world into `out`, or keep the one that the same arguments and code wrote there.

    `stage1.json` (pictures with several typed turns; spoken conversations; recordings to be written
    down), `stage2.json` (typed, spoken and mixed conversations about the same pictures; spoken and
    plain text ones; recordings), `listening.json` (typed questions about recordings, which the demo
    leaves out), `validation.json` (a small mix for the validation loss), and one file for each task
    of `exams.TASKS` in `val/` and `test/`, in the form of LLaVA-Instruct-150K; media in `images/`
    (48x48 PNG) and `audio/` (16 kHz FLAC).

    Args:
        images: training pictures; every four carry four recorded questions.
        speeches: spoken conversations without a picture (two recordings each on average).
        sentences: recordings that are only to be written down.
        texts: conversations in text alone.
        validation, test: questions of each task; a multiple of 40 balances their kinds.
        workers: processes; they do not change the result.

    Returns:
        Rows by file, "stage1.json" and so on.

    Raises:
        ValueError: for an amount below 1.
    """
    amounts = {"images": images, "speeches": speeches, "sentences": sentences, "texts": texts,
               "validation": validation, "test": test}  # fmt: skip
    for name, amount in amounts.items():
        if amount < 1:
            raise ValueError(f"got {name}={amount}, expected at least 1")
    out = Path(out)
    made_by = {"seed": seed, **amounts, "code": _code()}
    counts = _already_written(out, made_by)
    if counts is not None:
        logger.info("keeping the world in %s", out)
        return counts
    (out / MANIFEST).unlink(missing_ok=True)
    for folder in ("images", "audio", "val", "test"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    made = _make(_items(out, seed, amounts), workers)
    files = _files(made, seed)
    for name, rows in files.items():
        _write(out / name, rows)
    counts = {name: len(rows) for name, rows in files.items()}
    # Last, so that only a whole world has one.
    write_whole(out / MANIFEST, json.dumps({"made_by": made_by, "rows": counts}, indent=1))
    return counts


def _code() -> str:
    """The fingerprint of the code that shapes the world."""
    folder = Path(__file__).parent
    names = ("rows", "lessons", "exams", "language", "questions", "facts", "wordings", "scenes",
             "drawing", "speech", "listening")  # fmt: skip
    return hashlib.sha256(b"".join((folder / f"{n}.py").read_bytes() for n in names)).hexdigest()


def _already_written(out: Path, made_by: dict) -> dict[str, int] | None:
    if not (out / MANIFEST).exists():
        return None
    manifest = json.loads((out / MANIFEST).read_text())
    return manifest["rows"] if manifest["made_by"] == made_by else None


def _items(out: Path, seed: int, amounts: dict[str, int]) -> list[Item]:
    kinds = {"images": "picture", "speeches": "speech", "sentences": "sentence", "texts": "text"}
    wanted = [("train", kind, amounts[name]) for name, kind in kinds.items()]
    for split in ("validation", "test"):
        wanted += [(split, kind, amounts[split]) for kind in ("picture", "talk", "sentence")]
    return [
        Item(out, seed, split, kind, number)
        for split, kind, amount in wanted
        for number in range(amount)
    ]


def _make(items: list[Item], workers: int) -> list[tuple[Item, Any]]:
    # Spawned, not forked: the caller may have threads (torch) that a fork would break.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        results = pool.imap(_work, items, chunksize=CHUNK)
        bar = tqdm(results, total=len(items), desc="writing the world", unit="item")
        return list(zip(items, bar, strict=True))


def _work(item: Item) -> Any:
    if item.split == "train":
        makers = {"picture": lessons.picture, "speech": lessons.speech, "text": lessons.text,
                  "sentence": lessons.recorded_sentence}  # fmt: skip
    else:
        makers = {"picture": exams.picture, "talk": exams.talk, "sentence": exams.sentence}
    return makers[item.kind](item)


def _files(made: list[tuple[Item, Any]], seed: int) -> dict[str, list[dict]]:
    """Sort the rows into files, and pair the recordings up to be written down."""
    files: dict[str, list[dict]] = defaultdict(list)
    recordings: list[Recording] = []
    for item, result in made:
        if item.split != "train":
            folder = "val" if item.split == "validation" else "test"
            for row in result:
                files[f"{folder}/{row['task']}.json"].append(_one_folder_down(row))
        elif item.kind == "picture":
            stage1, stage2, said = result
            files["stage1.json"].append(stage1)
            files["stage2.json"].append(stage2)
            recordings += said
        elif item.kind == "speech":
            row, said = result
            files["stage1.json"].append(row)
            files["stage2.json"].append(row)
            recordings += said
        elif item.kind == "sentence":
            recordings.append(result)
        else:
            files["stage2.json"].append(result)
    rng = random.Random(f"{seed} repetitions")
    some = rng.sample(recordings, round(STAGE2_SHARE * len(recordings)))
    files["stage1.json"] += _repetitions(recordings, STAGE1_REPETITIONS, rng)
    files["stage2.json"] += _repetitions(some, STAGE2_REPETITIONS, rng)
    files["listening.json"] = _listened(recordings, random.Random(f"{seed} listening"))
    for task in (task for task in exams.TASKS if task != "listening"):
        files["validation.json"] += [_folder_up(r) for r in files[f"val/{task}.json"][:MIXED]]
    return dict(files)


def _repetitions(recordings: list[Recording], at_once: int, rng: random.Random) -> list[dict]:
    """Rows in which several recordings are written down, one a turn."""
    shuffled = rng.sample(recordings, len(recordings))
    groups = [shuffled[i : i + at_once] for i in range(0, len(shuffled), at_once)]
    return [
        as_row(f"train_repetition_{number:05d}", [repetition(r, rng) for r in group],
               recordings=group)
        for number, group in enumerate(groups)
    ]  # fmt: skip


def _listened(recordings: list[Recording], rng: random.Random) -> list[dict]:
    """Rows with a typed question about some of the recordings."""
    some = rng.sample(recordings, round(LISTENED_SHARE * len(recordings)))
    return [
        as_row(f"train_listened_{number:05d}",
               [asked_about(r, about(r, rng, "train", number))], recordings=[r])
        for number, r in enumerate(some)
    ]  # fmt: skip


def _one_folder_down(row: dict) -> dict:
    """Media paths start from the folder of the file that names them."""
    return {k: f"../{v}" if k in ("image", "audio") else v for k, v in row.items()}


def _folder_up(row: dict) -> dict:
    return {k: v[len("../") :] if k in ("image", "audio") else v for k, v in row.items()}


def _write(path: Path, rows: list[dict]) -> None:
    """A json list with one row a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
