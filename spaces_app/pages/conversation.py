"""A conversation: what was asked and answered, for the model, the page and the owner's store."""

import math
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.generation import Answer, Begun, Event, Heard, Request, Text, Waiting
from engine.media import UnusableFile
from engine.service import Engine
from records.record import Content, Feedback

ENDED = {
    "length": "cut at the length that is set",
    "timeout": "cut, because it took too long",
    "stopped": "stopped",
}


@dataclass(eq=False)
class Turn:
    """One question and its answer.

    Attributes:
        text: what was typed.
        image, audio: paths of what was shown and said.
        heard: what a recording was understood as, where the model is given its transcript.
        answer: so far.
        note: what is going on, and at the end what the answer took.
        error: why there is no answer; such a turn is shown, and not said to the model again.
        request: id of the request that asked for the answer.
        rating: what the user thinks of it: 1, -1, or 0 for nothing.
        ended: nothing more will come.
    """

    text: str = ""
    image: str | None = None
    audio: str | None = None
    heard: str = ""
    answer: str = ""
    note: str = "thinking ..."
    error: str = ""
    request: str = ""
    rating: int = 0
    ended: bool = False

    def question(self) -> list[dict[str, str]]:
        """The parts of the user's message."""
        media = [("image", self.image), ("audio", self.audio), ("text", self.text)]
        return [{"type": kind, kind: given} for kind, given in media if given]

    def shown(self) -> list[dict[str, Any]]:
        """Messages for the page."""
        asked = [_shown(path) for path in (self.image, self.audio) if path]
        asked += [f"*heard:* {self.heard}"] if self.heard else []
        asked += [self.text] if self.text else []
        said = [f"**{self.error}**"] if self.error else []
        said += [self.answer] if self.answer else []
        said += [f"*{self.note}*"] if self.note else []
        questions = [{"role": "user", "content": part} for part in asked]
        return [*questions, {"role": "assistant", "content": said}]

    def content(self) -> Content:
        """For the owner's store, with the files that are still there."""
        media = [path for path in (self.image, self.audio) if path and Path(path).is_file()]
        return Content(self.text, self.answer, media)

    def take(self, event: Event) -> None:
        """Notes what the engine says."""
        if isinstance(event, Waiting):
            self.note = f"waiting: number {event.place} in the queue"
        elif isinstance(event, Begun):
            self.note = "thinking ..."
        elif isinstance(event, Heard):
            # Earlier recordings come first; the last one is this turn's, if it has one.
            self.heard = event.transcripts[-1] if self.audio else ""
        elif isinstance(event, Text):
            self.answer, self.note = event.text, "..."
        elif isinstance(event, Answer):
            self.answer, self.note, self.ended = event.text, describe(event), True

    def fail(self, error: ValueError) -> None:
        """Notes why there is no answer; files are named as the user knows them, and those that
        nobody can use are not kept.
        """
        self.error, self.note, self.ended = str(error), "", True
        for path in filter(None, (self.image, self.audio)):
            self.error = self.error.replace(path, Path(path).name)
        if isinstance(error, UnusableFile):
            Path(error.path).unlink(missing_ok=True)


def _shown(path: str) -> dict[str, str] | str:
    """A file; its name when it is gone."""
    return {"path": path} if Path(path).is_file() else Path(path).name


def describe(answer: Answer) -> str:
    """What an answer took, in one line."""
    if not answer.token_ids:
        return ENDED[answer.ended]
    words = [
        f"media {answer.media_seconds:.1f} s",
        f"first word after {answer.first_token_seconds:.1f} s",
        f"{answer.tokens_per_second:.1f} tokens/s",
        f"{answer.reused_tokens} of {answer.prompt_tokens} tokens from memory",
    ]
    if answer.ended in ENDED:
        words.append(ENDED[answer.ended])
    return " · ".join(words)


@dataclass
class Conversation:
    """The turns so far, and from the first question on a name that nobody else has: gradio copies
    the empty one for every visitor.
    """

    turns: list[Turn] = field(default_factory=list)
    name: str = ""
    rated: Turn | None = None  # whose answer words are given about

    def ask(self, text: str | None, image: str | None, audio: str | None) -> None:
        """Adds a question.

        Raises:
            ValueError: nothing is asked.
        """
        # JSON can bring halves of surrogate pairs, which no tokenizer takes.
        text = (text or "").encode("utf-8", "replace").decode("utf-8").strip()
        if not text and audio is None:
            raise ValueError("got no question: type one, or record one")
        self.name = self.name or uuid.uuid4().hex
        self.turns.append(Turn(text, image, audio))

    @property
    def answering(self) -> bool:
        """Whether the last question is still being answered."""
        return bool(self.turns) and not self.turns[-1].ended

    def go_back(self, message: int | list[int]) -> None:
        """Forgets everything after a question.

        Args:
            message: place of one of its messages, as `turn_of` takes it.
        """
        asked = self.turn_of(message)
        place = self.turns.index(asked)
        # A new turn: the old one may still be written to.
        self.turns[place:] = [Turn(asked.text, asked.image, asked.audio)]

    def turn_of(self, message: int | list[int]) -> Turn:
        """The turn that a message is a part of.

        Args:
            message: its place in `shown()`; a message of several parts has the part's behind it.

        Raises:
            ValueError: there is no such message any more.
        """
        place = message if isinstance(message, int) else message[0]
        turns = [turn for turn in self.turns for _ in turn.shown()]
        if not 0 <= place < len(turns):
            raise ValueError("got a message that is gone: choose one that is shown")
        return turns[place]

    async def answer(
        self, engine: Engine, max_new_tokens: int, temperature: float, keep: bool = False
    ) -> AsyncIterator[Turn]:
        """Answers the last question; yields its turn whenever there is something new in it.

        What goes wrong is noted in the turn, and the conversation can go on.

        Args:
            keep: the user allows the owner to keep the question and its answer.
        """
        turn = self.turns[-1]
        try:
            yield turn
            request = self._request(max_new_tokens, temperature, keep)
            turn.request = request.id
            async with aclosing(engine.stream(request)) as events:
                async for event in events:
                    turn.take(event)
                    yield turn
        except ValueError as error:
            turn.fail(error)
            yield turn
        finally:
            turn.ended = True  # also when whoever asked is gone

    def feedback(
        self, turn: Turn, rating: int, reason: str, correction: str, keep: bool
    ) -> tuple[Feedback, dict[str, Content]]:
        """What to write down of what the user thinks of an answer: it, and by request the contents
        of the conversation up to there, without which words about its end say nothing.

        Args:
            turn: one of `turns`.
            rating: 1, -1, or 0 to take it back.
            reason, correction: what was wrong, and what it should have said; may be empty.
            keep: the user allows the owner to keep words and contents.

        Raises:
            ValueError: there is no answer, no such rating, or words that may not be kept.
        """
        if not turn.answer:
            raise ValueError("got no answer to rate: ask something first")
        if rating not in (-1, 0, 1):
            raise ValueError(f"got the rating {rating}, expected 1, -1, or 0 to take it back")
        reason, correction = reason.strip() or None, correction.strip() or None
        words = rating and (reason or correction)  # none go with a rating that is taken back
        if words and keep is not True:
            raise ValueError(
                "got words that may not be kept: tick the box that lets the owner keep what you "
                "ask and show (keep=True from a program), or send the rating alone"
            )
        given = Feedback(turn.request, self.name, time.time(), int(rating), reason, correction)
        until = self.turns[: self.turns.index(turn) + 1] if words else []
        return given, {asked.request: asked.content() for asked in until if asked.answer}

    def thumbs(self) -> list[str | None]:
        """The ratings as gradio shows them: one for each part of each answer."""
        names = {1: "Like", -1: "Dislike", 0: None}
        answers = [(turn, turn.shown()[-1]["content"]) for turn in self.turns]
        return [names[turn.rating] for turn, parts in answers for _ in parts]

    def _request(self, max_new_tokens: float, temperature: float, keep: bool) -> Request:
        if not (math.isfinite(max_new_tokens) and math.isfinite(temperature)):
            raise ValueError(
                f"got a longest answer of {max_new_tokens} and a temperature of {temperature}, "
                "expected finite numbers"
            )
        before = [earlier.request for earlier in self.turns[:-1] if earlier.answer]
        return Request(
            self.name,
            self.messages(),
            int(max_new_tokens),
            round(temperature, 2),  # one that is nearly 0 makes infinite numbers
            keep is True,  # nothing else is consent
            parent=before[-1] if before else "",
        )

    def messages(self) -> list[dict[str, Any]]:
        """For the model: all turns that were answered, and the last question."""
        answered = [turn for turn in self.turns[:-1] if turn.answer]
        said = [
            message
            for turn in answered
            for message in (
                {"role": "user", "content": turn.question()},
                {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]},
            )
        ]
        return [*said, {"role": "user", "content": self.turns[-1].question()}]

    def shown(self) -> list[dict[str, Any]]:
        """For the page: a message for each part of a question, and one for its answer.

        A question is not one message of several parts, which gradio 6.31 cannot edit.
        """
        return [message for turn in self.turns for message in turn.shown()]
