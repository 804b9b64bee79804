"""A folder of tensors by key: append-only, safe to kill while writing.

    <folder>/fingerprint.json   what the tensors were made with
    <folder>/00000.bin          the tensors' bytes, one after another
    <folder>/00000.jsonl        one line per tensor: key, byte offset, shape, checksum

The last two are a shard. Each process writes one of its own, and all read all of them. A record
counts once its index line is whole, and its line is written after its bytes are on disk. What a
killed writer left behind that point is cut off by the next one.
"""

import json
import os
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from phi_mm.features.storage import Storage
from phi_mm.files import write_whole

LAYOUT = 2  # of the files above; features of another one are refused


class Record(NamedTuple):
    """Where a tensor is."""

    shard: int
    offset: int
    shape: tuple[int, int]
    checksum: int


class FeatureStore:
    """Tensors (rows, width) of one dtype, found by a string key.

    Args:
        folder: made when missing.
        fingerprint: JSON-like facts that decide the tensors' content. They are stored with the
            first use, and every later use must agree.
        storage: how the tensors are kept.

    Raises:
        ValueError: the folder was written under another fingerprint (names each part that differs),
            or a shard is damaged.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], storage: Storage):
        self.folder, self.storage = folder, storage
        self.records: dict[str, Record] = {}
        self.ends: dict[int, int] = {}  # of each shard: the byte behind its last record
        self._files: dict[int, FileIO] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._check_fingerprint({"layout": LAYOUT, "storage": storage.name, **fingerprint})
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        """Workers open the files themselves."""
        return self.__dict__ | {"_files": {}}

    def __len__(self) -> int:
        return len(self.records)

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def __getitem__(self, key: str) -> torch.Tensor:
        """The tensor of `key`.

        Raises:
            KeyError: there is none.
            ValueError: its bytes are not those that were written.
        """
        record = self.records[key]
        raw = self._read(record)
        if checksum(key, record.shape, raw) != record.checksum:
            place = f"byte {record.offset} of {self.path(record.shard, 'bin')}"
            raise ValueError(
                f"the record of {key} at {place} is damaged: its checksum is not the one that was "
                f"written. {self._remedy(record.shard)}"
            )
        return self.storage.decode(raw, *record.shape)

    def path(self, shard: int, ending: str) -> Path:
        """One file of a shard, which ends in `bin` or `jsonl`."""
        return self.folder / f"{shard:05d}.{ending}"

    def refresh(self) -> None:
        """Reads what other processes have written since.

        Raises:
            ValueError: a shard is shorter than its index says, or its index cannot be read.
        """
        for index in sorted(self.folder.glob("[0-9]*.jsonl")):
            self.read_index(int(index.stem))

    def read_index(self, shard: int) -> None:
        """`refresh` for one shard."""
        index, end = self.path(shard, "jsonl"), 0
        for number, line in enumerate(index.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break  # torn: its record does not count
            try:
                key, offset, (rows, width), found = json.loads(line).values()
                record = Record(shard, int(offset), (int(rows), int(width)), int(found))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"line {number} of {index} is damaged ({error}). {self._remedy(shard)}"
                ) from error
            self.records[key] = record
            end = max(end, self._end(record))
        self.ends[shard], data = end, self.path(shard, "bin")
        size = data.stat().st_size if data.is_file() else 0
        if size < end:
            raise ValueError(
                f"{data} is truncated: it holds {size:,} bytes and its index tells of {end:,}. "
                f"{self._remedy(shard)}"
            )

    def _end(self, record: Record) -> int:
        return record.offset + self.storage.size(*record.shape)

    def _read(self, record: Record) -> np.ndarray:
        """The record's bytes, out of the page cache.

        Read and not mapped: each page of a map would have to be faulted in, would count as this
        process's own memory, and would kill it where the file has lost its end.
        """
        if record.shard not in self._files:
            self._files[record.shard] = open(self.path(record.shard, "bin"), "rb", buffering=0)
        raw = np.empty(self.storage.size(*record.shape), np.uint8)
        if os.preadv(self._files[record.shard].fileno(), [raw], record.offset) < len(raw):
            raise ValueError(f"{self.path(record.shard, 'bin')} was truncated while it was read")
        return raw

    def _remedy(self, shard: int) -> str:
        both = f"{self.path(shard, 'bin').name} and {self.path(shard, 'jsonl').name}"
        return f"Delete {both} and fill the cache again: only what they held is computed anew"

    def _check_fingerprint(self, fingerprint: dict[str, Any]) -> None:
        path = self.folder / "fingerprint.json"
        wanted = json.loads(json.dumps(fingerprint))
        if not path.is_file():
            write_whole(path, json.dumps(wanted, indent=1, sort_keys=True))
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        stale = [
            f"{part}: stored {found.get(part)!r}, now {wanted.get(part)!r}"
            for part in sorted(found.keys() | wanted.keys())
            if found.get(part) != wanted.get(part)
        ]
        if stale:
            raise ValueError(
                f"the features in {self.folder} are stale; {'; '.join(stale)}. Delete the folder "
                "or give another features_dir"
            )


def checksum(key: str, shape: tuple[int, int], raw: np.ndarray) -> int:
    """XXH3 of a record, which runs as fast as memory does; it also guards the index line."""
    digest = xxhash.xxh3_64(f"{key} {shape}".encode())
    digest.update(raw)
    return digest.intdigest()
