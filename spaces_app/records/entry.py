"""One request while it is being answered: becomes its record."""

import time
from pathlib import Path
from typing import Protocol

import psutil
from engine.generation import Answer, Begun, Event, Request, Text

from .record import Content, Record


class Answering(Protocol):
    """What a record says of the model."""

    precision: str
    name: str


class Entry:
    """Notes what happens to a request.

    Args:
        request: just asked.
        waiting: how many were in the queue then.
    """

    def __init__(self, request: Request, waiting: int):
        self.request = request
        self._question = request.messages[-1]["content"]
        self._asked, self._begun = time.monotonic(), None
        self._text = ""
        self.record = Record(
            id=request.id,
            conversation=request.conversation,
            parent=request.parent,
            time=time.time(),
            waiting=waiting,
            characters=sum(map(len, self._parts("text"))),
            images=len(self._parts("image")),
            recordings=len(self._parts("audio")),
        )

    def take(self, event: Event) -> None:
        """Notes an event of the engine's stream."""
        if isinstance(event, Begun):
            self._begun = event.at
        elif isinstance(event, (Text, Answer)):
            self._text = event.text
        if isinstance(event, Answer):
            record = self.record
            record.prompt_tokens, record.reused_tokens = event.prompt_tokens, event.reused_tokens
            record.new_tokens, record.encoded_media = len(event.token_ids), event.encoded_media
            record.media_seconds = event.media_seconds
            record.first_token_seconds = event.first_token_seconds

    def end(self, outcome: str, error: str, by: Answering | None) -> tuple[Record, Content | None]:
        """The record, and with the user's consent the content.

        Args:
            outcome, error: as `Record` has them.
            by: the generator; None when there is none.
        """
        now, record = time.monotonic(), self.record
        record.outcome, record.error = outcome, error
        if by is not None:
            record.precision, record.model = by.precision, by.name
        record.waited_seconds = (now if self._begun is None else self._begun) - self._asked
        record.total_seconds = now - self._asked
        record.resident_bytes = psutil.Process().memory_info().rss
        if not self.request.keep:
            return record, None
        media = [*self._parts("image"), *self._parts("audio")]
        there = [path for path in media if Path(path).is_file()]
        return record, Content("\n".join(self._parts("text")), self._text, there)

    def _parts(self, kind: str) -> list[str]:
        return [part[kind] for part in self._question if part["type"] == kind]
