"""The cache of frozen-tower outputs that the collator reads in place of pictures and recordings.

Every distinct picture or recording of a data set passes its tower once. Keys are hashes of the
content (a file's bytes, or an array's values), so two rows with the same picture share one record.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_phi_mm import PhiMMForConditionalGeneration
from phi_mm.features.store import FeatureStore
from processing import PhiMMProcessor

EXIF_ORIENTATION = 0x0112
CPU = torch.device("cpu")
MAX_WORKERS = 8
WRITTEN_AT_ONCE = 16 << 20  # bytes: waiting for the disk after every batch would take half the time


class FeatureCache:
    """Tower outputs by content, as `PhiMMCollator(features=...)` looks them up.

    Args:
        stores: one store for each tower there is, under `image` and `audio`.
    """

    def __init__(self, stores: dict[str, FeatureStore]):
        self.stores = stores
        self._keys: dict[str, str] = {}  # content key of each path met: a file is hashed once

    def image(self, source: Any) -> torch.Tensor:
        """Patch features (P, C) of a picture. Raises KeyError when it was never computed."""
        return self.stores["image"][self.key(source)]

    def audio(self, source: Any) -> torch.Tensor:
        """Sounding encoder frames (F, C) of a recording. Raises KeyError when never computed."""
        return self.stores["audio"][self.key(source)]

    def key(self, source: Any) -> str:
        """`content_key`, remembered for paths."""
        if not isinstance(source, str):
            return content_key(source)
        if source not in self._keys:
            self._keys[source] = content_key(source)
        return self._keys[source]


def open_cache(
    folder: Path, model: PhiMMForConditionalGeneration, processor: PhiMMProcessor
) -> FeatureCache:
    """The cache in `folder`, which runs with the same towers and preprocessing may share.

    Features keep the dtype that the towers compute in: a cached run then equals a live one, where
    fp16 would round what an fp32 tower gave.

    Raises:
        ValueError: the folder was written with other towers or preprocessing; says which part.
    """
    towers = {"image": model.model.vision_tower, "audio": model.model.audio_tower}
    return FeatureCache(
        {
            modality: FeatureStore(
                folder / modality, fingerprint(model, processor, modality), tower.dtype
            )
            for modality, tower in towers.items()
            if tower is not None
        }
    )


@torch.no_grad()
def fill_cache(
    cache: FeatureCache,
    model: PhiMMForConditionalGeneration,
    processor: PhiMMProcessor,
    datasets: Iterable[Iterable[dict[str, Any]]],
    device: torch.device = CPU,
    batch_size: int = 16,
) -> None:
    """Run every picture and recording in the rows' `messages` that the cache does not hold yet.

    The towers are moved to `device` for it, and other processes read and prepare the files while
    they run. May be killed at any moment; the next call goes on behind what was last written.
    """
    for tower in (model.model.vision_tower, model.model.audio_tower):
        if tower is not None:
            tower.to(device)
    missing: dict[str, dict[str, Any]] = {modality: {} for modality in cache.stores}
    for dataset in datasets:
        for modality, source in _media(dataset):
            if modality in cache.stores and cache.key(source) not in cache.stores[modality]:
                missing[modality].setdefault(cache.key(source), source)
    passes = {"image": (_prepare_images, _encode_images), "audio": (_prepare_audio, _encode_audio)}
    for modality, sources in missing.items():
        prepare, encode = passes[modality]
        keys = list(sources)
        batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
        prepared = DataLoader(
            [[sources[key] for key in batch] for batch in batches],
            batch_size=None,
            collate_fn=partial(_result_or_error, prepare, processor),
            num_workers=_spare_cores() if len(batches) > 1 else 0,
        )
        encoded: list[tuple[str, torch.Tensor]] = []
        with tqdm(total=len(keys), desc=f"{modality} features", disable=not keys) as bar:
            for batch, inputs in zip(batches, prepared, strict=True):
                if isinstance(inputs, ValueError):
                    raise inputs
                encoded += zip(batch, (f.cpu() for f in encode(model, *inputs)), strict=True)
                bar.update(len(batch))
                if sum(features.nbytes for _, features in encoded) >= WRITTEN_AT_ONCE:
                    cache.stores[modality].append(encoded)
                    encoded = []
        cache.stores[modality].append(encoded)


def _spare_cores() -> int:
    """Processes that prepare files beside this one."""
    return min(MAX_WORKERS, (os.cpu_count() or 1) - 1)


def _result_or_error(prepare: Callable, processor: PhiMMProcessor, sources: list[Any]) -> Any:
    """A broken file's error is handed back: raised in a worker, it would bring its traceback."""
    try:
        return prepare(processor, sources)
    except ValueError as error:
        return error


# What is prepared elsewhere comes back as numpy arrays: tensors would pass through shared memory,
# of which containers have little.
def _prepare_images(processor: PhiMMProcessor, sources: list[Any]) -> tuple[np.ndarray]:
    return (processor(images=sources, return_tensors="np")["pixel_values"],)


def _encode_images(
    model: PhiMMForConditionalGeneration, pixels: np.ndarray
) -> Iterator[torch.Tensor]:
    """(P, C) of each picture."""
    tower = model.model.vision_tower
    yield from model.model.get_vision_features(torch.from_numpy(pixels).to(tower.device))


def _prepare_audio(
    processor: PhiMMProcessor, sources: list[Any]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The windows' mel spectra, and the numbers of windows and frames of each recording."""
    recordings = [processor.load_audio(source) for source in sources]
    mel = processor(audio=recordings, return_tensors="np")["input_features"]
    samples = [len(recording) for recording in recordings]
    return mel, [(processor.count_audio_windows(n), processor.count_frames(n)) for n in samples]


def _encode_audio(
    model: PhiMMForConditionalGeneration, mel: np.ndarray, lengths: list[tuple[int, int]]
) -> Iterator[torch.Tensor]:
    """(F, C) of each recording: the sounding frames of its windows, one after another."""
    tower = model.model.audio_tower
    frames = model.model.get_audio_tower_features(torch.from_numpy(mel).to(tower.device))
    start = 0
    for windows, sounding in lengths:
        # Only the last window of a recording holds frames without sound, at its end.
        yield frames[start : start + windows].flatten(0, 1)[:sounding]
        start += windows


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


def fingerprint(
    model: PhiMMForConditionalGeneration, processor: PhiMMProcessor, modality: str
) -> dict[str, Any]:
    """What decides a tower's output besides its input: weights, layers, dtype, preprocessing."""
    if modality == "image":
        tower, preparation = model.model.vision_tower, processor.image_processor
        layers = len(tower.encoder.layers)
    else:
        tower, preparation = model.model.audio_tower, processor.feature_extractor
        layers = len(tower.layers)
    settings = {k: v for k, v in preparation.to_dict().items() if k != "mel_filters"}
    return {
        "weights": _weights_hash(tower),
        "layers": layers,
        "dtype": str(tower.dtype).removeprefix("torch."),
        **{f"preprocessing {key}": str(value) for key, value in settings.items()},
    }


def _weights_hash(module: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _media(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Every picture and recording that the rows' messages hold, as ("image" | "audio", source)."""
    for row in rows:
        for message in row["messages"]:
            if not isinstance(message["content"], str):
                for part in message["content"]:
                    if part["type"] in ("image", "audio"):
                        yield part["type"], part[part["type"]]
