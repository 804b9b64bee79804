"""The cache of frozen-tower outputs that the collator reads in place of pictures and recordings.

Every distinct picture or recording of a data set passes its tower once. Keys are hashes of the
content (a file's bytes, or an array's values), so two rows with the same picture share one record.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from modeling_phi_mm.media_phi_mm import MediaMixin
from phi_mm.features.keys import BAR_AFTER, FileKeys, content_key
from phi_mm.features.storage import Storage
from phi_mm.features.store import FeatureStore
from phi_mm.features.towers import encoders, fingerprint
from processing import PhiMMProcessor


class FeatureCache:
    """Tower outputs by content, as `PhiMMCollator(features=...)` looks them up.

    Args:
        folder: holds a store for each tower, and what is known of the files.
        stores: under `image` and `audio`, as far as there are towers.
    """

    def __init__(self, folder: Path, stores: dict[str, FeatureStore]):
        self.folder, self.stores = folder, stores
        self.files = FileKeys(folder / "files.json")

    def image(self, source: Any) -> torch.Tensor:
        """Patch features (P, C) of a picture. Raises KeyError when it was never computed."""
        return self.stores["image"][self.key(source)]

    def audio(self, source: Any) -> torch.Tensor:
        """Sounding encoder frames (F, C) of a recording. Raises KeyError when never computed."""
        return self.stores["audio"][self.key(source)]

    def key(self, source: Any) -> str:
        """`content_key`, remembered for paths."""
        return self.files[source] if isinstance(source, str) else content_key(source)

    def find_media(self, datasets: Iterable[Iterable[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
        """The distinct pictures and recordings in the rows' `messages`: {modality: {key: source}}.

        Raises:
            ValueError: a file is not there.
        """
        found = [item for rows in datasets for item in _media(rows) if item[0] in self.stores]
        self.files.learn(source for _, source in found if isinstance(source, str))
        distinct: dict[str, dict[str, Any]] = {modality: {} for modality in self.stores}
        for modality, source in found:
            distinct[modality].setdefault(self.key(source), source)
        return distinct


def open_cache(
    folder: Path, towers: MediaMixin, processor: PhiMMProcessor, storage: str = "tower"
) -> FeatureCache:
    """The cache in `folder`, which runs with the same towers and preprocessing may share.

    Args:
        folder: made when missing; the main process makes it first.
        towers: a `PhiMMModel`, or its `Towers` alone.
        storage: how features are kept. `tower` keeps the dtype that the towers compute in: a cached
            run then equals a live one.

    Raises:
        ValueError: the folder was written with other towers, preprocessing or storage (says which
            part), or a shard is damaged.
    """
    parts = {
        modality: (fingerprint(tower, processor, modality), Storage(storage, tower.dtype))
        for modality, tower in encoders(towers).items()
    }
    with PartialState().main_process_first():
        stores = {name: FeatureStore(folder / name, *made) for name, made in parts.items()}
    return FeatureCache(folder, stores)


def _media(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Every picture and recording that the rows' messages hold, as ("image" | "audio", source)."""
    hidden = not PartialState().is_main_process
    for row in tqdm(rows, "media of rows", delay=BAR_AFTER, disable=hidden):
        for message in row["messages"]:
            if not isinstance(message["content"], str):
                for part in message["content"]:
                    if part["type"] in ("image", "audio"):
                        yield part["type"], part[part["type"]]
