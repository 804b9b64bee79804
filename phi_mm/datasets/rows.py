"""Readers: a local json/jsonl file or a Hub data set -> `datasets.Dataset` of messages."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.features.features import generate_from_arrow_type
from datasets.fingerprint import Hasher

from phi_mm.datasets import conversations
from phi_mm.datasets.conversations import (
    MEDIA,
    TURNS,
    UNREADABLE,
    Medium,
    estimate_length,
    to_messages,
)

logger = logging.getLogger(__name__)

OWN_FEATURES = {
    "id": datasets.Value("string"),
    # Json keeps parts of different kinds as they are; a struct would fill each with nulls.
    "messages": datasets.Json(),
    "length": datasets.Value("int64"),
    "problem": datasets.Value("string"),
}
_CONSUMED = {*OWN_FEATURES, *TURNS, *UNREADABLE, *MEDIA["image"], *MEDIA["audio"]}


def load_rows(
    source: str | os.PathLike,
    media_root: str | os.PathLike | None = None,
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
    on_bad_row: str = "raise",
) -> datasets.Dataset:
    """Read a data set as messages (docs: Hugging Face chat templates, haotian-liu/LLaVA json).

    Args:
        source: a `.json`/`.jsonl` file, or anything `datasets.load_dataset` takes by name.
        media_root: folder that relative media paths start from; by default the file's own.
        config, split: passed to `datasets.load_dataset`; a local file has neither.
        limit: read the first `limit` rows only.
        on_bad_row: "raise" at the first bad row, or "skip" all of them and log how many.

    Returns:
        A memory-mapped data set: `id`, `messages` (as the processor wants them; media are absolute
        paths or URLs), `length` (a rough size in tokens, for `train_sampling_strategy:
        group_by_length`), and the row's other fields as they were. Media that a data set embeds
        are written to files in the `datasets` cache.

    Raises:
        ValueError: for a missing file, a file that is not a list of rows, or a bad row (named).
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"got on_bad_row={on_bad_row!r}, expected 'raise' or 'skip'")
    rows, problems = read_rows(source, media_root, config, split, limit)
    if problems and on_bad_row == "raise":
        raise ValueError(
            f"{problems[0]} ({len(problems)} bad rows in all; on_bad_row='skip' leaves them out)"
        )
    if problems:
        logger.warning(
            "%s: skipped %d bad rows of %d, the first being %s",
            source,
            len(problems),
            len(problems) + len(rows),
            problems[0],
        )
    return rows


def read_rows(
    source: str | os.PathLike,
    media_root: str | os.PathLike | None = None,
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> tuple[datasets.Dataset, list[str]]:
    """Like `load_rows`, but returns the good rows and one sentence about each bad one."""
    path = Path(source)
    if path.suffix in (".json", ".jsonl"):
        raw, extra, key = _open_file(path, limit)
        media_root = media_root or path.parent
    else:
        raw, extra, key = _open_dataset(str(source), config, split, limit)
    table = _convert(raw, extra, str(source), os.path.abspath(media_root or "."), key)
    problems = table["problem"][:]
    good = [index for index, problem in enumerate(problems) if problem is None]
    table = table.remove_columns("problem")
    if len(good) < len(table):
        table = table.select(good)
    return table, [problem for problem in problems if problem is not None]


def _open_file(path: Path, limit: int | None) -> tuple[list[dict], dict, str]:
    """Rows of a json list or of json lines, the features of their extra fields, and a cache key."""
    if not path.is_file():
        raise ValueError(f"got {path}, expected an existing file: check the path")
    content = path.read_bytes()
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        else:
            rows = json.loads(content)
    except ValueError as error:
        raise ValueError(f"got {path}, expected valid {path.suffix[1:]}: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"got {path}, expected a list of rows, each an object")
    rows = rows[:limit]
    names = dict.fromkeys(name for row in rows for name in row if name not in _CONSUMED)
    extra = {name: _infer_feature([row.get(name) for row in rows]) for name in names}
    for name in (name for name, feature in extra.items() if feature == datasets.Json()):
        for row in rows:  # a string that looks like json must stay a string
            row[name] = json.dumps(row.get(name))
    key = f"{hashlib.sha256(content).hexdigest()} {os.path.abspath(path)} {limit}"
    return rows, extra, key


def _infer_feature(values: list) -> object:
    try:
        return generate_from_arrow_type(pa.array(values).type)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # types differ from row to row
        return datasets.Json()


def _open_dataset(
    name: str, config: str | None, split: str, limit: int | None
) -> tuple[Iterable[dict], dict, str]:
    raw = datasets.load_dataset(name, config, split=split)
    if limit is not None:
        raw = raw.select(range(min(limit, len(raw))))
    media = (datasets.Image, datasets.Audio, datasets.Video)
    extra = {
        column: feature
        for column, feature in raw.features.items()
        if column not in _CONSUMED and not isinstance(feature, media)
    }
    return _undecoded(raw), extra, raw._fingerprint


def _undecoded(raw: datasets.Dataset) -> Iterator[dict]:
    """Rows with their media still as `{bytes, path}`: decoding belongs to the moment of use."""
    for batch in raw.with_format("arrow").iter(batch_size=100):
        yield from batch.to_pylist()


def _convert(
    raw: Iterable[dict], extra: dict, source: str, media_root: str, key: str
) -> datasets.Dataset:
    """Write the rows as messages to the `datasets` cache, once for each content and reader."""

    def place(medium: Medium) -> str:
        if medium["bytes"] is not None:
            return _store(medium)
        path = medium["path"]
        is_url = path.startswith(("http://", "https://"))
        return path if is_url else os.path.abspath(os.path.join(media_root, path))

    def rows() -> Iterator[dict]:
        for number, row in enumerate(raw):
            name = str(number if row.get("id") is None else row["id"])
            try:
                messages, problem = to_messages(row, place), None
            except ValueError as error:
                messages, problem = [], f"{source}, row {name}: {error}"
            own = {"id": name, "messages": json.dumps(messages), "problem": problem}
            yield {
                **{column: row.get(column) for column in extra},
                **own,
                "length": estimate_length(messages),
            }

    features = datasets.Features({**extra, **OWN_FEATURES})
    # The readers' own text belongs to the key: a changed reader must not meet its old results.
    code = [Path(__file__).read_text(), Path(conversations.__file__).read_text()]
    fingerprint = Hasher.hash([key, source, media_root, features.to_dict(), code])
    return datasets.Dataset.from_generator(rows, features=features, fingerprint=fingerprint)


def _store(medium: Medium) -> str:
    """Write embedded media to a file named by its content, and return its path."""
    name = hashlib.sha256(medium["bytes"]).hexdigest() + Path(medium["path"] or "").suffix
    path = Path(datasets.config.HF_DATASETS_CACHE) / "phi_mm_media" / name[:2] / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{name}.{os.getpid()}")
        part.write_bytes(medium["bytes"])
        part.replace(path)  # at once, so that no reader ever meets half a file
    return os.path.abspath(path)
