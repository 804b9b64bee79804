"""What is asked of the store: read-only, beside whoever writes."""

import contextlib
import json
import sqlite3
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from records.record import COLUMNS, Record
from records.store import BUSY_SECONDS

FILE = "requests.sqlite3"
NUMBERS = [name for name in COLUMNS if name not in ("id", "conversation", "parent")]
RATED = "requests LEFT JOIN feedback ON feedback.request = requests.id"


class Records:
    """The records in a store; none while nothing was written yet.

    All methods raise OSError or sqlite3.Error when it cannot be read.

    Args:
        folder: of the store.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def between(self, since: float, until: float) -> pd.DataFrame:
        """All numbers and the rating of the requests of a time, without their ids."""
        return self._frame(NUMBERS, since, until)

    def table(
        self, since: float, until: float, outcome: str | None = None, most: int = -1
    ) -> pd.DataFrame:
        """The same with ids: the newest requests of a time, of one outcome or all."""
        return self._frame(COLUMNS, since, until, outcome, most)

    def one(self, request: str) -> dict[str, Any] | None:
        """Everything about a request; None when there is no such one.

        Keys are the columns of both tables; `media` is a list of paths.
        """
        columns = [f"requests.{name}" for name in [*COLUMNS, "question", "answer", "media"]]
        columns += ["rating", "reason", "correction"]
        rows = self._rows(f"SELECT {', '.join(columns)} FROM {RATED} WHERE id = ?", request)
        if not rows:
            return None
        names = [name.removeprefix("requests.") for name in columns]
        found = dict(zip(names, rows[0], strict=True))
        found["media"] = [self.folder / "media" / name for name in json.loads(found["media"])]
        return found

    def size(self) -> tuple[int, int]:
        """Number of records, and bytes of the store with its media."""
        rows = self._rows("SELECT count(*) FROM requests")
        files = [*self.folder.glob(f"{FILE}*"), *self.folder.glob("media/*")]
        size = 0
        for path in files:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                size += path.stat().st_size
        return (rows[0][0] if rows else 0), size

    def ratings(self) -> tuple[int, int]:
        """How many answers have a thumb up, and how many down."""
        counts = dict(self._rows("SELECT rating, count(*) FROM feedback GROUP BY rating"))
        return counts.get(1, 0), counts.get(-1, 0)

    def _frame(
        self,
        columns: list[str],
        since: float,
        until: float,
        outcome: str | None = None,
        most: int = -1,
    ) -> pd.DataFrame:
        named = ", ".join(f"requests.{name}" for name in columns)
        rows = self._rows(
            f"SELECT {named}, rating FROM {RATED} WHERE requests.time >= ? AND requests.time < ? "
            "AND (? IS NULL OR outcome = ?) ORDER BY number DESC LIMIT ?",
            *(since, until, outcome, outcome, most),
        )
        frame = pd.DataFrame.from_records(rows, columns=[*columns, "rating"])
        types = {item.name: item.type for item in fields(Record) if item.name in columns}
        return frame.astype(types | {"rating": float})  # also when there are no rows

    def _rows(self, query: str, *given: Any) -> list[tuple]:
        path = self.folder / FILE
        if not path.is_file():
            return []
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, BUSY_SECONDS, uri=True)) as connection:
            return connection.execute(query, given).fetchall()
