"""Appends to one shard of a feature store."""

import fcntl
import json
import os
from collections.abc import Iterable
from typing import Any

import torch

from phi_mm.features.store import FeatureStore, Record, checksum


class ShardWriter:
    """The only writer of a shard while the `with` block lasts.

    Args:
        store: learns what is written.
        shard: number of the shard; a process takes its own.

    Raises:
        ValueError: another process is writing this shard.
    """

    def __init__(self, store: FeatureStore, shard: int = 0):
        self.store, self.shard = store, shard

    def __enter__(self) -> "ShardWriter":
        self._data = open(self.store.path(self.shard, "bin"), "ab")
        self._index = open(self.store.path(self.shard, "jsonl"), "ab")
        try:
            fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.store.read_index(self.shard)  # the last writer may have ended since
            self._cut_torn_tail()
        except BlockingIOError as error:
            self.__exit__()
            raise ValueError(
                f"another process is writing {self._data.name}: wait until it ends, or give "
                "another features_dir"
            ) from error
        return self

    def __exit__(self, *_: Any) -> None:
        self._data.close()
        self._index.close()

    def append(self, features: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write new records to disk; keys that are there already are passed over.

        Raises:
            ValueError: a tensor that the storage does not hold.
        """
        new: dict[str, Record] = {}
        for key, tensor in features:
            if key in self.store or key in new:
                continue
            raw, shape = self.store.storage.encode(tensor), tuple(tensor.shape)
            new[key] = Record(self.shard, self._data.tell(), shape, checksum(key, shape, raw))
            self._data.write(raw)
        _to_disk(self._data)
        for key, (_, offset, shape, found) in new.items():
            line = {"key": key, "offset": offset, "shape": shape, "checksum": found}
            self._index.write(json.dumps(line).encode() + b"\n")
        _to_disk(self._index)
        self.store.records |= new

    def _cut_torn_tail(self) -> None:
        """Bring both files back to the last whole record."""
        text = self.store.path(self.shard, "jsonl").read_bytes()
        self._index.truncate(text.rfind(b"\n") + 1)
        self._data.truncate(self.store.ends[self.shard])
        for file in (self._index, self._data):
            file.seek(0, os.SEEK_END)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
