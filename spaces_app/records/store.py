"""Records on the disk: SQLite, and beside it the pictures and recordings that may be kept."""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple
from pathlib import Path

from .record import (
    DELETE_COPIES,
    FILL,
    INSERT,
    MISSING,
    NAMED,
    RATE,
    SCHEMA,
    Content,
    Feedback,
    Record,
)

DATABASE = "requests.sqlite3"
BUSY_SECONDS = 1.0  # how long another program may hold the database
OLD = "number <= (SELECT number FROM requests ORDER BY number DESC LIMIT 1 OFFSET ?)"
SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,7}")  # a file's name is the user's


class Store:
    """The newest records; what was added is there after a crash of the process or the machine.

    Nothing is opened before it is needed, and a connection that failed is opened anew.

    Args:
        folder: takes `requests.sqlite3` and `media/`; made when it is not there.
        rows: most records; the oldest ones go.
    """

    def __init__(self, folder: Path, rows: int):
        self.folder, self.rows, self.media = folder, rows, folder / "media"
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def add(self, record: Record, content: Content | None) -> None:
        """Writes a record, durably when this returns.

        Raises:
            OSError, sqlite3.Error: it could not be written; nothing of it is there.
        """
        with self._copying() as copies, self.transaction() as connection:
            kept = (None, None, "[]") if content is None else self._keep(record.id, content, copies)
            connection.execute(INSERT, [*asdict(record).values(), *kept])
            gone, _ = _take_out(connection, OLD, self.rows)
        self._unlink(gone)

    def rate(self, feedback: Feedback, contents: Mapping[str, Content]) -> bool:
        """Writes what a user thinks of an answer, in place of what was thought before.

        Args:
            feedback: words that are None leave those that are there, but none stay when the rating
                is taken back.
            contents: by request, what may be kept now of the conversation and was not then.

        Returns:
            Whether the answer's record is still there; nothing is written without.

        Raises:
            OSError, sqlite3.Error: it could not be written; nothing of it is there.
        """
        with self._copying() as copies, self.transaction() as connection:
            named = [feedback.request, feedback.conversation]
            if connection.execute(f"SELECT 1 {NAMED}", named).fetchone() is None:
                return False
            words = [word and _valid(word) for word in (feedback.reason, feedback.correction)]
            connection.execute(RATE, [*astuple(feedback)[:-2], *words])
            for request, content in contents.items():
                named = [request, feedback.conversation]
                if connection.execute(f"SELECT 1 {MISSING}", named).fetchone() is not None:
                    kept = self._keep(request, content, copies)
                    connection.execute(FILL, [*kept, *named])
        return True

    def delete(self, conversation: str) -> int:
        """Removes all that is kept of a conversation: rows, texts and files. What was copied to the
        Hub is noted, to be deleted there.

        Returns:
            How many rows there were.

        Raises:
            OSError, sqlite3.Error: it could not be removed.
        """
        with self.transaction() as connection:
            gone, rows = _take_out(connection, "conversation = ?", conversation)
            connection.execute(DELETE_COPIES, [conversation])
        self._unlink(gone)
        with self._opened() as connection:  # or the texts stay in the journal
            busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise sqlite3.OperationalError("another program is reading what was deleted")
        return rows

    def close(self) -> None:
        """Lets go of the files."""
        with self._lock:
            self._disconnect()

    @contextlib.contextmanager
    def _copying(self) -> Iterator[list[Path]]:
        """A list for the files that are copied; they go when what names them is not written."""
        copies: list[Path] = []
        try:
            yield copies
        except BaseException:
            self._unlink([path.name for path in copies])
            raise

    def _keep(self, request: str, content: Content, copies: list[Path]) -> tuple[str, str, str]:
        """Copies the media, under the request's name; `copies` grows with each, also when one
        fails. Returns question, answer and the files' names, as they are written.
        """
        names = []
        for number, path in enumerate(map(Path, content.media)):
            suffix = path.suffix if SUFFIX.fullmatch(path.suffix) else ""
            names.append(f"{request}.{number}{suffix}")
            copies.append(self.media / names[-1])
            shutil.copyfile(path, copies[-1])
            _to_disk(copies[-1])
        if names:
            _to_disk(self.media)
        return _valid(content.question), _valid(content.answer), json.dumps(names)

    def _unlink(self, names: list[str]) -> None:
        for name in names:
            (self.media / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time; let go of when something fails."""
        with self._lock:
            try:
                if self._connection is None:
                    self._connect()
                yield self._connection
            except BaseException:
                self._disconnect()
                raise

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The database for one change, which is there whole or not at all."""
        with self._opened() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection  # what fails closes the connection, which rolls back
            connection.execute("COMMIT")

    def _connect(self) -> None:
        self.media.mkdir(parents=True, exist_ok=True)
        connection = self._connection = sqlite3.connect(
            self.folder / DATABASE,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,  # the lock lets one at a time
        )
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA secure_delete=ON")  # deleted texts are overwritten
        connection.executescript(SCHEMA)
        # Under the lock, so that no other process has copied files and not yet named them.
        connection.execute("BEGIN IMMEDIATE")
        rows = connection.execute("SELECT media FROM requests")
        named = {name for (media,) in rows for name in json.loads(media)}
        self._unlink([path.name for path in self.media.iterdir() if path.name not in named])
        connection.execute("COMMIT")

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _take_out(
    connection: sqlite3.Connection, where: str, value: str | int
) -> tuple[list[str], int]:
    """Deletes rows and what was thought of them; returns the names of their files, and how many
    rows there were.
    """
    taken = connection.execute(f"SELECT id, media FROM requests WHERE {where}", [value]).fetchall()
    connection.executemany("DELETE FROM feedback WHERE request = ?", [row[:1] for row in taken])
    connection.execute(f"DELETE FROM requests WHERE {where}", [value])
    return [name for _, media in taken for name in json.loads(media)], len(taken)


def _valid(text: str) -> str:
    """JSON can bring halves of surrogate pairs, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
