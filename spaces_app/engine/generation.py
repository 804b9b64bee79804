"""Answers: reading the prompt, going on from what is in memory, token after token."""

import contextlib
import itertools
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from .decoding import SideBySide, attend_side_by_side
from .media import MediaLimits
from .prefix import PrefixStore, bytes_per_token
from .prompt import Prompt, PromptReader

SHORTEST = 32  # tokens that a conversation must be able to have
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


NOTHING_SAID = Answer("", [], "stopped", 0, 0, 0, 0.0, 0.0, 0.0)
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


class Sequence:
    """An answer that is being given: what was computed for it, and its tokens so far.

    Args:
        request: what is answered.
        emit: is called with what was heard and with the text as it grows.
        ending: when to end it early.
    """

    def __init__(self, request: Request, emit: Callable[[Event], None], ending: Ending):
        self.request, self.emit, self.ending = request, emit, ending
        self.begun = time.monotonic()
        self.media_seconds = self.first_token_seconds = 0.0
        self.text = ""
        self.ids: list[int] = []
        self.reserved = 0  # bytes, for its keys and values
        self.answer: Answer | None = None  # when it has come to its end

    def read(self, prompt: Prompt, cache: Cache, reused: int, limit: int) -> None:
        """Notes what the model is given.

        Args:
            prompt: what the request is for the model.
            cache: of the first `reused` positions of the prompt; all that is computed goes into it.
            limit: most tokens of the answer.
        """
        self.prompt, self.cache, self.reused, self.limit = prompt, cache, reused, limit
        self.media_seconds = time.monotonic() - self.begun
        if prompt.heard:
            self.emit(Heard(prompt.heard))

    def choose(self, logits: torch.Tensor) -> int:
        """The next token, by the artefact's generation config and the request.

        Args:
            logits: (1, V) behind the last token.
        """
        ids = torch.cat([self.prompt.ids, torch.tensor([self.ids], dtype=torch.long)], dim=1)
        scores = self.processors(ids.to(logits.device), logits.float())
        if self.request.temperature:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).item()
        return scores.argmax(dim=-1).item()

    def add(self, token: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Goes on by a token; emits the whole text when that completes a character.

        The whole and not the new part of it: what a token adds depends on the tokens before it, and
        a byte-level token may be a third of a character.
        """
        if not self.ids:
            self.first_token_seconds = time.monotonic() - self.begun
        self.ids.append(token)
        before = self.text.rstrip(UNFINISHED)
        self.text = tokenizer.decode(self.ids, skip_special_tokens=True)
        if (shown := self.text.rstrip(UNFINISHED)) != before:
            self.emit(Text(shown.lstrip()))

    def end(self, ended: str) -> None:
        """Makes the answer of what there is."""
        self.answer = Answer(
            text=self.text.strip(),
            token_ids=self.ids,
            ended=ended,
            prompt_tokens=self.prompt.ids.shape[1],
            reused_tokens=self.reused,
            encoded_media=self.prompt.encoded,
            media_seconds=self.media_seconds,
            first_token_seconds=self.first_token_seconds,
            total_seconds=time.monotonic() - self.begun,
        )


class Generator:
    """Answers requests with one model, one or several side by side.

    Args:
        model, processor: of the artefact, in eval mode.
        media_budget: bytes of tower outputs to keep.
        prefix_budget: bytes of keys and values, of answers under way and of what is kept of
            conversations; one conversation may take half of it.
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
        self._token_bytes = bytes_per_token(model.config, model.dtype.itemsize)
        context = model.config.text_config.max_position_embeddings
        context = min(context, prefix_budget // 2 // self._token_bytes)
        if context < SHORTEST:
            raise ValueError(
                f"got {prefix_budget} bytes for keys and values, half of which holds conversations "
                f"of {context} tokens, expected {SHORTEST} or more: raise PHI_MM_PREFIX_MB"
            )
        limits = limits or MediaLimits()
        self.reader = PromptReader(model, processor, media_budget, limits, context)
        self.prefixes = PrefixStore(model.config, prefix_budget)
        self._layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        attend_side_by_side(model)

    def answer(self, request: Request, emit: Callable[[Event], None], ending: Ending) -> Answer:
        """Answers one request from its beginning to its end; raises as `begin`."""
        sequence = self.begin(request, emit, ending)
        while sequence.answer is None:
            self.step([sequence])
        return sequence.answer

    def begin(self, request: Request, emit: Callable[[Event], None], ending: Ending) -> Sequence:
        """An answer with its first token; it may have come to its end with that.

        Raises:
            ValueError: the request cannot be answered; nothing was computed for its text.
            Interrupted: `ending` was reached before the first token.
        """
        sequence = Sequence(request, emit, ending)
        with _interruptible(self._layers, ending):
            prompt = self.reader.read(request.messages)
            length = prompt.ids.shape[1]
            limit = min(request.max_new_tokens, self.reader.context - length)
            sequence.read(prompt, *self.prefixes.take(request.conversation, prompt), limit)
            sequence.reserved = (length + limit) * self._token_bytes
            self.prefixes.kept.reserve(sequence.reserved)
            with self._released_if_broken([sequence]):
                self._go_on(sequence, self._read_prompt(sequence))
        return sequence

    @property
    def has_room(self) -> bool:
        """Whether there is memory for the keys and values of one more answer."""
        return self.prefixes.kept.reserved * 2 <= self.prefixes.kept.budget

    def step(self, sequences: list[Sequence]) -> None:
        """One more token for each of several answers that have not come to their end."""
        with torch.no_grad(), self._released_if_broken(sequences):
            # One pass turns all its positions in one way.
            in_order = sorted(sequences, key=self._is_long)
            for _, some in itertools.groupby(in_order, key=self._is_long):
                together = list(some)
                for sequence, logits in zip(together, self._next_logits(together), strict=True):
                    self._go_on(sequence, logits)

    def forget(self, conversation: str) -> None:
        """Frees what is kept of a conversation."""
        self.prefixes.kept.pop(conversation)

    def free(self) -> None:
        """Frees all that is kept to be quicker, as after running out of memory."""
        self.prefixes.kept.clear()
        self.reader.features.clear()

    @contextlib.contextmanager
    def _released_if_broken(self, sequences: list[Sequence]) -> Iterator[None]:
        """Gives back what is reserved for answers that come to no end."""
        try:
            yield
        except BaseException:
            for sequence in sequences:
                self._release(sequence)
            raise

    def _release(self, sequence: Sequence) -> None:
        self.prefixes.kept.reserve(-sequence.reserved)
        sequence.reserved = 0

    def _read_prompt(self, sequence: Sequence) -> torch.Tensor:
        """Computes what is new in the prompt; returns logits (1, V) behind it.

        `generate` prepares it: it projects the media and makes what chooses the tokens.
        """
        prompt, request = sequence.prompt, sequence.request

        def first_pass(
            model, input_ids, logits_processor, stopping_criteria, generation_config, **prepared
        ) -> torch.Tensor:
            sequence.processors = logits_processor
            sequence.modalities = prepared.get("modality_mask")
            new = input_ids.shape[1] - sequence.reused
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=new, is_first_iteration=True, **prepared
            )
            return model(**inputs).logits[:, -1]

        inputs = {"input_ids": prompt.ids, **prompt.inputs_after(sequence.reused)}
        chance = {"temperature": request.temperature} if request.temperature else {}
        return self.model.generate(
            **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
            attention_mask=torch.ones_like(prompt.ids, device=self.model.device),
            past_key_values=sequence.cache,
            max_new_tokens=sequence.limit,
            do_sample=bool(chance),
            **chance,
            custom_generate=first_pass,
        )

    def _next_logits(self, sequences: list[Sequence]) -> tuple[torch.Tensor, ...]:
        """(1, V) behind the last token of each."""
        device = self.model.device
        modalities = [s.modalities for s in sequences if s.modalities is not None]
        logits = self.model(
            input_ids=torch.tensor([s.ids[-1:] for s in sequences], device=device),
            position_ids=torch.tensor(
                [[s.cache.get_seq_length()] for s in sequences], device=device
            ),
            past_key_values=SideBySide([s.cache for s in sequences]),
            attention_mask=torch.ones(1, 1, 1, 1, device=device),  # nothing is hidden
            modality_mask=torch.cat(modalities) if modalities else None,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1].split(1)

    def _go_on(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Adds the next token; notes when that was the last one."""
        sequence.add(sequence.choose(logits), self.processor.tokenizer)
        ends = self.model.generation_config.eos_token_id
        if sequence.ids[-1] in (ends if isinstance(ends, list) else [ends]):
            self._end(sequence, "finished")
        elif len(sequence.ids) == sequence.limit:
            self._end(sequence, "length")
        elif sequence.ending.reached():
            self._end(sequence, sequence.ending.reason)

    def _end(self, sequence: Sequence, ended: str) -> None:
        sequence.end(ended)
        self._release(sequence)
        conversation = sequence.request.conversation
        self.prefixes.keep(conversation, sequence.prompt, sequence.ids, sequence.cache)

    def _is_long(self, sequence: Sequence) -> bool:
        return self.prefixes.is_long(sequence.cache.get_seq_length() + 1)


@contextlib.contextmanager
def _interruptible(layers: list[nn.Module], ending: Ending) -> Iterator[None]:
    """Lets `ending` interrupt towers and prefill between two layers. Once tokens come they are the
    better place to stop: nothing is lost then.
    """

    def check(module, inputs):
        if ending.reached():
            raise Interrupted(ending.reason)

    hooks = [layer.register_forward_pre_hook(check) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
