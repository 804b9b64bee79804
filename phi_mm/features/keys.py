"""What a picture or recording holds, as a key: two files with the same bytes have the same one."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from phi_mm.files import write_whole

EXIF_ORIENTATION = 0x0112
READERS = 8  # threads: a file is waited for longer than it is hashed
BAR_AFTER = 2  # seconds


class FileKeys:
    """Content keys of files, remembered by path, size and time of the last change.

    Reading 81,000 pictures again at each start would take minutes; asking for their sizes and times
    takes seconds. A file whose size and time stay the same counts as unchanged, as make has it.

    Args:
        path: JSON file that holds what is known; written as a whole.
    """

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[str, list] = {}  # path: size, time, key
        if path.is_file():
            self._known = json.loads(path.read_text(encoding="utf-8"))
        self._met: dict[str, str] = {}  # looked up by this process: neither read nor asked again

    def __getitem__(self, path: str) -> str:
        """The key of one file, which is read when nothing is known of it."""
        if path not in self._met:
            self._met[path] = self._look(path)[1][2]
        return self._met[path]

    def learn(self, paths: Iterable[str]) -> None:
        """Look up many files, every process its share, and write down what was new.

        Raises:
            ValueError: a file is not there.
        """
        state = PartialState()
        paths = [path for path in dict.fromkeys(paths) if path not in self._met]
        own = paths[state.process_index :: state.num_processes]
        with ThreadPoolExecutor(READERS) as readers:
            looks = readers.map(self._look, own)
            hidden = not state.is_main_process
            found = list(tqdm(looks, "contents", len(own), delay=BAR_AFTER, disable=hidden))
        found = dict(gather_object(found))
        self._met |= {path: facts[2] for path, facts in found.items()}
        news = any(self._known.get(path) != facts for path, facts in found.items())
        if news and state.is_main_process:
            write_whole(self.path, json.dumps(self._known | found))
        self._known |= found

    def _look(self, path: str) -> tuple[str, list]:
        facts = os.stat(path) if os.path.exists(path) else None
        known = self._known.get(path)
        if facts and known and known[:2] == [facts.st_size, facts.st_mtime_ns]:
            return path, known
        key = content_key(path)  # raises where there is no file
        return path, [facts.st_size, facts.st_mtime_ns, key]


def content_key(source: Any) -> str:
    """Hash of what a media item holds: a file's bytes, or an array's type, shape and values.

    Args:
        source: path, PIL image, array, tensor, (array, rate), or {"array", "sampling_rate"}.

    Raises:
        ValueError: any other type, or a file that is not there.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(source, str | Path):
        if not Path(source).is_file():
            raise ValueError(f"got {source}, expected a file: the cache reads no URLs")
        digest.update(Path(source).read_bytes())
    elif isinstance(source, Image.Image):
        facts = (source.mode, source.size, source.getexif().get(EXIF_ORIENTATION))
        colours = (source.getpalette(), source.info.get("transparency"))
        digest.update(str((facts, colours)).encode())
        digest.update(source.tobytes())
    elif isinstance(source, dict):
        return content_key((source["array"], source["sampling_rate"]))
    elif isinstance(source, tuple):
        digest.update(f"{content_key(source[0])} at {source[1]} Hz".encode())
    elif isinstance(source, np.ndarray | torch.Tensor):
        array = np.ascontiguousarray(source)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    else:
        raise ValueError(
            f"got {type(source).__name__} as a picture or recording, expected a path, PIL image, "
            "array or (array, sampling rate)"
        )
    return digest.hexdigest()
