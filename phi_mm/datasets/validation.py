"""What a data set holds and what is wrong with it: `phi-mm data check FILE`."""

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
from PIL import Image
from tqdm import tqdm

from phi_mm.datasets.rows import read_rows
from processing import PhiMMCollator, PhiMMProcessor

AUDIO_FORMATS = {
    ".wav": ("WAV", "WAVEX", "RF64"),
    ".flac": ("FLAC",),
    ".mp3": ("MP3",),
    ".ogg": ("OGG",),
}
SHOWN = 10  # faults of a kind that are listed by name
BINS = 8


class _Sizes:
    """Stands in for cached features, with the right number of frames: enough to count tokens."""

    def __init__(self, processor: PhiMMProcessor):
        self.processor = processor

    def image(self, source: Any) -> torch.Tensor:
        return torch.zeros(1, 1)

    def audio(self, source: str) -> torch.Tensor:
        extractor = self.processor.feature_extractor
        if extractor is None:  # the processor itself will say that it takes no audio
            return torch.zeros(1, 1)
        samples = math.ceil(soundfile.info(source).duration * extractor.sampling_rate)
        return torch.zeros(self.processor.count_frames(samples), 1)


@dataclass
class Report:
    """Counts over the readable rows, and each fault by name."""

    rows: int = 0
    turns: int = 0
    media: Counter = field(default_factory=Counter)  # uses, by kind
    files: dict[str, str | None] = field(default_factory=dict)  # path -> what is wrong, or None
    audio_seconds: float = 0.0  # over all uses
    token_lengths: list[int] = field(default_factory=list)
    bad_rows: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # by the collator: nothing to learn from
    too_long: list[str] = field(default_factory=list)

    @property
    def bad_files(self) -> list[str]:
        return [f"{path}: {fault}" for path, fault in self.files.items() if fault]

    @property
    def faults(self) -> int:
        """Number of faults; 0 means that training will meet none of them."""
        return sum(len(found) for found in self._lists().values())

    def _lists(self) -> dict[str, list[str]]:
        return {
            "bad rows": self.bad_rows,
            "bad media files": self.bad_files,
            "rows that cannot train": self.refused,
            "rows over the maximum length": self.too_long,
        }

    def __str__(self) -> str:
        lines = [
            f"rows        {self.rows}",
            f"answers     {self.turns}",
            f"images      {self.media['image']}",
            f"recordings  {self.media['audio']} ({self.audio_seconds:.1f} s)",
            f"media files {len(self.files)}",
        ]
        lines += _histogram(self.token_lengths)
        for title, found in self._lists().items():
            lines.append(f"{title}: {len(found)}")
            lines += [f"  {fault}" for fault in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"  ... and {len(found) - SHOWN} more")
        return "\n".join(lines)


def check(
    source: str | os.PathLike,
    processor: PhiMMProcessor | None = None,
    media_root: str | os.PathLike | None = None,
    config: str | None = None,
    split: str = "train",
    max_length: int | None = None,
) -> Report:
    """Read a data set (arguments as in `load_rows`) and report on it, bad rows included."""
    rows, problems = read_rows(source, media_root, config, split)
    report = validate(rows, processor, max_length)
    report.bad_rows = problems
    return report


def validate(
    rows: datasets.Dataset,
    processor: PhiMMProcessor | None = None,
    max_length: int | None = None,
) -> Report:
    """Open every media file once and, with a processor, count every row's tokens as training would.

    Args:
        rows: what `load_rows` returns.
        processor: counts tokens and finds rows with none to learn from; without it only the
            rows and their media are checked.
        max_length: in tokens; longer rows are reported.
    """
    report = Report(rows=len(rows))
    collator = PhiMMCollator(processor, features=_Sizes(processor)) if processor else None
    for row in tqdm(rows, desc="checking rows", unit="row"):
        sound = _check_media(row, report)
        report.turns += sum(message["role"] == "assistant" for message in row["messages"])
        if collator and sound:
            _check_tokens(row, collator, max_length, report)
    return report


def _check_media(row: dict, report: Report) -> bool:
    """Count the row's media into the report; False when any of its files is bad."""
    sound = True
    for part in (part for message in row["messages"] for part in message["content"]):
        kind = part["type"]
        if kind == "text":
            continue
        path = part[kind]
        report.media[kind] += 1
        if path not in report.files:
            report.files[path] = (image_fault if kind == "image" else audio_fault)(path)
        if report.files[path]:
            sound = False
        elif kind == "audio":
            report.audio_seconds += soundfile.info(path).duration
    return sound


def _check_tokens(
    row: dict, collator: PhiMMCollator, max_length: int | None, report: Report
) -> None:
    try:
        batch = collator([row])
    except ValueError as error:
        # No supervised token, or media of a kind that this model has no tower for.
        report.refused.append(f"row {row['id']}: {error}")
        return
    length = int(batch["attention_mask"].sum())
    report.token_lengths.append(length)
    if max_length is not None and length > max_length:
        report.too_long.append(f"row {row['id']}: {length} tokens, at most {max_length} wanted")


def image_fault(path: str) -> str | None:
    """What is wrong with an image file (missing, unreadable, truncated, mislabelled), or None."""
    if not Path(path).is_file():
        return "missing"
    try:
        with Image.open(path) as image:
            image.load()
    except OSError as error:
        return f"unreadable: {error}"
    expected = Image.registered_extensions().get(Path(path).suffix.lower())
    # Cameras write MPO, a JPEG with a second picture behind it, under the name .jpg.
    if expected not in (None, image.format) and (image.format, expected) != ("MPO", "JPEG"):
        return f"mislabelled: holds {image.format}"
    return None


def audio_fault(path: str) -> str | None:
    """What is wrong with an audio file (missing, unreadable, mislabelled, empty), or None."""
    if not Path(path).is_file():
        return "missing"
    try:
        header = soundfile.info(path)
        samples, _ = soundfile.read(path, dtype="float32")
    except soundfile.LibsndfileError as error:
        return f"unreadable: {error}"
    if header.format not in AUDIO_FORMATS.get(Path(path).suffix.lower(), (header.format,)):
        return f"mislabelled: holds {header.format}"
    if not len(samples):
        return "empty"
    # An mp3's header only estimates its length, so a small difference is no fault.
    if len(samples) < 0.9 * header.frames or _riff_is_cut(Path(path)):
        return "truncated"
    return None if np.isfinite(samples).all() else "holds values that are not finite"


def _riff_is_cut(path: Path) -> bool:
    """Whether a wav file ends before its header says; libsndfile reads such a file in silence."""
    with path.open("rb") as file:
        magic, size = file.read(4), int.from_bytes(file.read(4), "little")
    written_as_a_stream = size in (0, 0xFFFFFFFF)
    return magic == b"RIFF" and not written_as_a_stream and size + 8 > path.stat().st_size + 1


def _histogram(lengths: list[int]) -> list[str]:
    if not lengths:
        return []
    counts, edges = np.histogram(lengths, bins=min(BINS, max(lengths) - min(lengths) + 1))
    median, p95 = np.percentile(lengths, (50, 95))
    lines = [f"tokens      median {median:.0f}, 95 % {p95:.0f}, longest {max(lengths)}"]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "#" * round(40 * count / max(counts))
        lines.append(f"  {low:6.0f} to {high:6.0f}  {count:7d}  {bar}")
    return lines
