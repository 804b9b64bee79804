"""Answering on ZeroGPU: the GPU is lent for one answer at a time, to a forked process.

`spaces.GPU` takes generator functions, yields what they yield from the other process, and closes
them there when they are closed here. What that process keeps in memory ends with it, so a
conversation is read anew unless the same process happens to serve its next turn.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator

import gradio as gr

from .generation import Answer, Ending, Event, Generator, Interrupted, Request

log = logging.getLogger(__name__)
START_SECONDS = 10  # moving the weights, and the first call of each kernel
MEDIUM_SECONDS = 1
TOKENS_PER_SECOND = 20  # at the least: a loan that is too long is waited for longer
HEARTBEAT = 0.2  # seconds: the other process is stopped between two things that it yields


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

    def answer(self, request: Request, emit: Callable[[Event], None], ending: Ending) -> Answer:
        """As `Generator.answer`."""
        # What is not said when the loan ends would be lost with all that was.
        seconds = min(ending.deadline - time.monotonic(), estimate(request))
        try:
            with contextlib.closing(self._lent(request, seconds)) as events:
                for event in events:
                    if isinstance(event, Exception):
                        raise event
                    if isinstance(event, Answer):
                        return event
                    if event is not None:
                        emit(event)
                    if ending.stop.is_set():
                        break
        except gr.Error as error:  # of `spaces`: no quota, no GPU, or a loan that was ended
            raise ValueError(f"the GPU is not to be had: {error.message}") from error
        raise Interrupted("stopped")

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
