"""Several data sets -> one, shuffled, each with its weight."""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import datasets

from phi_mm.datasets.examination import examine
from phi_mm.datasets.faults import BadRows
from phi_mm.datasets.rows import form_faults, read_rows
from processing import PhiMMProcessor

COLUMNS = ("id", "messages", "length", "transcripts")
READING = ("path", "media_root", "config", "split")
OPTIONS = (*READING, "on_bad_row", "skip_at_most", "limit", "weight", "streaming")


@dataclass(frozen=True)
class Drawn:
    """The rows drawn from one source, bad ones among them.

    Args:
        source: as a recipe gives it.
        rows: what `read_rows` returns, or a selection.
        rng: for the draws that are still to come.
    """

    source: dict
    rows: datasets.Dataset
    rng: random.Random


def mixture(
    sources: list[dict],
    seed: int,
    processor: PhiMMProcessor | None = None,
    max_length: int | None = None,
) -> datasets.Dataset:
    """Concatenate the sources by weight and shuffle the whole.

    Counts are exact, unlike `datasets.interleave_datasets` with probabilities, which stops early or
    repeats small sources unasked: a weight of 1 gives each row once, 2.5 gives each twice and a
    random half a third time, 0.1 gives a random tenth.

    Args:
        sources: each `{"path": ..., "limit": n, "weight": w}` plus what `read_rows` and `BadRows`
            take. `limit` draws at most n rows at random, before the weight.
        seed: of the draws and of the shuffle.
        processor, max_length: as the collator takes them. With a processor every row and file is
            examined, so that the collator meets none that it would refuse; without one, the rows'
            form alone.

    Returns:
        Columns `id`, `messages`, `length`, and `transcripts` where a source has it.

    Raises:
        ValueError: for no sources, an unknown option, a limit or weight that gives no row, or more
            bad rows than a source's policy allows.
    """
    chosen = [
        _weigh(drawn.source, good_rows(drawn, processor, max_length), drawn.rng)
        for drawn in draw(sources, seed)
    ]
    return datasets.concatenate_datasets(chosen).shuffle(seed=seed)


def draw(sources: list[dict], seed: int) -> list[Drawn]:
    """At most `limit` rows of each source, as `mixture` takes them.

    Raises:
        ValueError: for no sources or an unknown option.
    """
    if not sources:
        raise ValueError("got no data sources, expected at least one {path: ...}")
    for source in sources:
        check_source(source)
    return [_draw(source, random.Random(f"{seed} {n}")) for n, source in enumerate(sources)]


def check_source(source: dict) -> None:
    """Raises ValueError for a source with an option that `mixture` would refuse."""
    unknown = [name for name in source if name not in OPTIONS]
    if unknown or "path" not in source:
        raise ValueError(f"got the data source {source}, expected path and any of {OPTIONS[1:]}")
    for name in ("limit", "weight"):
        value = source.get(name)
        if value is not None and value <= 0:
            raise ValueError(f"got {name}={value} for {source['path']}, expected more than 0")
    if source.get("streaming") and Path(source["path"]).suffix == ".json":
        raise ValueError(
            f"got streaming for {source['path']}, expected .jsonl, parquet or a Hub id: a json "
            "list is read whole"
        )
    policy(source)


def good_rows(
    drawn: Drawn, processor: PhiMMProcessor | None, max_length: int | None
) -> datasets.Dataset:
    """The drawn rows that training can take; the other arguments and errors are `mixture`'s."""
    if processor is None:
        found = form_faults(drawn.rows)
    else:
        found = examine(drawn.rows, processor, max_length).faults
    return policy(drawn.source).leave_out(drawn.rows, found, drawn.source["path"])


def policy(source: dict) -> BadRows:
    """What is to be done about a source's bad rows."""
    return BadRows(source.get("on_bad_row") or "error", source.get("skip_at_most"))


def _draw(source: dict, rng: random.Random) -> Drawn:
    path, options = source["path"], {name: source[name] for name in READING[1:] if name in source}
    rows = read_rows(path, **options)
    limit = source.get("limit")
    if limit is not None and limit < len(rows):
        rows = rows.select(sorted(rng.sample(range(len(rows)), limit)))
    return Drawn(source, rows, rng)


def _weigh(source: dict, rows: datasets.Dataset, rng: random.Random) -> datasets.Dataset:
    indices = range(len(rows))
    weight = source.get("weight") or 1
    repeats, rest = math.floor(weight), round((weight - math.floor(weight)) * len(indices))
    indices = list(indices) * repeats + sorted(rng.sample(indices, rest))
    if not indices:
        raise ValueError(f"got {source}, which gives no row: raise its weight or limit")
    # Fields beyond these differ between sources and are nothing to train on.
    kept = [name for name in COLUMNS if name in rows.column_names]
    return rows.select_columns(kept).select(indices)
