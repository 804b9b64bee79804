"""Writing records down without ever standing in the way of an answer."""

import asyncio
import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from .record import Content, Feedback, Record
from .store import Store

log = logging.getLogger("phi-mm")
requests = logging.getLogger("phi-mm.requests")
MOST_PENDING = 256  # records in memory while the disk is slow
WRITE_SECONDS = 2.0  # that an answer waits for its record


class Journal:
    """Writes each record to the console and, where there is one, to the store.

    Args:
        store: takes the records; None for the console alone.
        watchers: are told of each record at once.

    Attributes:
        lost: records since the store failed, 0 while it works.
    """

    def __init__(self, store: Store | None = None, watchers: Sequence[Callable] = ()):
        self.store, self.watchers = store, watchers
        self._deleted: set[str] = set()  # answers that were under way then write their record later
        self._pending = threading.BoundedSemaphore(MOST_PENDING)
        self._thread = ThreadPoolExecutor(1, "journal")
        self.lost = 0

    async def write(self, record: Record, content: Content | None) -> None:
        """As `submit`; returns when the record is on the disk, could not be written, or the disk
        is too slow to wait for.
        """
        if (future := self.submit(record, content)) is not None:
            await asyncio.wait([asyncio.wrap_future(future)], timeout=WRITE_SECONDS)

    def submit(self, record: Record, content: Content | None) -> Future | None:
        """Writes the line for the console now, and the row soon; None when there will be no row."""
        requests.info("%s", json.dumps(asdict(record)))
        for watch in self.watchers:
            watch(record)
        if self.store is None:
            return None
        if not self._pending.acquire(blocking=False):
            self._lose(f"{MOST_PENDING} records wait for the disk")
            return None
        return self._thread.submit(self._add, record, content)

    async def delete(self, conversation: str) -> None:
        """Removes all that is kept of a conversation; what comes later of it is not kept either.

        Raises:
            ValueError: it could not be removed; says what to do.
        """
        self._deleted.add(conversation)
        if self.store is None:
            return
        try:
            await asyncio.wrap_future(self._thread.submit(self.store.delete, conversation))
        except (OSError, sqlite3.Error) as error:
            log.error("conversation %s could not be deleted: %s", conversation, error)
            raise ValueError(
                f"what is kept could not be deleted now: try again, or give the Space's owner "
                f"the conversation's name, {conversation}"
            ) from None

    async def rate(self, feedback: Feedback, contents: Mapping[str, Content]) -> None:
        """Writes what a user thinks of an answer, as `Store.rate`.

        Raises:
            ValueError: it could not be written, or nothing is kept of the answer; says what to do.
        """
        if self.store is None:
            raise ValueError("nothing is kept here, so answers cannot be rated")
        try:
            there = await asyncio.wrap_future(
                self._thread.submit(self.store.rate, feedback, contents)
            )
        except (OSError, sqlite3.Error) as error:
            log.error("feedback on request %s could not be stored: %s", feedback.request, error)
            raise ValueError("your feedback could not be stored now: try again later") from None
        if not there:
            raise ValueError(
                "nothing is kept of this answer any more: ask again, and rate the new one"
            )

    def close(self) -> None:
        """Writes what is pending."""
        self._thread.shutdown()
        if self.store is not None:
            self.store.close()

    def _add(self, record: Record, content: Content | None) -> None:
        try:
            if record.conversation not in self._deleted:
                self.store.add(record, content)
        except (OSError, sqlite3.Error) as error:
            self._lose(f"{type(error).__name__}: {error}")
        else:
            if self.lost:
                log.warning("records are stored again; %d were not", self.lost)
                self.lost = 0
        finally:
            self._pending.release()

    def _lose(self, why: str) -> None:
        """Says so once, not for every request while a disk is full."""
        if not self.lost:
            log.error("records are not stored in %s (%s); answers go on", self.store.folder, why)
        self.lost += 1
