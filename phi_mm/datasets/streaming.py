"""Sources that are read while training goes on, for data sets that no disk shall hold."""

import io
import json
import logging
import random
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from phi_mm.datasets.conversations import Medium, PlaceholderError, to_messages
from phi_mm.datasets.examination import TokenCounter
from phi_mm.datasets.faults import Fault, Kind
from phi_mm.datasets.mixture import check_source, draw, good_rows, policy
from phi_mm.datasets.rows import media_folder
from processing import PhiMMProcessor

logger = logging.getLogger(__name__)

BUFFER = 1000  # rows among which a stream is shuffled
AT_ONCE = 16
ROUND = "round"  # key of a streamed row: how often its source has ended before
ENOUGH = 1000  # rows that a share of bad ones is taken of at least
BROKEN = (ValueError, OSError, Image.DecompressionBombError)


class Stream(torch.utils.data.IterableDataset):
    """Rows of several sources without end, some of which are streamed.

    `weight` is how often a row is drawn from a source beside the others; a source that ends begins
    anew, in another order. A streamed source's pictures and recordings are opened as their row
    comes, so that a bad one is found before it is in a batch.

    Args:
        sources: as `mixture` takes them; with `streaming: true`, `limit` is the first rows.
        seed: of draws and order.
        processor, max_length: as the collator takes them.

    Raises:
        ValueError: for a source that cannot be streamed; while iterating, for more bad rows than
            its policy allows.
    """

    def __init__(
        self, sources: list[dict], seed: int, processor: PhiMMProcessor, max_length: int | None
    ):
        for source in sources:
            check_source(source)
        self.seed = seed
        self.counter = TokenCounter(processor, {}, max_length)
        self.streamed = [source for source in sources if source.get("streaming")]
        self.raw = [_open(source) for source in self.streamed]
        rest = [source for source in sources if not source.get("streaming")]
        drawn = draw(rest, seed) if rest else []
        self.kept = [good_rows(found, processor, max_length) for found in drawn]
        self.weights = [source.get("weight") or 1 for source in [*self.streamed, *rest]]

    def __iter__(self) -> Iterator[dict]:
        """`{id, messages, round}`; each of a data loader's workers gives a part of the rows."""
        worker = get_worker_info()
        mine, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        rng = random.Random(f"{self.seed} {mine}")
        feeds = [self._stream(number, mine, workers) for number in range(len(self.streamed))]
        feeds += [self._again_and_again(rows, mine, workers) for rows in self.kept]
        while True:
            yield next(rng.choices(feeds, self.weights)[0])

    def _again_and_again(self, rows: datasets.Dataset, mine: int, workers: int) -> Iterator[dict]:
        for epoch in count():
            order = rows.shuffle(seed=self.seed + epoch)
            for row in order.select(range(mine % len(order), len(order), workers)):
                yield {**row, ROUND: epoch}

    def _stream(self, number: int, mine: int, workers: int) -> Iterator[dict]:
        source, path = self.streamed[number], self.streamed[number]["path"]
        rule, bad, seen = policy(source), [], 0
        for epoch in count():
            good = 0
            for row in _part(self.raw[number], self.seed + epoch, mine, workers):
                seen += 1
                name = str(seen if row.get("id") is None else row["id"])
                try:
                    opened = self._opened(row, name, source)
                except _BadRow as error:
                    bad.append(error.fault)
                    if len(bad) > rule.allowed(max(seen, ENOUGH)):
                        rule.check(bad, max(seen, ENOUGH), path)
                    logger.warning("skipped a row of %s: %s", path, error)
                else:
                    good += 1
                    yield {**opened, ROUND: epoch}
            if not good:
                raise ValueError(f"got no row from the stream {path}, expected at least {workers}")

    def _opened(self, row: dict, name: str, source: dict) -> dict:
        """The row as messages with opened media. Raises _BadRow."""
        root = Path(media_folder(Path(source["path"]), source.get("media_root")))
        kind = Kind.FORM
        try:
            messages = to_messages(row, lambda medium: medium)
            kind = Kind.CORRUPT
            for part in (part for message in messages for part in message["content"]):
                if part["type"] != "text":
                    part[part["type"]] = self._open_medium(part["type"], part[part["type"]], root)
        except PlaceholderError as error:
            raise _BadRow(Fault(Kind.PLACEHOLDERS, f"row {name}: {error}")) from error
        except BROKEN as error:
            raise _BadRow(Fault(kind, f"row {name}: {error}")) from error
        opened = {"id": name, "messages": messages}
        refused = self.counter.refusal(opened, self.counter.lengths([messages])[0])
        if refused:
            raise _BadRow(refused)
        return opened

    def _open_medium(self, kind: str, medium: Medium, root: Path) -> Any:
        processor, held = self.counter.processor, medium["bytes"]
        if held is None:
            path = str(root / medium["path"])
            return processor.load_image(path) if kind == "image" else processor.load_audio(path)
        if kind == "image":
            return processor.load_image(Image.open(io.BytesIO(held)))
        return processor.load_audio(held)


class _BadRow(Exception):
    """Carries what is wrong with a streamed row."""

    def __init__(self, fault: Fault):
        super().__init__(fault.text)
        self.fault = fault


def _open(source: dict) -> datasets.IterableDataset:
    """Raw rows, their media as `{bytes, path}`."""
    path = Path(source["path"])
    if path.suffix in (".jsonl", ".parquet") and not path.is_file():
        raise ValueError(f"got {path}, expected an existing file: check the path")
    if path.suffix == ".jsonl":
        rows = datasets.IterableDataset.from_generator(_lines, gen_kwargs={"path": path})
    elif path.suffix == ".parquet":
        files = {"data_files": str(path), "split": "train"}
        rows = datasets.load_dataset("parquet", **files, streaming=True).decode(False)
    else:
        split = source.get("split") or "train"
        rows = datasets.load_dataset(
            str(path), source.get("config"), split=split, streaming=True
        ).decode(False)
    return rows if source.get("limit") is None else rows.take(source["limit"])


def _part(
    rows: datasets.IterableDataset, seed: int, mine: int, workers: int
) -> Iterator[dict[str, Any]]:
    """A worker's rows, shuffled: its own files where there are enough, else every so many row."""
    if rows.num_shards >= workers:
        rows, mine, workers = rows.shard(num_shards=workers, index=mine), 0, 1
    shuffled = rows.shuffle(seed=seed, buffer_size=BUFFER)
    # `iter` in batches leaves the rows to us: iterating by row would part them among the workers.
    batches = shuffled.iter(batch_size=AT_ONCE)
    one_by_one = (
        dict(zip(batch, values, strict=True))
        for batch in batches
        for values in zip(*batch.values(), strict=True)
    )
    return islice(one_by_one, mine, None, workers)


def _lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)
