"""One answer: reading the prompt, going on from what is in memory, token after token."""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_layers import GradientCheckpointingLayer

from .media import MediaLimits
from .prefix import PrefixStore
from .prompt import PromptReader

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a part of a character's bytes decodes to


@dataclass(frozen=True)
class Request:
    """What a user wants to be answered.

    Attributes:
        conversation: names the conversation; its turns share what was computed for it.
        messages: all turns, the last one the user's; content is a list of parts.
        max_new_tokens: longest answer.
        temperature: 0 for the likeliest words, more for chance.
        keep: the user allows the owner to keep the question and its answer.
        parent: id of the request that the turn before was; empty for a first turn.
        id: its own.
    """

    conversation: str
    messages: list[dict[str, Any]]
    max_new_tokens: int = 256
    temperature: float = 0.0
    keep: bool = False
    parent: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Waiting:
    """The request waits; `place` 1 is the next to be answered."""

    place: int


@dataclass(frozen=True)
class Begun:
    """The request waits no longer, since `at` of `time.monotonic()`."""

    at: float


@dataclass(frozen=True)
class Heard:
    """The transcripts that the recordings became, in reading order."""

    transcripts: list[str]


@dataclass(frozen=True)
class Text:
    """The answer so far, from its start."""

    text: str


@dataclass(frozen=True)
class Answer:
    """The whole answer, and what it took.

    Attributes:
        ended: "finished", "length" (there was more to say), "stopped" or "timeout".
        prompt_tokens, reused_tokens: length of the prompt, and how much of it was in memory.
        encoded_media: pictures and recordings that had to be looked at or heard now.
        media_seconds, first_token_seconds, total_seconds: since the answer was begun.
    """

    text: str
    token_ids: list[int]
    ended: str
    prompt_tokens: int
    reused_tokens: int
    encoded_media: int
    media_seconds: float
    first_token_seconds: float
    total_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token."""
        return (len(self.token_ids) - 1) / max(self.total_seconds - self.first_token_seconds, 1e-9)


Event = Waiting | Begun | Heard | Text | Answer


class Interrupted(Exception):
    """The request was cancelled, or its time was up, before its first token."""


@dataclass(frozen=True)
class Ending:
    """When to end an answer that has not come to its end.

    Attributes:
        stop: set by whoever does not want the answer any more.
        deadline: of `time.monotonic()`.
    """

    stop: threading.Event
    deadline: float

    def reached(self) -> bool:
        return self.stop.is_set() or time.monotonic() >= self.deadline

    @property
    def reason(self) -> str:
        return "stopped" if self.stop.is_set() else "timeout"


class Generator:
    """Answers requests, one at a time, with one model.

    Args:
        model, processor: of the artefact, in eval mode.
        media_budget: bytes of tower outputs to keep.
        prefix_budget: bytes of keys and values to keep.
        about: what it is, in a few words for the page.
        precision, name: of the model, for the records; the name tells its revision too.
        limits: of the files that are opened.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        media_budget: int,
        prefix_budget: int,
        about: str = "a model",
        precision: str = "fp32",
        name: str = "a model",
        limits: MediaLimits | None = None,
    ):
        self.model, self.processor = model, processor
        self.about, self.precision, self.name = about, precision, name
        self.reader = PromptReader(model, processor, media_budget, limits or MediaLimits())
        self.prefixes = PrefixStore(model.config, prefix_budget)

    def answer(self, request: Request, emit: Callable[[Event], None], ending: Ending) -> Answer:
        """Answers; `emit` is called with what was heard and with the text as it grows.

        Raises:
            ValueError: the request cannot be answered; nothing was computed for its text.
            Interrupted: `ending` was reached before the first token.
        """
        begun = time.monotonic()
        with _interruptible(self.model, ending) as release:
            prompt = self.reader.read(request.messages)
            media_seconds = time.monotonic() - begun
            if prompt.heard:
                emit(Heard(prompt.heard))
            cache, reused = self.prefixes.take(request.conversation, prompt)
            streamer = _TextSoFar(self.processor.tokenizer, emit, on_first_token=release)
            length = prompt.ids.shape[1]
            limit = min(request.max_new_tokens, self.reader.context - length)
            inputs = {"input_ids": prompt.ids, **prompt.inputs_after(reused)}
            ids = self.model.generate(
                **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
                attention_mask=torch.ones_like(prompt.ids, device=self.model.device),
                past_key_values=cache,
                max_new_tokens=limit,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_StopAt(ending)]),
                **_sampling(request.temperature),
            )
        new = ids[0, length:].tolist()
        self.prefixes.keep(request.conversation, prompt, new, cache)
        return Answer(
            text=streamer.text.strip(),
            token_ids=new,
            ended=self._ended(new, limit, ending),
            prompt_tokens=length,
            reused_tokens=reused,
            encoded_media=prompt.encoded,
            media_seconds=media_seconds,
            first_token_seconds=streamer.first_token_at - begun,
            total_seconds=time.monotonic() - begun,
        )

    def forget(self, conversation: str) -> None:
        """Frees what is kept of a conversation."""
        self.prefixes.kept.pop(conversation)

    def free(self) -> None:
        """Frees all that is kept to be quicker, as after running out of memory."""
        self.prefixes.kept.clear()
        self.reader.features.clear()

    def _ended(self, new: list[int], limit: int, ending: Ending) -> str:
        ends = self.model.generation_config.eos_token_id
        if new[-1] in (ends if isinstance(ends, list) else [ends]):
            return "finished"
        return "length" if len(new) == limit else ending.reason


def _sampling(temperature: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


class _TextSoFar(BaseStreamer):
    """Emits the whole text after each token that completes a character.

    The whole and not the new part of it: what a token adds depends on the tokens before it, and
    a byte-level token may be a third of a character.
    """

    def __init__(self, tokenizer, emit: Callable[[Event], None], on_first_token: Callable):
        self.tokenizer, self.emit, self.on_first_token = tokenizer, emit, on_first_token
        self.text = ""
        self.first_token_at = 0.0
        self._ids: list[int] | None = None

    def put(self, value: torch.LongTensor) -> None:
        if self._ids is None:  # the prompt comes first
            self._ids = []
            return
        if not self._ids:
            self.first_token_at = time.monotonic()
            self.on_first_token()
        self._ids += value.flatten().tolist()
        before = self.text.rstrip(UNFINISHED)
        self.text = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        if (shown := self.text.rstrip(UNFINISHED)) != before:
            self.emit(Text(shown.lstrip()))

    def end(self) -> None:
        pass


class _StopAt(StoppingCriteria):
    """Ends generation after the token that is being computed."""

    def __init__(self, ending: Ending):
        self.ending = ending

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.ending.reached(), device=input_ids.device)


@contextlib.contextmanager
def _interruptible(model: PreTrainedModel, ending: Ending) -> Iterator[Callable[[], None]]:
    """Lets `ending` interrupt towers and prefill between two layers, until the function that is
    given is called. Once tokens come they are the better place to stop: nothing is lost then.
    """

    def check(module, inputs):
        if ending.reached():
            raise Interrupted(ending.reason)

    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    hooks = [layer.register_forward_pre_hook(check) for layer in layers]

    def release() -> None:
        while hooks:
            hooks.pop().remove()

    try:
        yield release
    finally:
        release()
