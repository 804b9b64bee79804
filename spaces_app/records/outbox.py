"""What of the records is still to be copied to the Hub, or to be deleted there: kept in SQLite."""

import json
from collections.abc import Sequence
from typing import Any

from .record import COLUMNS
from .store import Store

TABLES = (
    "CREATE TABLE IF NOT EXISTS changes "
    "(number INTEGER PRIMARY KEY AUTOINCREMENT, request TEXT NOT NULL UNIQUE)",
    "CREATE TRIGGER IF NOT EXISTS gone AFTER DELETE ON requests "
    "BEGIN DELETE FROM changes WHERE request = old.id; END",
    # A request is on its way again when it is rated, or when its contents may be kept after all.
    # Not INSERT OR REPLACE: the statement that fires a trigger decides on conflicts in it.
    *(
        f"CREATE TRIGGER IF NOT EXISTS {table}_{change} AFTER {change} ON {table} "
        f"BEGIN DELETE FROM changes WHERE request = new.{name}; "
        f"INSERT INTO changes (request) VALUES (new.{name}); END"
        for table, name in (("requests", "id"), ("feedback", "request"))
        for change in ("INSERT", "UPDATE")
    ),
)
FEEDBACK = ("rated", "rating", "reason", "correction")
SELECT = f"""
SELECT changes.number, {", ".join(f"requests.{name}" for name in COLUMNS)},
    question, answer, media, feedback.time, rating, reason, correction
FROM changes JOIN requests ON requests.id = changes.request
LEFT JOIN feedback ON feedback.request = requests.id
WHERE changes.number > (SELECT cursor FROM copies WHERE dataset = ?)
ORDER BY changes.number LIMIT ?
"""


class Outbox:
    """Rows and deletions that a data set has not taken yet.

    Args:
        store: whose records are copied; those that are there already are, too.
        dataset: the data set's id. Each has its own place in the rows.

    Raises:
        OSError, sqlite3.Error: by every method: the store cannot be read or written.
    """

    def __init__(self, store: Store, dataset: str):
        self.store, self.dataset = store, dataset

    def open(self) -> None:
        """Begins to note what changes."""
        with self.store.transaction() as connection:
            for statement in TABLES:
                connection.execute(statement)
            connection.execute("INSERT OR IGNORE INTO copies VALUES (?, 0)", [self.dataset])
            connection.execute(
                "INSERT OR IGNORE INTO changes (request) SELECT id FROM requests ORDER BY number"
            )

    def rows(self, most: int) -> list[dict[str, Any]]:
        """The next rows to copy, each with the `number` of its change; a row that has changed
        again has a higher one.
        """
        names = ["number", *COLUMNS, "question", "answer", "media", *FEEDBACK]
        with self.store.transaction() as connection:
            found = connection.execute(SELECT, [self.dataset, most]).fetchall()
        rows = [dict(zip(names, values, strict=True)) for values in found]
        return [{**row, "media": json.loads(row["media"])} for row in rows]

    def sent(self, number: int) -> None:
        """Notes that the data set has the rows up to a number."""
        change = "UPDATE copies SET cursor = ? WHERE dataset = ?"
        with self.store.transaction() as connection:
            connection.execute(change, [number, self.dataset])

    def deletions(self) -> list[str]:
        """Names of conversations that are deleted here and not there."""
        query = "SELECT conversation FROM deletions WHERE dataset = ?"
        with self.store.transaction() as connection:
            return [name for (name,) in connection.execute(query, [self.dataset])]

    def deleted(self, conversations: Sequence[str]) -> None:
        """Notes that the data set holds nothing of these any more."""
        query = "DELETE FROM deletions WHERE dataset = ? AND conversation = ?"
        with self.store.transaction() as connection:
            connection.executemany(query, [(self.dataset, name) for name in conversations])
