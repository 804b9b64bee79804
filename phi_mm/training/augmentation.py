"""Batches whose recordings sound otherwise in every epoch, the same again when a run is resumed."""

import zlib
from functools import partial
from typing import Any

import numpy as np
import torch

from phi_mm.datasets.augmentation import AugmentationSection, augment, mask_mel
from phi_mm.datasets.examination import TokenCounter
from phi_mm.datasets.streaming import ROUND
from processing import PhiMMCollator, PhiMMProcessor

Heard = tuple[int, np.random.Generator]  # windows of a recording, and who draws for it


class AugmentingCollator:
    """A collator of training batches whose recordings are augmented first.

    What is drawn for a recording follows from the seed, the epoch, its row's id and its samples
    alone: neither from the batch that the row is in, nor from what was drawn before.

    Args:
        collator: a `PhiMMCollator` without cached features.
        processor: that opens the recordings.
        chosen: what is done to them.
        seed: of the data.
    """

    def __init__(
        self,
        collator: PhiMMCollator,
        processor: PhiMMProcessor,
        chosen: AugmentationSection,
        seed: int,
    ):
        self.collator, self.processor, self.chosen, self.seed = collator, processor, chosen, seed
        self.slows = chosen.speed is not None and chosen.speed[0] < 1
        self.rate = processor.feature_extractor.sampling_rate
        # Shared, so that a loader's workers that outlive an epoch see the next.
        self.epoch = torch.zeros(1, dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Called when an epoch begins."""
        self.epoch.fill_(epoch)

    def __call__(self, samples: list[dict] | list[list[dict]]) -> dict[str, Any]:
        """The batch."""
        heard: list[Heard] = []
        convert = partial(self._augmented, heard=heard)
        packed = not isinstance(samples[0], dict)
        rows = [list(map(convert, row)) if packed else convert(row) for row in samples]
        batch = self.collator(rows)
        if heard and (self.chosen.time_masks or self.chosen.frequency_masks):
            mel, mask = batch["input_features"], batch["input_features_mask"]
            batch["input_features"] = self._masked(mel, mask.sum(dim=1).tolist(), heard)
        return batch

    def _augmented(self, row: dict, heard: list[Heard]) -> dict:
        """A row with its recordings opened and augmented, which are added to `heard`. Where they
        would not fit slowed down, they keep their own speed.
        """
        changed, own = self._changed(row, own_speed=False)
        if own and self.slows and not self._fits(changed):
            changed, own = self._changed(row, own_speed=True)
        heard += own
        return changed

    def _fits(self, row: dict) -> bool:
        longest = self.collator.max_length
        if longest is None:
            return True
        counter = TokenCounter(self.processor, {}, longest)
        return counter.lengths([row["messages"]])[0] <= longest

    def _changed(self, row: dict, own_speed: bool) -> tuple[dict, list[Heard]]:
        heard: list[Heard] = []

        def convert(part: dict) -> dict:
            if part["type"] != "audio":
                return part
            recording = self.processor.load_audio(part["audio"])
            rng = self._generator(row, recording)
            recording = augment(recording, self.rate, self.chosen, rng, own_speed)
            heard.append((len(self.processor.split_windows(recording)), rng))
            return {"type": "audio", "audio": recording}

        messages = [
            message
            if isinstance(message["content"], str)
            else {**message, "content": [convert(part) for part in message["content"]]}
            for message in row["messages"]
        ]
        return {**row, "messages": messages}, heard

    def _generator(self, row: dict, recording: np.ndarray) -> np.random.Generator:
        epoch = int(self.epoch) + row.get(ROUND, 0)
        own = zlib.crc32(recording.tobytes(), zlib.crc32(str(row.get("id")).encode()))
        return np.random.default_rng((self.seed, epoch, own))

    def _masked(self, mel: torch.Tensor, frames: list[int], heard: list[Heard]) -> torch.Tensor:
        """Mel windows (W, bands, F), of which so many frames sound, with parts hidden."""
        owners = [rng for windows, rng in heard for _ in range(windows)]
        rate = self.rate / self.processor.feature_extractor.hop_length
        masked = [
            mask_mel(window, count, rate, self.chosen, rng)
            for window, count, rng in zip(mel, frames, owners, strict=True)
        ]
        return torch.stack(masked)
