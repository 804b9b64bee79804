"""The Space's records, read from its folder or from the data set that they are copied to."""

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from phi_mm.hub.destination import told

DATABASE = "requests.sqlite3"
ROWS = """
SELECT requests.*, rating, reason, correction FROM requests
LEFT JOIN feedback ON feedback.request = requests.id ORDER BY number
"""


@dataclass(frozen=True)
class Turn:
    """One request: its question and answer, what was thought of it, and which came before.

    `question` and `answer` are None without consent; `media` holds pictures, then recordings.
    """

    id: str
    conversation: str
    parent: str
    outcome: str
    images: int
    recordings: int
    question: str | None
    answer: str | None
    media: tuple[Path, ...]
    rating: int | None
    reason: str | None
    correction: str | None


@contextmanager
def open_records(store: str) -> Iterator[dict[str, Turn]]:
    """All turns by id, in the order of their asking; their files are there inside the block.

    Args:
        store: the Space's folder of records, which is only read, also while the Space writes; or
            the id of the data set on the Hub that they are copied to.

    Raises:
        ValueError: there are no records, or they cannot be read.
    """
    folder = Path(store)
    if (folder / DATABASE).is_file():
        yield _from_folder(folder)
    elif folder.exists() or store.count("/") != 1:
        raise ValueError(
            f"got {store}, expected a folder with {DATABASE}, which the Space writes to "
            "PHI_MM_STORE, or the id of a data set"
        )
    else:
        # Not in the cache: what users have deleted on the Hub shall not stay behind here.
        with tempfile.TemporaryDirectory() as copy:
            with told(f"cannot read {store}"):
                commit = HfApi().dataset_info(store).sha  # snapshot_download says less of why not
                snapshot_download(store, repo_type="dataset", revision=commit, local_dir=copy)
            yield _from_copy(Path(copy), store)


def _from_folder(folder: Path) -> dict[str, Turn]:
    uri = f"{(folder / DATABASE).resolve().as_uri()}?mode=ro"
    try:
        connection = sqlite3.connect(uri, uri=True)
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute(ROWS)]
        connection.close()
    except sqlite3.Error as error:
        raise ValueError(f"got {folder / DATABASE}, which cannot be read: {error}") from error
    for row in rows:
        row["media"] = json.loads(row["media"])
    return {row["id"]: _turn(row, folder / "media") for row in rows}


def _from_copy(folder: Path, store: str) -> dict[str, Turn]:
    rows = []
    for path in folder.glob("conversations/*/*/*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        rows += [(path.parent / "media", json.loads(line)) for line in lines]
    if not rows:
        raise ValueError(f"got the data set {store}, expected one with conversations")
    # What was changed later stands for what was copied before.
    rows.sort(key=lambda row: row[1]["number"])
    return {row["id"]: _turn(row, media) for media, row in rows}


def _turn(row: dict, folder: Path) -> Turn:
    given = {item.name: row[item.name] for item in fields(Turn) if item.name != "media"}
    return Turn(**given, media=tuple(folder / Path(name).name for name in row["media"]))
