"""The order of rows when batches are made of rows of like length."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 16  # batches that are sorted together: shuffled rows in, batches of like length out


class LengthGroupedSampler(Sampler[int]):
    """Every row once an epoch, neighbours of like length, batches in random order.

    Padding is what a batch of unlike rows spends most of its time on. transformers' sampler of this
    purpose goes from long to short within every fifty batches, and draws from the global generator,
    so that a run resumed after its first epoch would see other batches.

    Args:
        lengths: of all rows; only their order matters.
        batch_size: rows that are taken together in one optimiser step.
        seed: the order follows from it and the epoch alone.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader when an epoch begins."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # Two numbers make one seed, so that (seed 1, epoch 0) is not (seed 0, epoch 1).
        generator = torch.Generator().manual_seed((self.seed << 32) + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = POOL * self.batch_size
        batches = []
        for start in range(0, len(rows), pool):
            alike = sorted(rows[start : start + pool], key=lambda row: self.lengths[row])
            batches += [
                alike[i : i + self.batch_size] for i in range(0, len(alike), self.batch_size)
            ]
        # A short batch stays last: anywhere else it would shift all batches behind it.
        short = [batch for batch in batches if len(batch) < self.batch_size]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        order = torch.randperm(len(whole), generator=generator).tolist()
        for batch in [whole[i] for i in order] + short:
            yield from batch
