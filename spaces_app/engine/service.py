"""The engine: one thread that loads the model and answers, several side by side, and streams for
those who ask.

Requests come from an event loop; only the engine's own thread touches the model.
"""

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from records.entry import Entry
from records.journal import Journal

from .generation import (
    NOTHING_SAID,
    Answer,
    Begun,
    Ending,
    Event,
    Generator,
    Interrupted,
    Request,
    Sequence,
    Waiting,
)
from .turns import Turns
from .zero import LentGenerator, Loan

log = logging.getLogger(__name__)
IDLE_SECONDS = 0.5  # between two looks at whether the engine is to be closed


@dataclass(frozen=True)
class Limits:
    """What the engine takes on.

    Attributes:
        waiting: requests that may wait.
        together: requests that are answered side by side, each of another conversation.
        wait_seconds: longest time to wait; a request that waited longer is turned away.
        answer_seconds: longest time to work on one; an answer ends there.
    """

    waiting: int = 32
    together: int = 8
    wait_seconds: float = 300.0
    answer_seconds: float = 180.0


class NoAnswer(ValueError):
    """There is no answer, and not because of the request; other ValueErrors are about that.

    Attributes:
        outcome: "timeout" or "failed".
        error: class of what went wrong.
    """

    def __init__(self, message: str, outcome: str, error: Exception):
        super().__init__(message)
        self.outcome, self.error = outcome, type(error).__name__


@dataclass(eq=False)
class _Ticket:
    """A request on its way, how to tell the one who asked, and the context of the asking, in which
    ZeroGPU looks for the user whose quota it takes; `answering` is there once it is begun.
    """

    request: Request
    tell: Callable[[Event | Exception], None]
    stop: threading.Event = field(default_factory=threading.Event)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    answering: Sequence | Loan | None = None


class Engine:
    """Answers requests in turn.

    Args:
        load: makes the generator; called in the engine's thread, so that the page is up meanwhile.
        limits: of queue and time.
        journal: takes a record of each request; closed with the engine.
    """

    def __init__(
        self,
        load: Callable[[], Generator | LentGenerator],
        limits: Limits,
        journal: Journal | None = None,
    ):
        self.load, self.limits, self.journal = load, limits, journal or Journal()
        self.generator: Generator | LentGenerator | None = None
        self.failure: NoAnswer | None = None  # why the model could not be loaded
        self._turns: Turns[_Ticket] = Turns(limits.waiting)
        self._open: set[_Ticket] = set()  # of all who listen
        self._begun: list[_Ticket] = []
        self._forgotten: set[str] = set()
        self._closed = threading.Event()
        self._loaded = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Loads the model and begins to answer, in the background."""
        self._thread.start()

    def close(self) -> None:
        """Ends the answer that is being given, and the thread."""
        self._closed.set()
        for ticket in list(self._open):
            ticket.stop.set()
        self._thread.join()
        self.journal.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        return self.alive and self.generator is not None

    @property
    def loading(self) -> bool:
        return not self._loaded.is_set()

    def wait_until_loaded(self) -> None:
        """Returns once the model is there, or cannot be loaded."""
        self._loaded.wait()

    def describe(self) -> str:
        """In a sentence, what to expect of it."""
        if self.failure is not None:
            return str(self.failure)
        if self.loading:
            return "The model is being loaded; questions wait until it is there."
        return f"Ready: {self.generator.about}." if self.alive else "Closed."

    @property
    def waiting(self) -> int:
        return len(self._turns)

    @property
    def answering(self) -> int:
        return len(self._begun)

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """Queues a request and yields what happens to it, an `Answer` last; its record is written
        before that.

        Whoever stops to iterate ends the answer: `aclose()` it, or cancel the task it runs in.

        Raises:
            ValueError: the request was turned away, or cannot be answered; says what to do.
        """
        entry = Entry(request, self.waiting)
        try:
            async with contextlib.aclosing(self._events(request)) as events:
                async for event in events:
                    entry.take(event)
                    if isinstance(event, Answer):
                        break
                    yield event
        except NoAnswer as error:
            await self._record(entry, error.outcome, error.error)
            raise
        except ValueError as error:
            await self._record(entry, "refused", type(error.__cause__ or error).__name__)
            raise
        except (GeneratorExit, asyncio.CancelledError):  # whoever asked is gone
            self.journal.submit(*entry.end("stopped", "", self.generator))
            raise
        await self._record(entry, event.ended, "")
        yield event

    async def _record(self, entry: Entry, outcome: str, error: str) -> None:
        await self.journal.write(*entry.end(outcome, error, self.generator))

    async def _events(self, request: Request) -> AsyncIterator[Event]:
        if self.failure is not None:
            raise self.failure.with_traceback(None)  # or it grows with every question
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def tell(event: Event | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = _Ticket(request, tell)
        self._turns.put(request.conversation, ticket)
        self._open.add(ticket)
        self._tell_places()
        until, event = loop.time() + self.limits.wait_seconds, None
        try:
            while not isinstance(event, Answer):
                try:
                    # Not `wait_for`, which may swallow a cancellation.
                    async with asyncio.timeout_at(until):
                        event = await events.get()
                except TimeoutError:
                    self._refuse_if_waiting(ticket)
                    until = None  # it is being answered, which has its own end
                    continue
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            ticket.stop.set()
            self._open.discard(ticket)
            if self._turns.remove(request.conversation, ticket):
                self._tell_places()

    def stop(self, conversation: str) -> None:
        """Ends what is waiting or being answered for a conversation: its streams end with an
        `Answer` of what there is.
        """
        for ticket in list(self._open):
            if ticket.request.conversation == conversation:
                ticket.stop.set()
                if self._turns.remove(conversation, ticket):
                    ticket.tell(NOTHING_SAID)
        self._tell_places()

    def forget(self, conversation: str) -> None:
        """Frees what is kept of a conversation, when its answer under way has ended."""
        self._forgotten.add(conversation)

    def _refuse_if_waiting(self, ticket: _Ticket) -> None:
        if self._turns.remove(ticket.request.conversation, ticket):
            self._tell_places()
            raise ValueError(
                f"no answer could be begun within {self.limits.wait_seconds:.0f} s, there are "
                "too many questions: try again later"
            )

    def _tell_places(self) -> None:
        for place, ticket in enumerate(self._turns.in_order(), start=1):
            ticket.tell(Waiting(place))

    def _work(self) -> None:
        try:
            self.generator = self.load()
            self._loaded.set()
        except Exception as error:
            log.exception("the model could not be loaded")
            words = f"the model could not be loaded: {error}"
            self.failure = NoAnswer(words, "failed", error)
            self._loaded.set()
            for ticket in self._turns.in_order():
                ticket.tell(self.failure)
            return
        while not self._closed.is_set():
            self._begin_next()
            self._go_on()

    def _begin_next(self) -> None:
        """Begins with the next request, when there is room for one more: no more than one, so that
        those who are being answered do not wait for many prompts to be read.
        """
        busy = {ticket.request.conversation for ticket in self._begun}
        full = len(busy) >= self.limits.together or (busy and not self.generator.has_room)
        ticket = None if full else self._turns.take(0 if busy else IDLE_SECONDS, busy)
        for conversation in self._forgotten - busy:
            self.generator.forget(conversation)
            self._forgotten.discard(conversation)
        if ticket is None:
            return
        self._tell_places()
        ticket.tell(Begun(time.monotonic()))
        ending = Ending(ticket.stop, time.monotonic() + self.limits.answer_seconds)
        asked = ticket.request, ticket.tell, ending
        try:
            ticket.answering = ticket.context.run(self.generator.begin, *asked)
        except Exception as error:
            ticket.tell(self._outcome(ticket, error))
        else:
            self._begun.append(ticket)

    def _go_on(self) -> None:
        """Tells the answers that have come to their end, and gives the others their next token."""
        for ticket in list(self._begun):
            if ticket.answering.answer is not None:
                self._begun.remove(ticket)
                ticket.tell(ticket.answering.answer)
        if not self._begun:
            return
        try:
            self.generator.step([ticket.answering for ticket in self._begun])
        except Exception as error:
            failed, self._begun = self._begun, []
            for ticket in failed:
                ticket.tell(self._outcome(ticket, error))

    def _outcome(self, ticket: _Ticket, error: Exception) -> Answer | Exception:
        """What is told of a request that did not come to an answer."""
        if isinstance(error, ValueError):  # by the house rule, what is wrong with the request
            return error
        if isinstance(error, Interrupted):
            if ticket.stop.is_set():
                return NOTHING_SAID
            return NoAnswer(
                f"no word came within {self.limits.answer_seconds:.0f} s: ask with fewer or "
                "shorter pictures and recordings",
                "timeout",
                error,
            )
        log.error("a request failed", exc_info=error)
        self.generator.free()
        return NoAnswer(
            f"the model failed on this question ({type(error).__name__}): ask again, or clear "
            "the conversation",
            "failed",
            error,
        )
