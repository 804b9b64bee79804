"""Fills the cache: every picture and recording that it does not hold passes its tower once."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_phi_mm.media_phi_mm import MediaMixin
from phi_mm.datasets import mixture
from phi_mm.features.cache import FeatureCache, open_cache
from phi_mm.features.prediction import Prediction, check_room, predict
from phi_mm.features.towers import encoders, load_towers
from phi_mm.features.transcripts import Transcript, TranscriptStore
from phi_mm.features.writer import ShardWriter
from phi_mm.recipes import Recipe
from processing import PhiMMProcessor

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
MAX_WORKERS = 8
WRITTEN_AT_ONCE = 16 << 20  # bytes: waiting for the disk after every batch would take half the time


def fill_for_recipe(recipe: Recipe) -> list[Prediction]:
    """All of a recipe's training and validation rows; returns what there was to do.

    Raises:
        ValueError: the recipe reads no cache, the cache is another tower's or damaged, the disk is
            too small, or a picture or recording cannot be read.
    """
    if recipe.features == "live":
        raise ValueError("got features: live, which reads no cache: set features=cached")
    arguments = recipe.training_arguments()  # also lets the processes find each other
    towers, processor = load_towers(recipe)
    taken = (recipe.data_seed, processor, recipe.data.max_length)
    with arguments.main_process_first(desc="check of the data"):
        rows = [
            mixture(given, *taken) for given in (recipe.data.train, recipe.data.validation) if given
        ]
    cache = open_cache(recipe.features_folder, towers, processor, recipe.features_dtype)
    return fill_cache(cache, towers, processor, rows, arguments.device)


@torch.no_grad()
def fill_cache(
    cache: FeatureCache,
    towers: MediaMixin,
    processor: PhiMMProcessor,
    datasets: Iterable[Iterable[dict[str, Any]]],
    device: torch.device = CPU,
    batch_size: int = 16,
) -> list[Prediction]:
    """Run every picture and recording in the rows' `messages` that the cache does not hold yet.

    Each process computes its share and writes it to a shard of its own. The towers are moved to
    `device` for it, and other processes read and prepare the files while they run. May be killed at
    any moment; the next call, with as many processes or others, goes on behind what was written.

    Returns:
        What there was to do for each tower, logged before it was begun.

    Raises:
        ValueError: the disk is too small, a file cannot be read, or another process writes.
    """
    state = PartialState()
    media = cache.find_media(datasets)
    predictions = predict(cache, towers, processor, cache.featured(media))
    for prediction in predictions if state.is_main_process else ():
        logger.info("%s", prediction)
    check_room(predictions, cache.folder)
    state.wait_for_everyone()  # before anyone writes, and makes the room smaller
    if cache.transcripts is not None:
        _write_down(cache.transcripts, towers, processor, media["audio"], device, batch_size)
    media = cache.featured(media)
    for modality, sources in media.items():
        # Of all keys, not of the missing ones: the shares are then the same in every process.
        share = list(sources)[state.process_index :: state.num_processes]
        own = {key: sources[key] for key in share if key not in cache.stores[modality]}
        if own:
            encoders(towers)[modality].to(device)
            with ShardWriter(cache.stores[modality], state.process_index) as writer:
                written = cache.transcripts if modality == "audio" else None
                _fill(writer, modality, towers, processor, own, batch_size, written)
    state.wait_for_everyone()
    _see_all(cache, media)
    return predictions


def _see_all(cache: FeatureCache, media: dict[str, dict[str, Any]]) -> None:
    """Reads what the other processes wrote."""
    for modality, store in cache.stores.items():
        store.refresh()
        unseen = [key for key in media[modality] if key not in store]
        if unseen:
            raise ValueError(
                f"got {len(unseen)} {modality} records less in {store.folder} than all processes "
                "wrote, expected one folder that all of them see: start again when it is shared"
            )


def _fill(
    writer: ShardWriter,
    modality: str,
    towers: MediaMixin,
    processor: PhiMMProcessor,
    sources: dict[str, Any],
    batch_size: int,
    transcripts: TranscriptStore | None,
) -> None:
    passes = {"image": (_prepare_images, _encode_images), "audio": (_prepare_audio, _encode_audio)}
    prepare, encode = passes[modality]
    if transcripts is not None:
        encode = partial(_encode_words, iter([transcripts[key] for key in sources]))
    batches, prepared = _prepared(prepare, processor, sources, batch_size)
    encoded: list[tuple[str, torch.Tensor]] = []
    hidden = not PartialState().is_main_process
    with tqdm(total=len(sources), desc=f"{modality} features", disable=hidden) as bar:
        for batch, inputs in zip(batches, prepared, strict=True):
            if isinstance(inputs, ValueError):
                raise inputs
            encoded += zip(batch, (f.cpu() for f in encode(towers, *inputs)), strict=True)
            bar.update(len(batch))
            if sum(features.nbytes for _, features in encoded) >= WRITTEN_AT_ONCE:
                writer.append(encoded)
                encoded = []
    writer.append(encoded)


def _write_down(
    store: TranscriptStore,
    towers: MediaMixin,
    processor: PhiMMProcessor,
    sources: dict[str, Any],
    device: torch.device,
    batch_size: int,
) -> None:
    """Whisper writes every recording down that the store does not hold; each process its share."""
    state = PartialState()
    share = list(sources)[state.process_index :: state.num_processes]
    own = {key: sources[key] for key in share if key not in store}
    if own:
        towers.audio_tower.to(device)
        batches, prepared = _prepared(_prepare_audio, processor, own, batch_size)
        hidden = not state.is_main_process
        with tqdm(total=len(own), desc="transcripts", disable=hidden) as bar:
            for batch, inputs in zip(batches, prepared, strict=True):
                if isinstance(inputs, ValueError):
                    raise inputs
                mel, _, lengths = inputs
                ids = towers.transcribe(torch.from_numpy(mel))
                windows = ids.split([count for count, _ in lengths])
                written = [Transcript(*processor.read_transcript(rows)) for rows in windows]
                store.append(state.process_index, zip(batch, written, strict=True))
                bar.update(len(batch))
    state.wait_for_everyone()
    store.refresh()


def _prepared(
    prepare: Callable, processor: PhiMMProcessor, sources: dict[str, Any], batch_size: int
) -> tuple[list[list[str]], DataLoader]:
    """Keys in batches, and what `prepare` makes of each batch in other processes, or its error."""
    keys = list(sources)
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    loader = DataLoader(
        [[sources[key] for key in batch] for batch in batches],
        batch_size=None,
        collate_fn=partial(_result_or_error, prepare, processor),
        num_workers=_spare_cores() if len(batches) > 1 else 0,
    )
    return batches, loader


def _spare_cores() -> int:
    """Processes that prepare files beside this one."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(MAX_WORKERS, max(cores - 1, 0))


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


def _encode_images(towers: MediaMixin, pixels: np.ndarray) -> Iterator[torch.Tensor]:
    """(P, C) of each picture."""
    device = towers.vision_tower.device
    yield from towers.get_vision_features(torch.from_numpy(pixels).to(device))


def _prepare_audio(
    processor: PhiMMProcessor, sources: list[Any]
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """The windows' mel spectra with their mask, and the numbers of windows and frames of each
    recording.
    """
    recordings = [processor.load_audio(source) for source in sources]
    heard = processor(audio=recordings, return_tensors="np")
    lengths = [
        (len(processor.split_windows(recording)), processor.count_frames(len(recording)))
        for recording in recordings
    ]
    return heard["input_features"], heard["input_features_mask"], lengths


def _encode_audio(
    towers: MediaMixin, mel: np.ndarray, mask: np.ndarray, lengths: list[tuple[int, int]]
) -> Iterator[torch.Tensor]:
    """(F, C) of each recording: the sounding frames of its windows, one after another."""
    device = towers.audio_tower.device
    windows_given = (torch.from_numpy(given).to(device) for given in (mel, mask))
    frames = towers.get_audio_tower_features(*windows_given)
    start = 0
    for windows, sounding in lengths:
        # Only the last window of a recording holds frames without sound, at its end.
        yield frames[start : start + windows].flatten(0, 1)[:sounding]
        start += windows


def _encode_words(
    transcripts: Iterator[Transcript],
    towers: MediaMixin,
    mel: np.ndarray,
    mask: np.ndarray,
    lengths: list[tuple[int, int]],
) -> Iterator[torch.Tensor]:
    """(T, C) of each recording: what is projected at its words, window after window."""
    words = [next(transcripts).words for _ in lengths]
    windows = [ids for recording in words for ids in recording]
    features = iter(towers.get_transcript_features(torch.from_numpy(mel), windows))
    for recording in words:
        yield torch.cat([next(features) for _ in recording])
