"""What the page shows of a conversation, and what the model is told of it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine.generation import Answer, Generator, Heard, Waiting
from engine.service import NOTHING_SAID, Engine, Limits
from pages.conversation import Conversation, Turn, describe

from .conftest import assistant, plainly, user


@pytest.fixture
def engine(loaded) -> Iterator[Engine]:
    engine = Engine(lambda: Generator(*loaded, 1 << 30, 1 << 30), Limits())
    engine.start()
    yield engine
    engine.close()


def answer(engine: Engine, conversation: Conversation, tokens: int = 6) -> list[tuple]:
    """What the turn said and noted, each time there was something new."""

    async def collect() -> list[tuple]:
        return [(turn.answer, turn.note) async for turn in conversation.answer(engine, tokens, 0.0)]

    return asyncio.run(collect())


def test_questions_edits_and_retries(engine: Engine, loaded, media: Path) -> None:
    model, processor = loaded

    def expected(messages: list[dict]) -> str:
        return processor.tokenizer.decode(plainly(model, processor, messages, 6)).strip()

    talk, picture = Conversation(), f"{media}/0.png"
    talk.ask(" what? ", picture, None)
    seen = answer(engine, talk)
    assert seen[0] == ("", "thinking ...") and seen[1] == ("", "waiting: number 1 in the queue")
    first = [user(picture, "what?")]
    assert seen[-1][0] == expected(first)
    assert seen[-1][1].endswith("tokens from memory · cut at the length that is set")
    assert talk.shown() == [
        {"role": "user", "content": {"path": picture}},
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": [seen[-1][0], f"*{seen[-1][1]}*"]},
    ]
    talk.ask("and?", None, None)
    second = [*first, assistant(seen[-1][0]), user("and?")]
    assert answer(engine, talk)[-1][0] == expected(second)
    assert len({turn.request for turn in talk.turns}) == 2 and talk.turns[0].request
    talk.go_back(3)  # the second question again
    assert [turn.text for turn in talk.turns] == ["what?", "and?"]
    assert answer(engine, talk)[-1][0] == expected(second)
    talk.go_back(1)  # the first one, edited
    talk.turns[-1].text = "why?"
    assert answer(engine, talk)[-1][0] == expected([user(picture, "why?")])
    assert len(talk.turns) == 1


def test_a_failed_turn_is_shown_but_not_said_to_the_model(engine: Engine, loaded, tmp_path) -> None:
    talk = Conversation()
    with pytest.raises(ValueError, match="got no question"):
        talk.ask(" ", None, None)
    gone = tmp_path / "gone.png"
    talk.ask("what?", str(gone), None)
    assert answer(engine, talk)[-1] == ("", "")
    assert talk.shown()[-1]["content"] == ["**got gone.png, which is gone: show or say it again**"]
    talk.ask("hello", None, None)
    assert talk.messages() == [user("hello")]
    ids = plainly(*loaded, [user("hello")], 6)
    assert answer(engine, talk)[-1][0] == loaded[1].tokenizer.decode(ids).strip()
    assert len(talk.shown()) == 5


def test_stopping_ends_the_stream_with_what_was_said(engine: Engine) -> None:
    talk, other = Conversation(), Conversation()
    talk.ask("hello", None, None)
    other.ask("hello", None, None)

    async def stop_both() -> None:
        async for turn in talk.answer(engine, 2000, 0.0):
            if turn.answer and other.turns[-1].note == "thinking ...":
                behind = other.answer(engine, 2000, 0.0)
                for _ in range(2):
                    await anext(behind)
                assert other.turns[-1].note == "waiting: number 1 in the queue"
                engine.stop(other.name)
                assert [turn.note async for turn in behind] == ["stopped"]
                engine.stop(talk.name)

    asyncio.run(stop_both())
    assert talk.turns[-1].note.endswith("stopped") and talk.turns[-1].answer
    assert engine.waiting == 0


def test_what_was_heard_is_shown_under_the_recording(media: Path) -> None:
    turn = Turn("", f"{media}/0.png", f"{media}/gone.wav")
    turn.take(Heard(["an earlier one", "a red star"]))
    turn.take(Waiting(2))
    assert turn.shown() == [
        {"role": "user", "content": {"path": f"{media}/0.png"}},
        {"role": "user", "content": "gone.wav"},  # the disk keeps files for an hour
        {"role": "user", "content": "*heard:* a red star"},
        {"role": "assistant", "content": ["*waiting: number 2 in the queue*"]},
    ]


def test_what_an_answer_took_in_one_line() -> None:
    took = Answer("yes", [1, 2, 3], "finished", 90, 34, 1, 0.42, 0.9, 1.9)
    assert describe(took) == (
        "media 0.4 s · first word after 0.9 s · 2.0 tokens/s · 34 of 90 tokens from memory"
    )
    assert describe(NOTHING_SAID) == "stopped"
