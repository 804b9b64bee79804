"""How large a cache will be, before anything is computed for it."""

import math
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
from accelerate import PartialState
from tqdm.auto import tqdm

from modeling_phi_mm.media_phi_mm import MediaMixin
from phi_mm.datasets.media import words_of
from phi_mm.features.cache import FeatureCache
from phi_mm.features.keys import BAR_AFTER
from phi_mm.features.towers import encoders
from processing import PhiMMProcessor

ROOM = 10**9  # bytes that stay free for checkpoints and for others
READERS = 8  # threads
LINE_BYTES = 128  # of a record in the index
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


@dataclass(frozen=True)
class Prediction:
    """What one tower has to do.

    Attributes:
        modality: `image` or `audio`.
        distinct, missing: different pictures or recordings, and those that are not there yet.
        tokens, width: of the missing ones together, and numbers in each token.
        size: bytes that will be written.
    """

    modality: str
    distinct: int
    missing: int
    tokens: int
    width: int
    size: int

    def __str__(self) -> str:
        each = f", {show_bytes(self.size // self.missing)} each" if self.missing else ""
        return (
            f"{self.modality}: {self.distinct:,} distinct, {self.missing:,} to compute, "
            f"{self.tokens:,} tokens of {self.width:,} numbers: {show_bytes(self.size)}{each}"
        )


def predict(
    cache: FeatureCache,
    towers: MediaMixin,
    processor: PhiMMProcessor,
    media: dict[str, dict[str, Any]],
) -> list[Prediction]:
    """The size of what `media` ({modality: {key: source}}) will add to the cache.

    Recordings are not decoded for it: their headers say how long they are.

    Raises:
        ValueError: a recording cannot be opened.
    """
    predictions = []
    for modality, tower in encoders(towers).items():
        store, config = cache.stores[modality], tower.config
        missing = [source for key, source in media[modality].items() if key not in store]
        if modality == "image":
            width = config.hidden_size
            lengths = [(config.image_size // config.patch_size) ** 2] * len(missing)
        else:
            width, lengths = config.d_model, _frames(processor, missing)
            if cache.transcripts is not None:  # no more words than that, whoever speaks
                lengths = [words_of(frames) for frames in lengths]
        size = sum(store.storage.size(length, width) + LINE_BYTES for length in lengths)
        told = (modality, len(media[modality]), len(missing), sum(lengths), width, size)
        predictions.append(Prediction(*told))
    return predictions


def check_room(predictions: Iterable[Prediction], folder: Path) -> None:
    """Raises ValueError when the disk of `folder` cannot hold what was predicted."""
    needed, free = sum(one.size for one in predictions), shutil.disk_usage(folder).free
    if needed and needed + ROOM > free:
        raise ValueError(
            f"got {show_bytes(free)} free in {folder}, expected {show_bytes(needed)} for the cache "
            f"and {show_bytes(ROOM)} to spare: give a features_dir on a larger disk, set "
            "features_dtype to float16 or int8, or features to live"
        )


def show_bytes(size: int) -> str:
    """A number of bytes for people."""
    unit, scale = next((u for u in UNITS if size >= u[1]), UNITS[-1])
    return f"{size / scale:,.2f} {unit}"


def _frames(processor: PhiMMProcessor, sources: list[Any]) -> list[int]:
    """Sounding encoder frames of each recording."""
    with ThreadPoolExecutor(READERS) as readers:
        samples = readers.map(partial(_samples, processor), sources)
        hidden = not PartialState().is_main_process
        bar = tqdm(samples, "lengths", len(sources), delay=BAR_AFTER, disable=hidden)
        return [processor.count_frames(count) for count in bar]


def _samples(processor: PhiMMProcessor, source: Any) -> int:
    """16 kHz samples of one recording."""
    if isinstance(source, str | Path):
        try:
            info = soundfile.info(str(source))
            rate = processor.feature_extractor.sampling_rate
            return math.ceil(info.frames * rate / info.samplerate)
        except soundfile.LibsndfileError:
            pass  # what is wrong is told below
    return len(processor.load_audio(source))
