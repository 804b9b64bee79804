"""Which rows make a batch: rows of like length, rows of one kind, or rows that fill a whole row."""

import math
import os
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
from torch.utils.data import Dataset, Sampler

from processing import PhiMMProcessor

BATCH = 1000  # rows that are read together
MANY = 20_000  # rows, from which on all cores count: at 3,000 a second one would take a minute
TOKENS_PER_AUDIO = 50  # four seconds
POOL = 16  # batches that are sorted together: shuffled rows in, batches of like length out


class SeededSampler(Sampler):
    """A sampler whose order follows from its seed and the epoch alone.

    transformers' own draw from the global generator, so that a run resumed after its first epoch
    would see other batches.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int):
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader when an epoch begins."""
        self.epoch = epoch

    def generator(self) -> np.random.Generator:
        """At its beginning for this epoch."""
        # torch would take one number, and only the last 32 bits of it.
        return np.random.default_rng((self.seed, self.epoch))


class LengthGroupedSampler(SeededSampler):
    """Every row once an epoch, neighbours of like length, batches in random order.

    Padding is what a batch of unlike rows spends most of its time on. transformers' sampler of this
    purpose goes from long to short within every fifty batches. With kinds, all rows of a batch are
    of one, so that a batch of text alone runs no tower (the idea is LLaVA's); only what remains of
    every kind stands together at the end.

    Args:
        lengths: of all rows; only their order matters.
        batch_size: rows that are taken together in one optimiser step.
        kinds: of all rows, where they are not to be mixed.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        kinds: Sequence[str] | None = None,
    ):
        super().__init__(seed)
        self.lengths, self.batch_size = list(lengths), batch_size
        self.kinds = [""] * len(self.lengths) if kinds is None else list(kinds)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = self.generator()
        by_kind: dict[str, list[int]] = {kind: [] for kind in sorted(set(self.kinds))}
        for row in generator.permutation(len(self.lengths)).tolist():
            by_kind[self.kinds[row]].append(row)
        batches = [batch for rows in by_kind.values() for batch in self._batches(rows)]
        # A short batch stays last: anywhere else it would shift all batches behind it.
        short = [batch for batch in batches if len(batch) < self.batch_size]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        for batch in [whole[i] for i in generator.permutation(len(whole))] + short:
            yield from batch

    def _batches(self, rows: list[int]) -> Iterator[list[int]]:
        pool = POOL * self.batch_size
        for start in range(0, len(rows), pool):
            alike = sorted(rows[start : start + pool], key=lambda row: self.lengths[row])
            for i in range(0, len(alike), self.batch_size):
                yield alike[i : i + self.batch_size]


class PackingSampler(SeededSampler):
    """Lists of rows that fill a row of a batch together: every row once an epoch, in random order.

    Lengths alone decide how many lists there are and how full, so that all epochs have as many. Of
    the rows of one length, every epoch draws anew which goes where.

    Args:
        lengths: of all rows in tokens.
        packed_length: tokens in a row of a batch.
    """

    def __init__(self, lengths: Sequence[int], packed_length: int, seed: int):
        super().__init__(seed)
        self.lengths = list(lengths)
        self.bins = best_fit(sorted(self.lengths, reverse=True), packed_length)

    def __len__(self) -> int:
        return len(self.bins)

    def __iter__(self) -> Iterator[list[int]]:
        generator = self.generator()
        rows = generator.permutation(len(self.lengths)).tolist()
        rows.sort(key=lambda row: -self.lengths[row])
        for number in generator.permutation(len(self.bins)):
            yield [rows[place] for place in self.bins[number]]


class SharedRows(Dataset):
    """The rows of a data set by lists of their numbers, as `PackingSampler` gives them."""

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: list[int]) -> list[dict[str, Any]]:
        return self.rows.__getitems__(numbers)


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Bins of at most `size`, each length put where the least room remains.

    For lengths that fall this is best-fit decreasing (Johnson 1973), never more than 11/9 of the
    fewest bins and 1.

    Returns:
        places in `lengths`, by bin.

    Raises:
        ValueError: a length is more than a bin holds.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room -> bins that have just as much
    rooms: list[int] = []  # keys of `with_room`, rising
    for place, length in enumerate(lengths):
        if length > size:
            raise ValueError(f"got a length of {length}, expected at most {size}")
        at = bisect_left(rooms, length)
        if at == len(rooms):
            bins.append([])
            room, number = size, len(bins) - 1
        else:
            room = rooms[at]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        bins[number].append(place)
        rest = room - length
        if rest not in with_room:
            insort(rooms, rest)
            with_room[rest] = []
        with_room[rest].append(number)
    return bins


def row_lengths(
    rows: datasets.Dataset, processor: PhiMMProcessor, max_length: int | None = None
) -> list[int]:
    """Length of every row in tokens, as the collator will make it; `datasets` keeps them on disk.

    What a recording becomes is told by its header, which is exact but for some mp3; one that is not
    a file is taken for 50 tokens.

    Raises:
        ValueError: for a recording that cannot be opened.
    """
    counted = rows.select_columns(["messages"]).map(
        _lengths,
        batched=True,
        remove_columns=["messages"],
        features=datasets.Features({"length": datasets.Value("int64")}),
        fn_kwargs={"processor": processor},
        desc="row lengths",
        num_proc=os.cpu_count() if len(rows) >= MANY else None,
    )
    return [min(length, max_length or length) for length in counted["length"]]


def _lengths(batch: dict[str, list], processor: PhiMMProcessor) -> dict[str, list[int]]:
    texts = processor.apply_chat_template(batch["messages"], tokenize=False)
    counts = [len(ids) for ids in processor.tokenizer(texts, verbose=False)["input_ids"]]
    lengths = [
        count + _media_tokens(messages, processor)
        for count, messages in zip(counts, batch["messages"], strict=True)
    ]
    return {"length": lengths}


def _media_tokens(messages: list[dict[str, Any]], processor: PhiMMProcessor) -> int:
    """Placeholders besides the one that the chat template writes for each medium."""
    tokens = 0
    for part in (part for message in messages for part in message["content"]):
        if part["type"] == "image":
            tokens += processor.num_image_tokens - 1
        elif part["type"] == "audio":
            tokens += _audio_tokens(part["audio"], processor) - 1
    return tokens


def _audio_tokens(source: Any, processor: PhiMMProcessor) -> int:
    if processor.feature_extractor is None or not Path(str(source)).is_file():
        return TOKENS_PER_AUDIO
    try:
        header = soundfile.info(source)
        rate = processor.feature_extractor.sampling_rate
        samples = math.ceil(header.frames * rate / header.samplerate)
    except soundfile.LibsndfileError:  # of another format, or broken, which is told here
        samples = len(processor.load_audio(source))
    return processor.count_audio_tokens(processor.count_frames(samples))


def kind_of(messages: list[dict[str, Any]]) -> str:
    """What a row shows: text, image, audio or image_audio."""
    types = {part["type"] for message in messages for part in message["content"]}
    return "_".join(kind for kind in ("image", "audio") if kind in types) or "text"


def row_kinds(rows: datasets.Dataset) -> list[str]:
    """`kind_of` every row."""
    batches = rows.select_columns(["messages"]).iter(batch_size=BATCH)
    return [kind_of(messages) for batch in batches for messages in batch["messages"]]
