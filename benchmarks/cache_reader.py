"""How quick the reader of the cache is, checksums included, beside raw reads of the same file."""

import os
import statistics
import time
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm

from phi_mm.features.storage import Storage
from phi_mm.features.store import FeatureStore, checksum
from phi_mm.features.writer import ShardWriter

BLOCK = 1 << 20  # bytes of one raw read
THREADS = 4
HEATS = ("cold", "warm")
GIGABYTE = 1e9
# name, rows, width, storage
STORED = (
    ("CLIP-L/336", 576, 1024, "float16"),
    ("CLIP-L/336", 576, 1024, "int8"),
    ("CLIP-B/32", 49, 768, "float16"),
    ("Whisper-base, 10 s", 500, 512, "float16"),
)


def reader(
    name: str, rows: int, width: int, storage: str, size: int, rounds: int, folder: Path
) -> dict:
    """Records of one shape: in the order in which they lie, shuffled, and shuffled by threads.

    Args:
        name, rows, width, storage: as in `STORED`.
        size: bytes of all records.
        rounds: of which the median is told.
        folder: on the disk that is measured.
    """
    store = FeatureStore(folder / f"{rows}x{width}-{storage}", {}, Storage(storage, torch.float16))
    count = max(size // store.storage.size(rows, width), 2)
    generator = torch.Generator().manual_seed(0)
    some = [torch.randn(rows, width, generator=generator).half() for _ in range(8)]
    keys = [f"{number:032x}" for number in range(count)]
    with ShardWriter(store) as writer:
        for start in range(0, count, 64):
            writer.append((key, some[int(key, 16) % 8]) for key in keys[start : start + 64])
    data = store.path(0, "bin")
    shuffled = [keys[i] for i in torch.randperm(count, generator=generator).tolist()]
    ways = {
        "raw": lambda: _read_raw(data),
        "in order": lambda: _read_all(store, keys),
        "shuffled": lambda: _read_all(store, shuffled),
        "threads": lambda: _read_by_threads(store, shuffled),
    }
    before = psutil.Process().memory_info().rss
    took = _cold_and_warm(ways, data, rounds, f"reader: {name} {storage}")
    grown = psutil.Process().memory_info().rss - before
    told = {"records": name, "storage": storage, "count": count, "bytes": data.stat().st_size}
    told |= {"resident_grew_mb": round(grown / 1e6, 1), "index_bytes": _index_bytes(store)}
    disk = took["cold"].pop("raw")
    told["disk_gb_per_second"] = told["bytes"] / disk / GIGABYTE
    told["memory_gb_per_second"] = told["bytes"] / took["warm"].pop("raw") / GIGABYTE
    for heat, seconds in took.items():
        told[heat] = {
            way: {"rows_per_second": count / s, "speed_ratio": disk / s}
            for way, s in seconds.items()
        }
    return told


def reader_table(rows: list[dict]) -> list[str]:
    """The results for people."""
    lines = [
        f"{'reader':<20}{'kept as':<9}{'records':>8} | {'raw reads, GB/s':^15} | page  | rows/s, "
        "and speed of the disk's raw read = 1",
        f"{'':>37} | {'disk':>7} {'memory':>7} | cache | {'in order':^16} | {'shuffled':^16} | "
        f"{f'{THREADS} threads':^16}",
    ]
    for row in rows:
        raw = f"{row['disk_gb_per_second']:7.2f} {row['memory_gb_per_second']:7.2f}"
        for heat in HEATS:
            ways = " | ".join(
                f"{way['rows_per_second']:9,.0f} {way['speed_ratio']:6.2f}"
                for way in row[heat].values()
            )
            lines.append(
                f"{row['records']:<20}{row['storage']:<9}{row['count']:>8,} | {raw} | {heat:<5} | "
                f"{ways}"
            )
    grown = max(row["resident_grew_mb"] for row in rows)
    lines.append(
        f"resident memory grew by {grown} MB at most; the index takes {rows[-1]['index_bytes']} "
        "bytes a record"
    )
    return lines


def checksums() -> dict[str, float]:
    """Milliseconds for a record of CLIP-L/336 (1.18 MB): ours, and zlib's CRC-32."""
    shape = (576, 1024)
    raw = np.random.default_rng(0).integers(0, 256, 2 * shape[0] * shape[1], dtype=np.uint8)
    ways = {"xxh3": lambda: checksum("", shape, raw), "crc32": lambda: zlib.crc32(raw)}
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(51):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            took[name].append(1000 * (time.perf_counter() - begun))
    return {name: statistics.median(each) for name, each in took.items()}


def _index_bytes(store: FeatureStore) -> int:
    """What an opened store takes in memory for each record."""
    tracemalloc.start()
    opened = FeatureStore(store.folder, {}, store.storage)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return round(taken / len(opened))


def _cold_and_warm(
    ways: dict[str, Callable[[], object]], data: Path, rounds: int, what: str
) -> dict[str, dict[str, float]]:
    """Median seconds of each way, with the page cache emptied of the file before it, and filled.

    Each round begins with another way: the host of a virtual disk remembers what was read last.
    """
    took: dict[str, dict[str, list[float]]] = {heat: {way: [] for way in ways} for heat in HEATS}
    names = list(ways)
    for number in tqdm(range(rounds), what):
        first = number % len(names)
        for heat in HEATS:
            for name in names[first:] + names[:first]:
                if heat == "cold":
                    _empty_page_cache(data)
                begun = time.perf_counter()
                ways[name]()
                took[heat][name].append(time.perf_counter() - begun)
    return {
        heat: {name: statistics.median(seconds) for name, seconds in each.items()}
        for heat, each in took.items()
    }


def _empty_page_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_raw(path: Path) -> None:
    block = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def _read_all(store: FeatureStore, keys: list[str]) -> None:
    for key in keys:
        store[key]


def _read_by_threads(store: FeatureStore, keys: list[str]) -> None:
    """As the workers of a data loader read, side by side."""
    with ThreadPoolExecutor(THREADS) as threads:
        for _ in threads.map(lambda key: len(store[key]), keys):
            pass
