"""A folder of tensors by key: append-only, memory-mapped for reading, safe to kill while writing.

    <folder>/fingerprint.json   what the tensors were made with
    <folder>/features.bin       the tensors' bytes, one after another
    <folder>/index.jsonl        one line per tensor: key, byte offset, shape

A record counts once its index line is whole, and its line is written after its bytes are on disk.
What a killed writer left behind that point is cut off by the next one.
"""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phi_mm.files import write_whole


class FeatureStore:
    """Tensors (rows, width) of one dtype, found by a string key.

    Args:
        folder: made when missing.
        fingerprint: JSON-like facts that decide the tensors' content. They are stored with the
            first use, and every later use must agree.
        dtype: dtype of the tensors, kept bit by bit so that a cached run equals a live one.

    Raises:
        ValueError: the folder was written under another fingerprint; names each part that differs.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], dtype: torch.dtype):
        self.folder, self.dtype = folder, dtype
        self._width = torch.empty((), dtype=dtype).element_size()
        self._index: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._bytes: np.memmap | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._check_fingerprint(fingerprint)
        self._read_index()

    def __getstate__(self) -> dict[str, Any]:
        """Workers map the file themselves: a pickled memory map would carry its content."""
        return self.__dict__ | {"_bytes": None}

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def __getitem__(self, key: str) -> torch.Tensor:
        """The tensor of `key`, copied out of the memory map. Raises KeyError when absent."""
        offset, shape = self._index[key]
        size = int(np.prod(shape)) * self._width
        if self._bytes is None or len(self._bytes) < offset + size:
            self._bytes = np.memmap(self.folder / "features.bin", mode="r")
        raw = torch.from_numpy(self._bytes[offset : offset + size].copy())
        return raw.view(self.dtype).view(shape)

    def append(self, records: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write new records; keys that are there already are passed over, also within `records`.

        Raises:
            ValueError: a tensor of another dtype.
            BlockingIOError: another process is writing this folder.
        """
        with (
            open(self.folder / "features.bin", "ab") as data,
            open(self.folder / "index.jsonl", "a", encoding="utf-8") as index,
        ):
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._cut_torn_tail(data, index)
            lines = []
            for key, tensor in records:
                if key in self._index:
                    continue
                if tensor.dtype != self.dtype:
                    raise ValueError(f"got features of {tensor.dtype}, expected {self.dtype}")
                offset, shape = data.tell(), tuple(tensor.shape)
                raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                data.write(raw.numpy())
                self._index[key] = (offset, shape)
                lines.append(json.dumps({"key": key, "offset": offset, "shape": shape}) + "\n")
            data.flush()
            os.fsync(data.fileno())
            index.write("".join(lines))
            index.flush()
            os.fsync(index.fileno())

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

    def _read_index(self) -> None:
        path = self.folder / "index.jsonl"
        if not path.is_file():
            return
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):  # a torn last line has none
                record = json.loads(line)
                self._index[record["key"]] = (record["offset"], tuple(record["shape"]))

    def _cut_torn_tail(self, data: Any, index: Any) -> None:
        """Bring both files back to the last whole record."""
        text = (self.folder / "index.jsonl").read_bytes()
        index.truncate(text.rfind(b"\n") + 1)
        records = self._index.values()
        ends = (offset + int(np.prod(shape)) * self._width for offset, shape in records)
        data.truncate(max(ends, default=0))
        data.seek(0, os.SEEK_END)
