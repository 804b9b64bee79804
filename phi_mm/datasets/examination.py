"""Every row of a data set looked at as training will look at it, in several processes.

Files are read to their end: a header says nothing about a picture that breaks off. What is found
is kept in the `datasets` cache, keyed by the rows, by size and time of every file, and by processor
and `max_length`, so that training does not repeat what `phi-mm data check` did, nor the next run.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.fingerprint import Hasher

from phi_mm.datasets import faults, media
from phi_mm.datasets.faults import Fault, Kind
from phi_mm.datasets.media import count_samples, kind_of, media_facts, words_of
from phi_mm.datasets.rows import form_faults
from processing import PhiMMCollator, PhiMMProcessor

FEW = 500  # items that are done before other processes would have started
ROWS_AT_ONCE = 100
FILE_FEATURES = datasets.Features(
    {
        "kind": datasets.Value("string"),
        "path": datasets.Value("string"),
        "fault": datasets.Value("string"),
        "digest": datasets.Value("string"),
        "seconds": datasets.Value("float64"),
    }
)
ROW_FEATURES = datasets.Features(
    {
        "fault": datasets.Value("string"),
        "problem": datasets.Value("string"),
        "tokens": datasets.Value("int64"),
        "answers": datasets.Value("int64"),
        "media": datasets.List(datasets.Value("string")),
        "asked": datasets.Value("string"),  # hash of what the user says
        "said": datasets.Value("string"),  # hash of what everybody says
    }
)


@dataclass(frozen=True)
class Examined:
    """What was found about `rows`.

    Args:
        rows: as they were examined.
        files: one of FILE_FEATURES for each distinct picture and recording.
        verdicts: one of ROW_FEATURES for each row; `fault` is what training cannot take.
    """

    rows: datasets.Dataset
    files: datasets.Dataset
    verdicts: datasets.Dataset

    @cached_property
    def faults(self) -> list[Fault | None]:
        """Why training cannot take a row, or None."""
        return form_faults(self.verdicts)


def examine(
    rows: datasets.Dataset,
    processor: PhiMMProcessor | None = None,
    max_length: int | None = None,
) -> Examined:
    """Read all media of the rows, and count every row's tokens.

    Args:
        rows: what `read_rows` returns, or a selection.
        processor: counts tokens, and finds rows that the collator would refuse; without it only
            the rows' form and their media are looked at.
        max_length: as the collator takes it.
    """
    files = _examine_files(rows)
    key = [rows._fingerprint, files._fingerprint, _code(), max_length, _processor_key(processor)]
    bad = {
        path: (kind_of(fault), f"{path}: {fault}")
        for path, fault in zip(files["path"][:], files["fault"][:], strict=True)
        if fault and kind_of(fault) != Kind.MISLABELLED
    }
    seconds = {path: s for path, s in zip(files["path"][:], files["seconds"][:], strict=True) if s}
    verdicts = rows.map(
        _examine_rows,
        batched=True,
        batch_size=ROWS_AT_ONCE,
        fn_kwargs={
            "bad": bad,
            "counter": TokenCounter(processor, seconds, max_length) if processor else None,
        },
        remove_columns=rows.column_names,
        features=ROW_FEATURES,
        num_proc=_processes(len(rows)),
        new_fingerprint=Hasher.hash(key),
        desc="checking rows",
    )
    return Examined(rows, files, verdicts)


class TokenCounter:
    """Counts a row's tokens as the collator would, without opening its media.

    Args:
        processor: whose tokens are counted.
        seconds: length of each recording, by path.
        max_length: as the collator takes it.
    """

    def __init__(
        self, processor: PhiMMProcessor, seconds: dict[str, float], max_length: int | None
    ):
        self.processor, self.seconds, self.max_length = processor, seconds, max_length
        self.collator = PhiMMCollator(processor, features=self, max_length=max_length)
        present = processor.get_attributes()
        self.seen = "image_processor" in present
        self.heard = "feature_extractor" in present
        self.written = "transcript_tokenizer" in present

    def lengths(self, conversations: list[list[dict]]) -> list[int]:
        """Tokens of each conversation before any is cut."""
        texts = self.processor.apply_chat_template(conversations, tokenize=False)
        ids = self.processor.tokenizer(texts)["input_ids"]
        return [
            len(row) + sum(self._tokens(part) - 1 for part in _media(messages))
            for row, messages in zip(ids, conversations, strict=True)
        ]

    def refusal(self, row: dict, length: int) -> Fault | None:
        """Why the collator would refuse the row of that many tokens, or None."""
        parts = {part["type"] for part in _media(row["messages"])}
        answers = [m for m in row["messages"] if m["role"] == "assistant"]
        if ("image" in parts and not self.seen) or ("audio" in parts and not self.heard):
            kind = Kind.UNFIT
        elif not any(message.get("weight", 1) for message in answers):
            kind = Kind.UNLEARNABLE
        elif self.max_length is not None and length > self.max_length:
            kind = Kind.TOO_LONG
        else:
            return None
        try:
            self.collator([row])
        except ValueError as error:
            return Fault(kind, f"row {row['id']}: {error}")
        return None

    # What the collator takes for cached features: the right number of frames.

    def image(self, source: Any) -> torch.Tensor:
        """One patch: the number of tokens is the processor's."""
        return torch.zeros(1, 1)

    def audio(self, source: Any) -> torch.Tensor:
        """As many frames as the recording has, or words where it is written down."""
        return torch.zeros(self._frames(source), 1)

    def _frames(self, source: Any) -> int:
        """Of a path, or of a recording that `processor.load_audio` opened."""
        extractor = self.processor.feature_extractor
        if extractor is None:  # the processor itself will say that it takes no audio
            return 1
        if isinstance(source, str):
            samples = count_samples(self.seconds[source], extractor.sampling_rate)
        else:
            samples = len(source)
        frames = self.processor.count_frames(samples)
        return words_of(frames) * self.processor.audio_stack if self.written else frames

    def _tokens(self, part: dict) -> int:
        if part["type"] == "image":
            return self.processor.num_image_tokens
        return self.processor.count_audio_tokens(self._frames(part["audio"])) if self.heard else 1


def _examine_files(rows: datasets.Dataset) -> datasets.Dataset:
    """Every distinct picture and recording of the rows, in the order of their first use."""
    found: dict[tuple[str, str], None] = {}
    for batch in rows.select_columns("messages").iter(batch_size=ROWS_AT_ONCE):
        for messages in batch["messages"]:
            found.update(dict.fromkeys((p["type"], p[p["type"]]) for p in _media(messages)))
    kinds, paths = [kind for kind, _ in found], [path for _, path in found]
    with ThreadPoolExecutor(32) as pool:  # a network disk answers many questions at once
        states = list(pool.map(_state, paths))
    fingerprint = Hasher.hash([kinds, paths, states, _code()])
    if not paths:
        return datasets.Dataset.from_dict({name: [] for name in FILE_FEATURES}, FILE_FEATURES)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "phi_mm_files"
    cache.mkdir(parents=True, exist_ok=True)
    return datasets.Dataset.from_dict({"kind": kinds, "path": paths}).map(
        _examine_file,
        features=FILE_FEATURES,
        num_proc=_processes(len(paths)),
        cache_file_name=str(cache / f"{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        desc="checking media",
    )


def _state(path: str) -> tuple[int, int] | None:
    """Size and time of a file: enough to notice that it is another one."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _examine_file(file: dict[str, str]) -> dict[str, Any]:
    return media_facts(file["kind"], file["path"])._asdict()


def _examine_rows(
    rows: dict[str, list],
    bad: dict[str, tuple[str, str]],
    counter: TokenCounter | None,
) -> dict[str, list]:
    verdicts = []
    for name, messages, fault, problem in zip(
        rows["id"], rows["messages"], rows["fault"], rows["problem"], strict=True
    ):
        paths = [part[part["type"]] for part in _media(messages)]
        if lost := next((path for path in paths if path in bad), None):
            fault, problem = bad[lost][0], f"row {name}: {bad[lost][1]}"
        asked = [message for message in messages if message["role"] == "user"]
        answers = sum(message["role"] == "assistant" for message in messages)
        verdicts.append(
            {
                "fault": fault,
                "problem": problem,
                "tokens": None,
                "answers": answers,
                "media": paths,
                "asked": _hash(asked),
                "said": _hash(messages),
            }
        )
    if counter:
        _count(rows, verdicts, counter)
    return {name: [verdict[name] for verdict in verdicts] for name in ROW_FEATURES}


def _count(rows: dict[str, list], verdicts: list[dict], counter: TokenCounter) -> None:
    """Fills in the tokens of the rows without a fault, and what the collator would refuse."""
    sound = [index for index, verdict in enumerate(verdicts) if verdict["fault"] is None]
    if not sound:
        return
    lengths = counter.lengths([rows["messages"][index] for index in sound])
    for index, length in zip(sound, lengths, strict=True):
        row = {"id": rows["id"][index], "messages": rows["messages"][index]}
        verdicts[index]["tokens"] = length
        refused = counter.refusal(row, length)
        if refused:
            verdicts[index] |= {"fault": refused.kind, "problem": refused.text}


def _media(messages: list[dict]) -> Iterator[dict]:
    for message in messages:
        yield from (part for part in message["content"] if part["type"] != "text")


def _hash(messages: list[dict]) -> str:
    """Hash of the words and of where media stand among them; case and spacing do not count."""
    words = [
        (message["role"], part["type"], " ".join(part.get("text", "").lower().split()))
        for message in messages
        for part in message["content"]
    ]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]


def _processes(items: int) -> int | None:
    """Processes for so many items: one a core, or this one alone."""
    cores = len(os.sched_getaffinity(0))
    return cores if cores > 1 and items > FEW else None


def _code() -> list[str]:
    """This code belongs to the key: a changed check must not meet its old results."""
    return [Path(module.__file__).read_text() for module in (faults, media)] + [
        Path(__file__).read_text()
    ]


def _processor_key(processor: PhiMMProcessor | None) -> list | None:
    """What the number of tokens depends on."""
    if processor is None:
        return None
    backend = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    backend |= {"padding": None, "truncation": None}  # left there by the last call
    extractor = processor.feature_extractor
    return [
        processor.get_attributes(),
        json.dumps(backend, sort_keys=True),
        processor.chat_template,
        processor.num_image_tokens,
        processor.audio_stack,
        extractor and [extractor.n_samples, extractor.hop_length, extractor.sampling_rate],
    ]
