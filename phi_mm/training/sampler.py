"""The order of rows when batches are made of rows of like length."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch
from torch.utils.data import Sampler
from tqdm.auto import tqdm

from processing import PhiMMCollator

BATCH = 1000  # rows that are tokenised together
MARKS_PER_TURN = 3  # tokens that the chat template puts around a message
TOKENS_PER_AUDIO = 50  # four seconds
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


def row_lengths(rows: datasets.Dataset, collator: PhiMMCollator) -> list[int]:
    """Length of every row in tokens, near enough to sort by.

    Text and pictures are counted; a recording is, where its features are cached, and taken for
    50 tokens where it would have to be opened.
    """
    processor = collator.processor
    batches = rows.select_columns(["messages"]).iter(batch_size=BATCH)
    total = -(-len(rows) // BATCH)
    lengths = []
    for batch in tqdm(batches, total=total, desc="row lengths", disable=total < 20):
        texts, others = [], []
        for messages in batch["messages"]:
            parts = [part for message in messages for part in message["content"]]
            texts.append(" ".join(part["text"] for part in parts if part["type"] == "text"))
            images = sum(part["type"] == "image" for part in parts)
            sounds = [part["audio"] for part in parts if part["type"] == "audio"]
            heard = sum(_audio_tokens(sound, collator) for sound in sounds)
            marks = MARKS_PER_TURN * len(messages)
            others.append(marks + images * processor.num_image_tokens + heard)
        counts = [len(ids) for ids in processor.tokenizer(texts)["input_ids"]]
        lengths += [count + other for count, other in zip(counts, others, strict=True)]
    return lengths


def _audio_tokens(source: Any, collator: PhiMMCollator) -> int:
    if collator.features is None:
        return TOKENS_PER_AUDIO
    return collator.processor.count_audio_tokens(len(collator.features.audio(source)))
