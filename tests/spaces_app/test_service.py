"""The queue before the model: order, places, refusals, and that nobody blocks the next."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from engine.generation import (
    UNFINISHED,
    Answer,
    Generator,
    Request,
    Sequence,
    Text,
    Waiting,
)
from engine.service import Engine, Limits
from engine.store import BoundedStore
from engine.turns import Turns

from .conftest import assistant, plainly, user

PLENTY = 1 << 30


def test_conversations_take_turns() -> None:
    turns = Turns(capacity=6)
    for conversation, item in (("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5), ("c", 6)):
        turns.put(conversation, item)
    with pytest.raises(ValueError, match="6 questions are waiting already"):
        turns.put("d", 7)
    assert turns.in_order() == [1, 4, 5, 2, 6, 3]
    assert turns.take(0) == 1
    turns.put("d", 7)
    assert turns.in_order() == [4, 5, 2, 7, 6, 3]
    assert turns.remove("c", 5) and not turns.remove("c", 5)
    taken = [turns.take(0) for _ in range(5)]
    assert taken == [4, 6, 2, 7, 3]
    assert turns.take(0) is None and len(turns) == 0


def test_store_lets_go_of_what_was_not_used_for_longest() -> None:
    store = BoundedStore(10)
    for name, size in (("a", 4), ("b", 4), ("c", 2)):
        store.put(name, name.upper(), size)
    assert store.get("a") == "A"
    store.put("d", "D", 5)
    assert [name in store for name in "abcd"] == [True, False, False, True]
    store.put("a", "new", 1)
    assert (store.get("a"), store.used, len(store)) == ("new", 6, 2)
    store.put("e", "E", 11)
    assert "e" not in store and store.used == 6
    store.reserve(6)
    assert [name in store for name in "ad"] == [True, False] and store.used == 1
    store.put("f", "F", 4)
    assert [name in store for name in "af"] == [False, True]
    store.reserve(-6)
    store.put("g", "G", 6)
    assert [name in store for name in "fg"] == [True, True]


class Gate:
    """The engine's own generator behind a door, so that tests decide when an answer is begun."""

    precision, name, has_room = "fp32", "toy", True

    def __init__(self, generator: Generator):
        self.generator, self.open, self.begun = generator, threading.Event(), []
        self.side_by_side = 0  # at the most

    def begin(self, request: Request, emit: Callable, ending) -> Sequence:
        self.begun.append(request.conversation)
        while not self.open.wait(0.01) and not ending.reached():
            pass
        return self.generator.begin(request, emit, ending)

    def step(self, sequences: list[Sequence]) -> None:
        self.side_by_side = max(self.side_by_side, len(sequences))
        self.generator.step(sequences)

    def forget(self, conversation: str) -> None:
        self.generator.forget(conversation)

    def free(self) -> None:
        self.generator.free()


@pytest.fixture
def gate(loaded) -> Gate:
    return Gate(Generator(*loaded, PLENTY, PLENTY))


@pytest.fixture
def make_engine(gate: Gate):
    """Engine behind the gate, closed when the test ends."""
    made = []

    def make(**limits) -> Engine:
        made.append(Engine(lambda: gate, Limits(**limits)))
        made[-1].start()
        return made[-1]

    yield make
    gate.open.set()
    for engine in made:
        engine.close()


async def collect(engine: Engine, request: Request) -> list:
    return [event async for event in engine.stream(request)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def question(conversation: str, text: str = "hello", tokens: int = 4) -> Request:
    return Request(conversation, [user(text)], tokens)


def test_everyone_gets_his_own_answer_and_is_told_his_place(make_engine, gate, loaded) -> None:
    engine = make_engine(together=1)

    async def crowd() -> list[list]:
        first = asyncio.create_task(collect(engine, question("a", "first")))
        await until(lambda: gate.begun == ["a"])
        rest = [asyncio.create_task(collect(engine, question("a", "second")))]
        await until(lambda: engine.waiting == 1)
        rest += [asyncio.create_task(collect(engine, question(name, name))) for name in "bc"]
        await until(lambda: engine.waiting == 3)
        gate.open.set()
        return await asyncio.gather(first, *rest)

    events = asyncio.run(crowd())
    assert gate.begun == ["a", "a", "b", "c"] and gate.side_by_side == 1
    places = [[e.place for e in some if isinstance(e, Waiting)] for some in events]
    assert places[0] == [1]
    assert places[1][0] == 1 and places[2][0] == 2 and places[3][0] == 3
    assert places[3] == [3, 2, 1]
    for some, text in zip(events, ("first", "second", "b", "c"), strict=True):
        assert some[-1].token_ids == plainly(*loaded, [user(text)], 4)
        # A random model may say nothing but parts of characters, which are not shown.
        shown = [event.text for event in some if isinstance(event, Text)]
        assert "".join(shown[-1:]).strip() == some[-1].text.rstrip(UNFINISHED).strip()


@pytest.mark.parametrize("together", [3, 8])
def test_answers_side_by_side_are_those_of_each_alone(
    make_engine, gate, loaded, media: Path, together: int
) -> None:
    engine, messages = make_engine(together=together), {}
    gate.open.set()
    for number, name in enumerate("abcdefgh"):
        seen = f"{media}/{number % 4}.png" if number % 2 else f"{media}/{number % 4}.wav"
        messages[name] = [user(seen, "what?" * (number + 1))]

    async def ask(name: str, tokens: int) -> Answer:
        return (await collect(engine, Request(name, messages[name], tokens)))[-1]

    async def crowd() -> list[Answer]:
        first = await asyncio.gather(*(ask(name, 20 + 3 * i) for i, name in enumerate(messages)))
        for name, answer in zip(messages, first, strict=True):
            messages[name] = [*messages[name], assistant(answer.text), user("and?")]
        return first + await asyncio.gather(*(ask(name, 12) for name in messages))

    answers = asyncio.run(crowd())
    assert gate.side_by_side == together and engine.answering == 0
    for number, (name, said) in enumerate(messages.items()):
        assert answers[number].token_ids == plainly(*loaded, said[:1], 20 + 3 * number), name
        assert answers[number + 8].token_ids == plainly(*loaded, said, 12), name
        assert answers[number + 8].reused_tokens > 0


def test_a_conversation_is_answered_one_question_at_a_time(make_engine, gate, loaded) -> None:
    engine = make_engine()

    async def crowd() -> list[list]:
        asked = [question("a", "first", 12), question("a", "second", 12), question("b", "b", 12)]
        tasks = [asyncio.create_task(collect(engine, request)) for request in asked]
        await until(lambda: engine.waiting == 2)
        gate.open.set()
        return await asyncio.gather(*tasks)

    answers = [events[-1].token_ids for events in asyncio.run(crowd())]
    assert gate.begun == ["a", "b", "a"] and gate.side_by_side == 2
    assert answers == [plainly(*loaded, [user(text)], 12) for text in ("first", "second", "b")]


def test_without_memory_for_one_more_a_request_waits_its_turn(make_engine, gate) -> None:
    engine, gate.has_room = make_engine(), False
    gate.open.set()

    async def crowd() -> list[list]:
        return await asyncio.gather(*(collect(engine, question(name, tokens=12)) for name in "abc"))

    assert all(isinstance(events[-1], Answer) for events in asyncio.run(crowd()))
    assert gate.side_by_side == 1


def test_what_fails_side_by_side_is_told_to_all_and_the_next_is_served(
    make_engine, gate, caplog
) -> None:
    engine = make_engine()
    gate.open.set()

    def fail(sequences: list) -> None:
        if len(sequences) == 2:
            raise RuntimeError("out of memory")

    async def crowd() -> None:
        step, gate.step = gate.step, fail
        tasks = [asyncio.create_task(collect(engine, question(name))) for name in "ab"]
        for task in tasks:
            with pytest.raises(ValueError, match="failed on this question .RuntimeError.: ask"):
                await task
        gate.step = step
        assert isinstance((await collect(engine, question("a")))[-1], Answer)

    asyncio.run(crowd())
    assert engine.answering == 0 and "out of memory" in caplog.text


def test_abandoned_and_cancelled_streams_free_the_worker(make_engine, gate) -> None:
    engine = make_engine()

    async def leave() -> list:
        working = asyncio.create_task(collect(engine, question("a", tokens=2000)))
        await until(lambda: gate.begun == ["a"])
        waiting = [asyncio.create_task(collect(engine, question(f"w{i}"))) for i in range(20)]
        await until(lambda: engine.waiting == 20)
        for task in (*waiting, working):
            task.cancel()
        await asyncio.gather(working, *waiting, return_exceptions=True)
        assert engine.waiting == 0
        gate.open.set()
        stream = engine.stream(question("b", tokens=2000))
        async for event in stream:
            if isinstance(event, Text):
                break
        await stream.aclose()
        return await collect(engine, question("c"))

    events = asyncio.run(leave())
    assert isinstance(events[-1], Answer)
    assert gate.begun == ["a", "b", "c"] and engine.answering == 0


def test_a_full_queue_and_a_long_wait_are_refused(make_engine, gate) -> None:
    engine = make_engine(waiting=1, wait_seconds=0.2)

    async def crowd() -> None:
        working = asyncio.create_task(collect(engine, question("a")))
        await until(lambda: gate.begun == ["a"])
        waiting = asyncio.create_task(collect(engine, question("b")))
        await until(lambda: engine.waiting == 1)
        with pytest.raises(ValueError, match="1 questions are waiting already"):
            await collect(engine, question("c"))
        with pytest.raises(ValueError, match="no answer could be begun within 0 s"):
            await waiting
        assert engine.waiting == 0
        gate.open.set()
        assert isinstance((await working)[-1], Answer)

    asyncio.run(crowd())


def test_failures_are_sentences_and_the_next_is_served(make_engine, gate, caplog) -> None:
    engine = make_engine(answer_seconds=0.0)

    async def fail() -> None:
        gate.open.set()
        with pytest.raises(ValueError, match="no word came within 0 s"):
            await collect(engine, question("a"))
        engine.limits = Limits()
        with pytest.raises(ValueError, match="conversation of .* expected fewer than 2048"):
            await collect(engine, question("a", "x" * 2100))
        real, gate.generator.reader = gate.generator.reader, None
        gate.free = lambda: None
        with pytest.raises(ValueError, match="failed on this question .AttributeError.: ask again"):
            await collect(engine, question("a"))
        gate.generator.reader = real
        assert isinstance((await collect(engine, question("a")))[-1], Answer)

    asyncio.run(fail())
    assert "a request failed" in caplog.text


def test_a_model_that_cannot_be_loaded_is_told_to_all(caplog) -> None:
    def load() -> Generator:
        threading.Event().wait(0.1)
        raise ValueError("got 1.00 GB of free memory, expected more")

    engine = Engine(load, Limits())

    async def ask() -> None:
        early = asyncio.create_task(collect(engine, question("a")))
        await until(lambda: engine.waiting == 1)
        engine.start()
        for attempt in (early, asyncio.create_task(collect(engine, question("b")))):
            with pytest.raises(ValueError, match="could not be loaded: got 1.00 GB"):
                await attempt
            await until(lambda: engine.failure is not None)

    asyncio.run(ask())
    engine.close()
    assert not engine.ready and not engine.alive


def test_forgetting_frees_the_conversation(make_engine, gate, media: Path) -> None:
    engine = make_engine()
    gate.open.set()

    async def talk() -> None:
        messages = [user(f"{media}/0.png", "what?")]
        first = (await collect(engine, Request("a", messages, 4)))[-1]
        messages += [assistant(first.text), user("and?")]
        assert (await collect(engine, Request("a", messages, 4)))[-1].reused_tokens > 0
        engine.forget("a")
        assert (await collect(engine, Request("a", messages, 4)))[-1].reused_tokens == 0

    asyncio.run(talk())
