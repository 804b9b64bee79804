"""What users think of answers: a number always, words and the conversation with consent."""

import asyncio
import sqlite3
from pathlib import Path

import gradio as gr
import pytest
from engine.service import Engine, Limits
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from pages.chat import ChatPage
from pages.conversation import Conversation, Turn
from records.record import Content, Feedback, Record
from records.store import Store

HTML = "<img src=x onerror=alert(1)>"
UNTICKED = "got words that may not be kept: tick the box"


def rows(folder: Path, query: str) -> list[tuple]:
    with sqlite3.connect(folder / "requests.sqlite3") as connection:
        return connection.execute(query).fetchall()


def feedback(folder: Path) -> list[tuple]:
    return rows(folder, "SELECT rating, reason, correction FROM feedback ORDER BY time")


def contents(folder: Path) -> list[tuple]:
    return rows(folder, "SELECT question, media FROM requests ORDER BY number")


def test_the_last_word_counts_and_goes_with_its_row(tmp_path: Path, media: Path) -> None:
    store = Store(tmp_path, rows=2)
    for name in ("r1", "r2"):
        store.add(Record(name, "a", 1.0, images=1), None)
    kept = {
        "r1": Content("what?", "a\ud800", [f"{media}/0.png"]),
        "r3": Content("not there", "", [f"{media}/1.png"]),
    }
    assert store.rate(Feedback("r1", "a", 2.0, -1, None, "a star"), kept)
    assert store.rate(Feedback("r1", "a", 3.0, 1, "nice\udfff"), {"r1": Content("other", "", [])})
    assert feedback(tmp_path) == [(1, "nice?", "a star")]
    assert contents(tmp_path) == [("what?", '["r1.0.png"]'), (None, "[]")]
    assert [path.name for path in store.media.iterdir()] == ["r1.0.png"]
    assert store.rate(Feedback("r1", "a", 4.0, 0, "taken back"), {})
    assert feedback(tmp_path) == [(0, None, None)]
    assert not store.rate(Feedback("r1", "b", 5.0, 1), {}) and len(feedback(tmp_path)) == 1
    assert store.rate(Feedback("r2", "a", 5.0, 1), {})
    store.add(Record("r3", "b", 6.0), None)  # r1 is too old now
    assert feedback(tmp_path) == [(1, None, None)]
    assert store.delete("a") == 1 and feedback(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        gone = Content("", "", [f"{media}/0.png", f"{tmp_path}/gone.png"])
        store.rate(Feedback("r3", "b", 7.0, 1, "good"), {"r3": gone})
    assert feedback(tmp_path) == [] and list(store.media.iterdir()) == []
    store.close()


def clicked(place: int | list[int], liked: bool | str) -> gr.LikeData:
    return gr.LikeData(None, {"index": place, "value": "", "liked": liked})


def test_the_page_takes_thumbs_and_words(make_engine, media, tmp_path, monkeypatch) -> None:
    engine, folder, told = make_engine(), tmp_path / "store", []
    monkeypatch.setattr(gr, "Warning", told.append)
    monkeypatch.setattr(gr, "Info", told.append)
    page = ChatPage(engine)
    page.build()
    form, talk = page.rating, Conversation()

    async def ask(*given, keep=False) -> None:
        async for _ in page._send(*given, 6, 0.0, keep, talk):
            pass

    async def talk_and_rate() -> None:
        await ask("what?", f"{media}/0.png", f"{media}/1.wav")
        await ask("and?", f"{media}/1.png", None)
        await ask("then?", f"{media}/2.png", None)
        shown = talk.shown()
        assert [m["role"] for m in shown].index("assistant") == 3
        thumbs, opened, about, *empty = await form._like(talk, clicked([6, 1], False))
        assert thumbs["feedback_value"] == [None] * 2 + ["Dislike"] * 2 + [None] * 2
        assert opened["visible"] and about == talk.turns[1].answer and empty == ["", ""]
        assert feedback(folder) == [(-1, None, None)]
        # Without consent nothing of it is written; neither is nothing.
        await form._send("", HTML, False, talk)
        await form._send(" ", "", True, talk)
        assert told.pop().startswith("got no words: type what was wrong")
        assert told.pop().startswith(UNTICKED)
        assert feedback(folder) == [(-1, None, None)]
        assert contents(folder) == [(None, "[]")] * 3
        closed = await form._send("", f" {HTML}", True, talk)
        assert not closed[0]["visible"] and told.pop() == "Thank you."
        assert feedback(folder) == [(-1, None, HTML)]
        first, second, third = (turn.request for turn in talk.turns)
        assert contents(folder) == [
            ("what?", f'["{first}.0.png", "{first}.1.wav"]'),
            ("and?", f'["{second}.0.png"]'),
            (None, "[]"),
        ]
        # Taken back, and said of another answer.
        thumbs, closed, *_ = await form._like(talk, clicked(6, ""))
        assert thumbs["feedback_value"] == [None] * 6 and not closed["visible"]
        assert feedback(folder) == [(0, None, None)]
        await form._like(talk, clicked(8, True))
        async for _ in page._retry(
            6, 0.0, False, talk, gr.RetryData(None, {"index": 8, "value": ""})
        ):
            pass
        assert talk.thumbs() == [None] * 6
        await form._send("good", "", True, talk)
        assert told == ["the answer that you rated is gone: rate another one"]
        thumbs, *rest = await form._like(talk, clicked(10, True))
        assert told.pop().startswith("got a message that is gone")
        await page._delete(talk)
        assert feedback(folder) == [] and list((folder / "media").iterdir()) == []

    asyncio.run(talk_and_rate())


def test_a_locked_database_is_told_and_the_conversation_goes_on(make_engine, tmp_path) -> None:
    engine, folder = make_engine(), tmp_path / "store"
    page, talk = ChatPage(engine), Conversation()
    talk.ask("hello", None, None)

    async def rate() -> None:
        async for _ in talk.answer(engine, 6, 0.0):
            pass
        rated = page.rating.rate(talk, talk.turns[0], 1, "good", "", True)
        with sqlite3.connect(folder / "requests.sqlite3", isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(ValueError, match="your feedback could not be stored now"):
                await rated
            other.execute("ROLLBACK")
        other.close()
        assert talk.turns[0].rating == 0 and talk.turns[0].answer
        await page.rating.rate(talk, talk.turns[0], 1, "good", "", True)
        assert feedback(folder) == [(1, "good", None)]
        engine.journal.store.delete(talk.name)
        with pytest.raises(ValueError, match="nothing is kept of this answer"):
            await page.rating.rate(talk, talk.turns[0], 1)

    asyncio.run(rate())


def test_programs_rate_and_delete(make_engine, media: Path, tmp_path: Path) -> None:
    engine, folder = make_engine(), tmp_path / "store"
    blocks = ChatPage(engine).build()
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True)
    client = Client(url, verbose=False)
    with pytest.raises(AppError, match="got no answer to rate: ask something first"):
        client.predict(1, api_name="/feedback")
    client.predict("what?", handle_file(f"{media}/0.png"), length=16, api_name="/ask")
    client.predict("hello", length=16, keep=True, api_name="/ask")
    assert [question for question, _ in contents(folder)] == [None, "hello"]
    client.predict(1, api_name="/feedback")
    for given, words in (
        ({"rating": -1, "correction": "a moon"}, UNTICKED),
        ({"rating": 0.5}, "got the rating 0.5, expected 1, -1, or 0 to take it back"),
    ):
        with pytest.raises(AppError, match=words):
            client.predict(**given, api_name="/feedback")
    assert feedback(folder) == [(1, None, None)]
    client.predict(-1, correction="a moon", keep=True, api_name="/feedback")
    assert feedback(folder) == [(-1, None, "a moon")]
    assert [question for question, _ in contents(folder)] == ["what?", "hello"]
    other = Client(url, verbose=False)
    other.predict("mine", length=16, keep=True, api_name="/ask")
    client.predict(api_name="/delete")
    assert feedback(folder) == [] and [question for question, _ in contents(folder)] == ["mine"]
    blocks.close()


def test_without_a_store_there_is_nothing_to_rate(make_engine) -> None:
    page = ChatPage(Engine(make_engine().load, Limits()))
    blocks = page.build()
    assert page.talk.feedback_options is None
    names = {function.api_name for function in blocks.fns.values()}
    assert {"ask", "forget"} <= names and not {"feedback", "delete"} & names
    talk = Conversation([Turn("hello", answer="hi", request="r")], "a")
    with pytest.raises(ValueError, match="nothing is kept here, so answers cannot be rated"):
        asyncio.run(page.rating.rate(talk, talk.turns[0], 1))
