"""Readers: a file, a folder or a Hub data set -> `datasets.Dataset` of messages."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
    PlaceholderError,
    estimate_length,
    to_messages,
)
from phi_mm.datasets.faults import BadRows, Fault, Kind

OWN_FEATURES = {
    "id": datasets.Value("string"),
    # Json keeps parts of different kinds as they are; a struct would fill each with nulls.
    "messages": datasets.Json(),
    "length": datasets.Value("int64"),
    "fault": datasets.Value("string"),
    "problem": datasets.Value("string"),
}
_CONSUMED = {*OWN_FEATURES, *TURNS, *UNREADABLE, *MEDIA["image"], *MEDIA["audio"]}
JSON = (".json", ".jsonl")


def load_rows(
    source: str | os.PathLike,
    media_root: str | os.PathLike | None = None,
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
    on_bad_row: str = "error",
    skip_at_most: float | None = None,
) -> datasets.Dataset:
    """The rows of a data set that can be read; media files are not opened.

    Args:
        source, media_root, config, split, limit: as `read_rows` takes them.
        on_bad_row, skip_at_most: as `BadRows` takes them.

    Returns:
        What `read_rows` returns, without `fault` and `problem`.

    Raises:
        ValueError: for a missing file, a file that is not a list of rows, or bad rows (named).
    """
    policy = BadRows(on_bad_row, skip_at_most)
    rows = read_rows(source, media_root, config, split, limit)
    good = policy.leave_out(rows, form_faults(rows), str(source))
    return good.remove_columns(["fault", "problem"])


def read_rows(
    source: str | os.PathLike,
    media_root: str | os.PathLike | None = None,
    config: str | None = None,
    split: str = "train",
    limit: int | None = None,
) -> datasets.Dataset:
    """Read a data set as messages (docs: Hugging Face chat templates, haotian-liu/LLaVA json).

    Args:
        source: a `.json`, `.jsonl` or `.parquet` file, a folder of parquet files or one that
            `save_to_disk` wrote, or a data set's name on the Hub.
        media_root: folder that relative media paths start from; by default the source's own.
        config, split: of a data set of several; a file has neither.
        limit: read the first `limit` rows only.

    Returns:
        A memory-mapped data set, written once to the `datasets` cache: `id`, `messages` (as the
        processor wants them; media are absolute paths or URLs), `length` (a rough size in tokens),
        `fault` and `problem` (what is wrong with a row that cannot be read, whose messages are then
        empty, or None), and the row's other fields as they were. Media that a data set embeds are
        written to files in the cache.

    Raises:
        ValueError: for a missing file or a file that is not a list of rows.
    """
    path = Path(source)
    media_root = media_folder(path, media_root)
    if path.suffix in JSON:
        if not path.is_file():
            raise ValueError(f"got {path}, expected an existing file: check the path")
        with path.open("rb") as file:
            key = f"{hashlib.file_digest(file, 'sha256').hexdigest()} {os.path.abspath(path)}"
        return _converted(lambda: _open_json(path, limit), str(source), media_root, [key, limit])
    raw = _open_dataset(source, config, split)
    if limit is not None:
        raw = raw.select(range(min(limit, len(raw))))
    return _converted(
        lambda: (_undecoded(raw), _extra(raw)), str(source), media_root, [raw._fingerprint]
    )


def media_folder(source: Path, media_root: str | os.PathLike | None) -> str:
    """Where the relative media paths of a source start."""
    root = source if source.is_dir() else source.parent
    return os.path.abspath(media_root or (root if source.exists() else "."))


def form_faults(rows: datasets.Dataset) -> list[Fault | None]:
    """What is wrong with the form of each row of `read_rows`, or None."""
    pairs = zip(rows["fault"][:], rows["problem"][:], strict=True)
    return [Fault(Kind(kind), text) if kind else None for kind, text in pairs]


def _open_json(path: Path, limit: int | None) -> tuple[list[dict], dict]:
    """Rows of a json list or of json lines, and the features of their extra fields."""
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
    return rows, extra


def _infer_feature(values: list) -> object:
    try:
        return generate_from_arrow_type(pa.array(values).type)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # types differ from row to row
        return datasets.Json()


def _open_dataset(source: str | os.PathLike, config: str | None, split: str) -> datasets.Dataset:
    path = Path(source)
    if path.suffix == ".parquet":
        if not path.is_file():
            raise ValueError(f"got {path}, expected an existing file: check the path")
        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    saved = [path / name for name in ("state.json", "dataset_dict.json")]
    if any(file.is_file() for file in saved):
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.Dataset):
            return found
        if split not in found:
            raise ValueError(f"got split={split!r}, expected one of {', '.join(found)} in {path}")
        return found[split]
    return datasets.load_dataset(str(source), config, split=split)


def _extra(raw: datasets.Dataset) -> dict:
    """Features of the columns that are handed on; media beyond the known ones are not."""
    media = (datasets.Image, datasets.Audio, datasets.Video)
    return {
        column: feature
        for column, feature in raw.features.items()
        if column not in _CONSUMED and not isinstance(feature, media)
    }


def _undecoded(raw: datasets.Dataset) -> Iterator[dict]:
    """Rows with their media still as `{bytes, path}`: decoding belongs to the moment of use."""
    for batch in raw.with_format("arrow").iter(batch_size=100):
        yield from batch.to_pylist()


def _converted(
    read: Callable[[], tuple[Iterable[dict], dict]], source: str, media_root: str, key: list
) -> datasets.Dataset:
    """The rows as messages in the `datasets` cache, written once for each content and reader.

    A later start maps the result into memory and does not read the source again: as Python objects
    a large json takes several times its size, in each process.
    """
    # The readers' own text belongs to the key: a changed reader must not meet its old results.
    code = [Path(__file__).read_text(), Path(conversations.__file__).read_text()]
    fingerprint = Hasher.hash([key, source, media_root, code])
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "phi_mm_rows"
    if not (cache / fingerprint).is_dir():
        raw, extra = read()
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            written = datasets.Dataset.from_generator(
                lambda: _rows(raw, extra, source, media_root),
                features=datasets.Features({**extra, **OWN_FEATURES}),
                cache_dir=work,
                fingerprint=fingerprint,
            )
            written.save_to_disk(f"{work}/whole")
            if not (cache / fingerprint).is_dir():  # another process may have been quicker
                os.replace(f"{work}/whole", cache / fingerprint)
    return datasets.load_from_disk(str(cache / fingerprint))


def _rows(raw: Iterable[dict], extra: dict, source: str, root: str) -> Iterator[dict]:
    def place(medium: Medium) -> str:
        if medium["bytes"] is not None:
            return _store(medium)
        path = medium["path"]
        is_url = path.startswith(("http://", "https://"))
        return path if is_url else os.path.abspath(os.path.join(root, path))

    for number, row in enumerate(raw):
        name = str(number if row.get("id") is None else row["id"])
        messages, fault, problem = [], None, None
        try:
            messages = to_messages(row, place)
        except ValueError as error:
            mismatch = isinstance(error, PlaceholderError)
            fault = Kind.PLACEHOLDERS if mismatch else Kind.FORM
            problem = f"{source}, row {name}: {error}"
        yield {
            **{column: row.get(column) for column in extra},
            "id": name,
            "messages": json.dumps(messages),
            "length": estimate_length(messages),
            "fault": fault,
            "problem": problem,
        }


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
