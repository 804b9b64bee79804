"""Answering on ZeroGPU: the GPU is lent for one answer at a time, to a forked process.

`spaces.GPU` takes generator functions, yields what they yield from the other process, and closes
them there when they are closed here. What that process keeps in memory ends with it, so a
conversation is read anew unless the same process happens to serve its next turn.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import gradio as gr

from .generation import (
    NOTHING_SAID,
    Answer,
    Ending,
    Event,
    Generator,
    Interrupted,
    Request,
    Text,
)

log = logging.getLogger(__name__)
START_SECONDS = 10  # moving the weights, and the first call of each kernel
MEDIUM_SECONDS = 1
TOKENS_PER_SECOND = 20  # at the least: a loan that is too long is waited for longer
HEARTBEAT = 0.2  # seconds: the other process is stopped between two things that it yields


class Loan:
    """An answer that is computed in another process.

    Args:
        events: what comes from there; closing it ends the answer there.
        emit, ending: as `Generator.begin` has them.
    """

    def __init__(self, events: Iterator, emit: Callable[[Event], None], ending: Ending):
        self.events, self.emit, self.ending = events, emit, ending
        self.text = ""
        self.answer: Answer | None = None

    def take(self, event: Event | Exception | None) -> None:
        """Passes on what came; ends the loan when it was the last, or nobody wants more."""
        if isinstance(event, Text):
            self.text = event.text
        if isinstance(event, Answer):
            self.answer = event
        elif isinstance(event, Exception):
            self.events.close()
            raise event
        elif event is not None:
            self.emit(event)
        if self.answer is None and self.ending.stop.is_set():
            self.answer = replace(NOTHING_SAID, text=self.text)
        if self.answer is not None:
            self.events.close()


class LentGenerator:
    """A `Generator` whose answers are computed where there is a GPU.

    Args:
        generator: with its model on the GPU, as `spaces` pretends it to be.
        lend: `spaces.GPU`.
    """

    def __init__(self, generator: Generator, lend: Callable):
        self.generator = generator
        self.about, self.precision = generator.about, generator.precision
        self.name = generator.name
        self._lent = lend(self._stream, duration=lambda request, _: estimate(request))

    def begin(self, request: Request, emit: Callable[[Event], None], ending: Ending) -> Loan:
        """As `Generator.begin`; there may be no token yet."""
        # What is not said when the loan ends would be lost with all that was.
        seconds = min(ending.deadline - time.monotonic(), estimate(request))
        loan = Loan(self._lent(request, seconds), emit, ending)
        self.step([loan])
        return loan

    def step(self, loans: list[Loan]) -> None:
        """Waits a moment for each; raises what was raised in the other process."""
        for loan in loans:
            try:
                event = next(loan.events)
            except gr.Error as error:  # of `spaces`: no quota, no GPU, or a loan that was ended
                raise ValueError(f"the GPU is not to be had: {error.message}") from error
            loan.take(event)

    @property
    def has_room(self) -> bool:
        """The other process has its own memory."""
        return True

    def forget(self, conversation: str) -> None:
        """Nothing is kept here."""

    def free(self) -> None:
        """Nothing is kept here."""

    def _stream(self, request: Request, seconds: float) -> Iterator[Event | Exception | None]:
        """What `Generator.answer` emits, returns or raises; None when there was nothing for a
        moment.
        """
        events, stop = queue.SimpleQueue(), threading.Event()
        ending = Ending(stop, time.monotonic() + seconds)

        def compute() -> None:
            try:
                events.put(self.generator.answer(request, events.put, ending))
            except Exception as error:
                events.put(self._sendable(error))

        thread = threading.Thread(target=compute)
        thread.start()
        try:
            event = None
            while not isinstance(event, (Answer, Exception)):
                try:
                    event = events.get(timeout=HEARTBEAT)
                except queue.Empty:
                    event = None
                yield event
        finally:
            stop.set()
            thread.join()

    def _sendable(self, error: Exception) -> Exception:
        """The error's words in a class that another process can read for sure: one that it cannot
        would leave it waiting.
        """
        for kind in (Interrupted, ValueError):
            if isinstance(error, kind):
                return kind(str(error))
        log.error("a request failed", exc_info=error)
        self.generator.free()
        return RuntimeError(f"{type(error).__name__}: {error}")


def estimate(request: Request) -> int:
    """Seconds of GPU to ask for."""
    media = sum(part["type"] != "text" for turn in request.messages for part in turn["content"])
    words = request.max_new_tokens / TOKENS_PER_SECOND
    return round(START_SECONDS + MEDIUM_SECONDS * media + words)
