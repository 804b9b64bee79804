"""Records on the disk: SQLite, and beside it the pictures and recordings that may be kept."""

import contextlib
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

BUSY_SECONDS = 1.0  # how long another program may hold the database
TYPES = {str: "TEXT", int: "INTEGER", float: "REAL"}


@dataclass
class Record:
    """One request, without anything that its user typed, showed or said.

    Attributes:
        id, conversation: of the request, and of the conversation that it is a turn of.
        parent: id of the request that was the turn before; empty for a first turn.
        time: when it was asked, in seconds since 1970.
        outcome: "finished", "length", "stopped", "timeout", "refused" or "failed".
        error: class of the error behind the last three; empty when an answer was cut.
        precision, model: of the model, with its revision; empty while there is none.
        resident_bytes: memory of the process when the request ended.
        waited_seconds: in the queue.
        media_seconds, first_token_seconds: since the answer was begun; 0 when none came to its end.
        total_seconds: since it was asked.
        prompt_tokens, reused_tokens, new_tokens: of a whole answer, 0 otherwise.
        waiting: how many were in the queue when it was asked.
        characters, images, recordings: of the question.
        encoded_media: pictures and recordings that had to be looked at or heard now.
    """

    id: str
    conversation: str
    time: float
    parent: str = ""
    outcome: str = ""
    error: str = ""
    precision: str = ""
    model: str = ""
    resident_bytes: int = 0
    waited_seconds: float = 0.0
    media_seconds: float = 0.0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    waiting: int = 0
    characters: int = 0
    images: int = 0
    recordings: int = 0
    encoded_media: int = 0


@dataclass(frozen=True)
class Content:
    """What was typed, shown, said and answered; written only with the user's consent."""

    question: str
    answer: str
    media: list[str] = field(default_factory=list)  # paths


COLUMNS = [item.name for item in fields(Record)]
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY,
    {", ".join(f"{item.name} {TYPES[item.type]} NOT NULL" for item in fields(Record))},
    question TEXT, answer TEXT, media TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS requests_of ON requests (conversation);
"""
INSERT = (
    f"INSERT INTO requests ({', '.join(COLUMNS)}, question, answer, media) "
    f"VALUES ({', '.join('?' * (len(COLUMNS) + 3))})"
)
OLD = "number <= (SELECT number FROM requests ORDER BY number DESC LIMIT 1 OFFSET ?)"
LONGEST_SUFFIX = 8  # a file's name is the user's


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
        copies: list[Path] = []
        try:
            with self._transaction() as connection:
                question = answer = None
                if content is not None:
                    question, answer = _valid(content.question), _valid(content.answer)
                    self._copy(record.id, content.media, copies)
                names = json.dumps([path.name for path in copies])
                values = [*asdict(record).values(), question, answer, names]
                connection.execute(INSERT, values)
                gone = _take_out(connection, OLD, self.rows)
        except BaseException:
            self._unlink([path.name for path in copies])
            raise
        self._unlink(gone)

    def delete(self, conversation: str) -> int:
        """Removes all that is kept of a conversation: rows, texts and files.

        Returns:
            How many rows there were.

        Raises:
            OSError, sqlite3.Error: it could not be removed.
        """
        with self._transaction() as connection:
            before = connection.total_changes
            gone = _take_out(connection, "conversation = ?", conversation)
            rows = connection.total_changes - before
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

    def _copy(self, name: str, media: list[str], copies: list[Path]) -> None:
        """Copies files under the request's name; `copies` grows with each, also when one fails."""
        for number, path in enumerate(map(Path, media)):
            suffix = path.suffix if len(path.suffix) <= LONGEST_SUFFIX else ""
            copies.append(self.media / f"{name}.{number}{suffix}")
            shutil.copyfile(path, copies[-1])
            _to_disk(copies[-1])
        if media:
            _to_disk(self.media)

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
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._opened() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection  # what fails closes the connection, which rolls back
            connection.execute("COMMIT")

    def _connect(self) -> None:
        self.media.mkdir(parents=True, exist_ok=True)
        connection = self._connection = sqlite3.connect(
            self.folder / "requests.sqlite3",
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


def _take_out(connection: sqlite3.Connection, where: str, value: str | int) -> list[str]:
    """Deletes rows; returns the names of their files."""
    taken = connection.execute(f"SELECT media FROM requests WHERE {where}", [value]).fetchall()
    connection.execute(f"DELETE FROM requests WHERE {where}", [value])
    return [name for (media,) in taken for name in json.loads(media)]


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
