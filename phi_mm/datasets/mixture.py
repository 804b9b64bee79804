"""Several data sets -> one, shuffled, each with its weight."""

import math
import random

import datasets

from phi_mm.datasets.rows import load_rows

OPTIONS = ("path", "media_root", "config", "split", "on_bad_row", "limit", "weight")


def mixture(sources: list[dict], seed: int) -> datasets.Dataset:
    """Concatenate the sources by weight and shuffle the whole.

    Counts are exact, unlike `datasets.interleave_datasets` with probabilities, which stops early or
    repeats small sources unasked: a weight of 1 gives each row once, 2.5 gives each twice and a
    random half a third time, 0.1 gives a random tenth.

    Args:
        sources: each `{"path": ..., "limit": n, "weight": w}` plus what `load_rows` takes. `limit`
            draws at most n rows at random, before the weight.
        seed: of the draws and of the shuffle.

    Returns:
        Columns `id`, `messages`, `length`.

    Raises:
        ValueError: for no sources, an unknown option, or a limit or weight that gives no row.
    """
    if not sources:
        raise ValueError("got no data sources, expected at least one {path: ...}")
    for source in sources:
        _check(source)
    chosen = [_weigh(source, random.Random(f"{seed} {n}")) for n, source in enumerate(sources)]
    return datasets.concatenate_datasets(chosen).shuffle(seed=seed)


def _check(source: dict) -> None:
    unknown = [name for name in source if name not in OPTIONS]
    if unknown or "path" not in source:
        raise ValueError(f"got the data source {source}, expected path and any of {OPTIONS[1:]}")
    for name in ("limit", "weight"):
        value = source.get(name)
        if value is not None and value <= 0:
            raise ValueError(f"got {name}={value} for {source['path']}, expected more than 0")


def _weigh(source: dict, rng: random.Random) -> datasets.Dataset:
    options = {k: v for k, v in source.items() if k not in ("path", "limit", "weight")}
    rows = load_rows(source["path"], **options)
    indices = list(range(len(rows)))
    limit = source.get("limit")
    if limit is not None and limit < len(indices):
        indices = sorted(rng.sample(indices, limit))
    weight = source.get("weight") or 1
    repeats, rest = math.floor(weight), round((weight - math.floor(weight)) * len(indices))
    indices = indices * repeats + sorted(rng.sample(indices, rest))
    if not indices:
        raise ValueError(f"got {source}, which gives no row: raise its weight or limit")
    # Fields beyond these differ between sources and are nothing to train on.
    return rows.select_columns(["id", "messages", "length"]).select(indices)
