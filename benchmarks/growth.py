"""How a training step grows with what it is given, and how a run's start grows with its data.

    python benchmarks/growth.py

Time and peak memory of a step (phi-mm with LoRA, the small size of `train_step_models.py`) against
sequence length, pictures in a row, and processes; then time and memory of a start (mixture,
sampler, loader, up to the first batch) against rows in the data set. Nothing is trained on those
rows: their pictures do not exist, and cached features stand in. Tables come on stdout, and one line
of JSON last.
"""

import argparse
import json
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from instruct_rows import INSTRUCT, make_rows, spare_words, word_processor
from measuring import MEGABYTE, Worker, peak_of, resident, seconds_of
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from train_step_models import IMAGE_TOKEN, SIZES, Size, Way, build

from phi_mm.datasets import mixture
from phi_mm.training.sampler import LengthGroupedSampler, PackingSampler, row_lengths
from processing import PhiMMCollator

OURS = Way("phi-mm", ours=True)
ANSWER = 100  # supervised tokens of a row
CPU = torch.device("cpu")
BATCH, PACKED = 8, 8192  # rows of a padded batch, tokens of a packed one
ROWS = (1000, 10_000, 100_000, 1_000_000)
LOADERS = 2  # processes that collate
MEASURES = {"seconds": seconds_of, "peak_mb": peak_of}


def make_batch(size: Size, rows: int, length: int, images: int) -> dict[str, torch.Tensor]:
    """Rows of `length` tokens, each with so many pictures, all of them noise."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, size.vocabulary, (rows, length), generator=generator)
    ids[:, : images * size.patches] = IMAGE_TOKEN
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if images:
        shape = (rows * images, 3, size.side, size.side)
        batch["pixel_values"] = torch.randn(shape, generator=generator)
    return batch


class Steps:
    """A model in a process of its own that runs whatever step it is told.

    Args:
        rank, world: of this process, one of several that train together.
        port: where they meet.
    """

    def __init__(self, size: Size, rank: int = 0, world: int = 1, port: int = 0):
        self.size, self.world, self.rank, self.port = size, world, rank, port
        self.model = build(OURS, size, 2, False, True, CPU)

    def join(self) -> None:
        """Meets the others; returns when all are there."""
        torch.set_num_threads(max(1, torch.get_num_threads() // self.world))
        address = f"tcp://127.0.0.1:{self.port}"
        distributed.init_process_group(
            "gloo", init_method=address, rank=self.rank, world_size=self.world
        )
        self.model = DistributedDataParallel(self.model)

    def step(self, measure: str, rows: int, length: int, images: int) -> float:
        """A forward and a backward pass over this process's share of `rows`.

        Args:
            measure: `seconds`, or megabytes of `peak_mb`.
        """
        batch = make_batch(self.size, rows // self.world, length, images)

        def whole() -> None:
            self.model(**batch).loss.backward()
            self.model.zero_grad()

        return MEASURES[measure](whole, CPU)


def grow(size: Size, cases: Sequence[tuple[int, int]], rounds: int) -> list[dict]:
    """A step of one row for each (length, pictures), turn about."""
    worker = Worker(Steps, size)
    worker.call("step", "seconds", 1, *cases[0])  # what comes first is slower
    told = [
        {"tokens": length, "pictures": images}
        | {"peak_mb": worker.call("step", "peak_mb", 1, length, images)}
        for length, images in cases
    ]
    taken: list[list[float]] = [[] for _ in cases]
    for number in range(rounds):
        for case, seconds in zip(cases, taken, strict=True):
            _tell(f"round {number + 1}: {case[0]} tokens, {case[1]} pictures")
            seconds.append(worker.call("step", "seconds", 1, *case))
    worker.close()
    for row, seconds in zip(told, taken, strict=True):
        row["seconds"] = statistics.median(seconds)
    return told


def spread(size: Size, rows: int, length: int, rounds: int) -> list[dict]:
    """The same rows in one process and in two, which share the cores."""
    told = []
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        workers = [Worker(Steps, size, rank, world, port) for rank in range(world)]
        _all(workers, "join")
        peak = max(_all(workers, "step", "peak_mb", rows, length, 1))
        taken = []
        for number in range(rounds):
            _tell(f"round {number + 1}: {world} processes")
            taken.append(max(_all(workers, "step", "seconds", rows, length, 1)))
        for worker in workers:
            worker.close()
        told.append({"processes": world, "rows": rows, "peak_mb": peak})
        told[-1]["seconds"] = statistics.median(taken)
    return told


def _all(workers: list[Worker], method: str, *args: Any) -> list:
    for worker in workers:
        worker.ask(method, *args)
    return [worker.answer() for worker in workers]


class NoiseFeatures:
    """The same cached features for every picture."""

    def __init__(self, size: Size):
        self.features = torch.zeros(size.patches, size.vision_width)

    def image(self, source: str) -> torch.Tensor:
        return self.features


def start(size: Size, folder: Path) -> dict[str, float]:
    """The start of a run up to its first batch: seconds of each part, the peak of memory, and what
    is held when training begins.

    Args:
        folder: holds the rows, and the cache of `datasets`.
    """
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    datasets.disable_progress_bars()
    processor = word_processor(size.vocabulary, size.side, size.patches)
    collator = PhiMMCollator(processor, NoiseFeatures(size))
    taken, held = {}, resident("RssAnon")

    def timed(name: str, part: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = part()
        taken[name] = time.perf_counter() - begun
        return result

    def whole() -> None:
        sources = [{"path": str(folder / "rows.json")}]
        timed("read", lambda: mixture(sources, seed=0))
        rows = timed("again", lambda: mixture(sources, seed=0))
        lengths = timed("lengths", lambda: row_lengths(rows, processor))
        packed = timed("packing", lambda: PackingSampler(lengths, PACKED, seed=0))
        sampler = timed("grouping", lambda: LengthGroupedSampler(lengths, BATCH, seed=0))
        timed("order", lambda: (next(iter(packed)), next(iter(sampler))))
        batches = iter(
            DataLoader(rows, BATCH, sampler=sampler, collate_fn=collator, num_workers=LOADERS)
        )
        timed("first_batch", lambda: next(batches))
        taken["held_mb"] = (resident("RssAnon") - held) / MEGABYTE
        children = psutil.Process().children()
        taken["loaders_mb"] = sum(child.memory_full_info().uss for child in children) / MEGABYTE

    taken["peak_mb"] = peak_of(whole, CPU)
    return taken


def starts(size: Size, counts: Sequence[int]) -> list[dict]:
    """A start with each number of rows, in a process of its own."""
    told = []
    for count in counts:
        _tell(f"{count} rows")
        with (
            tempfile.TemporaryDirectory() as scratch,
            ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool,
        ):
            write_index(Path(scratch) / "rows.json", size, count)
            told.append({"rows": count, **pool.submit(start, size, Path(scratch)).result()})
    return told


def write_index(path: Path, size: Size, count: int) -> None:
    with open(path, "w") as file:
        for number, line in enumerate(index(size, count)):
            file.write(("[" if number == 0 else ",\n") + line)
        file.write("]")


def index(size: Size, count: int) -> Iterator[str]:
    """Lines of LLaVA's JSON, with pictures that are only names."""
    patterns = make_rows(INSTRUCT, ["<image>"] * min(count, 1000), spare_words(size.vocabulary), 0)
    rng = random.Random(0)
    for number in range(count):
        turns = []
        for message in rng.choice(patterns)["messages"]:
            words = "\n".join(part.get("image", "") or part["text"] for part in message["content"])
            who = "human" if message["role"] == "user" else "gpt"
            turns.append({"from": who, "value": words})
        yield json.dumps(
            {"id": f"{number:012}", "image": f"{number:012}.jpg", "conversations": turns}
        )


def show(title: str, rows: list[dict]) -> None:
    """A table for people."""
    print(f"\n{title}")
    print(*(f"{name:>12}" for name in rows[0]))
    for row in rows:
        print(
            *(
                f"{value:12.2f}" if isinstance(value, float) else f"{value:12}"
                for value in row.values()
            )
        )


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each case (%(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of a data set")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs")
    given = parser.parse_args()
    size = SIZES["toy" if given.quick else "small"]
    rounds = 1 if given.quick else given.rounds
    lengths = (256, 512) if given.quick else (768, 1024, 2048, 4096)
    images = (0, 1, 2) if given.quick else (0, 1, 2, 4)
    counts = (100, 1000) if given.quick else given.rows
    row = size.patches + 2 * ANSWER
    result = {
        "sequence_length": grow(size, [(length, 1) for length in lengths], rounds),
        "pictures": grow(size, [(n * size.patches + 2 * ANSWER, n) for n in images], rounds),
        "processes": spread(size, 4, row, rounds),
        "rows": starts(size, counts),
    }
    show("a step of one row against its length", result["sequence_length"])
    show("a step of one row against its pictures", result["pictures"])
    show("a step of several rows against processes", result["processes"])
    show("a start against rows in the data set", result["rows"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
