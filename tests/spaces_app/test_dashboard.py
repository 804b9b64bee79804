"""The owner's page: closed to all others, right in its numbers, and safe from what users wrote."""

import csv
import io
import json
import sqlite3
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pandas as pd
import pytest
from engine.service import Engine, Limits
from monitoring import figures
from monitoring.owner import MOST_WRONG, Owner
from monitoring.queries import Records
from monitoring.shown import TABLE
from pages.chat import ChatPage
from pages.dashboard import ALL, Dashboard
from records.journal import Journal
from records.record import COLUMNS, Content, Feedback, Record
from records.store import Store

SECRET = "a long secret of mine"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> ${1+1} **bold**"
NUMBERS = dict(precision="int8", model="toy@1", resident_bytes=2 << 30)


def answered(name: str, asked: float, **numbers) -> Record:
    """A request whose 11 tokens took 1 s in the queue, 2 s to the first token, and 2 s more."""
    taken = dict(waited_seconds=1.0, first_token_seconds=2.0, total_seconds=5.0, new_tokens=11)
    given = NUMBERS | taken | {"outcome": "finished", "prompt_tokens": 20, "characters": 9}
    return Record(name, "a", asked, **(given | numbers))


@pytest.fixture
def store(tmp_path: Path, media: Path) -> Iterator[Store]:
    """One request of two hours ago, and four of the last hour: one of them hostile and rated."""
    store, now = Store(tmp_path / "store", 100), time.time()
    store.add(answered("old", now - 7000, model="toy@0"), None)
    store.add(answered("first", now - 600, images=1), Content("what?", "yes", [f"{media}/0.png"]))
    hostile = Content(EVIL, EVIL, [f"{media}/0.png", f"{media}/1.wav"])
    store.add(answered("second", now - 500, images=1, recordings=1, waiting=7), hostile)
    store.rate(Feedback("second", "a", now, -1, EVIL, EVIL), {})
    failed = Record("failed", "b", now - 400, outcome="failed", error="OSError", **NUMBERS)
    store.add(failed, None)
    store.add(Record("refused", "b", now - 300, outcome="refused", error="E", **NUMBERS), None)
    yield store
    store.close()


@pytest.fixture
def space(store: Store) -> Iterator[SimpleNamespace]:
    """The app with its dashboard, as it is launched; nothing is answered."""
    engine = Engine(None, Limits(), Journal(store))
    blocks = ChatPage(engine).build()
    dashboard = Dashboard(engine, Records(store.folder), Owner(SECRET))
    dashboard.add_to(blocks)
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    handlers = {
        number: block_function
        for number, block_function in blocks.fns.items()
        if block_function.page == "dashboard" and block_function.fn is not None
    }
    yield SimpleNamespace(url=url, handlers=handlers, dashboard=dashboard)
    blocks.close()


class Visitor:
    """One session, as a browser or a program has it."""

    def __init__(self, space: SimpleNamespace):
        self.space, self.session = space, uuid.uuid4().hex

    def call(self, number: int, data: list, event: dict | None = None) -> dict:
        """What a handler answers: `success` and `output`."""
        body = {"data": data, "fn_index": number, "session_hash": self.session}
        body |= {"event_data": event, "trigger_id": None}
        joined = urllib.request.Request(
            f"{self.space.url}gradio_api/queue/join",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        urllib.request.urlopen(joined).read()
        address = f"{self.space.url}gradio_api/queue/data?session_hash={self.session}"
        with urllib.request.urlopen(address) as stream:
            for line in stream:
                message = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if message.get("msg") == "process_completed":
                    return message
        raise AssertionError("the stream ended before the answer")

    def named(self, name: str, data: list, event: dict | None = None) -> dict:
        """The same by the handler's name."""
        numbers = [n for n, made in self.space.handlers.items() if made.fn.__name__ == name]
        return self.call(numbers[0], data, event)


def test_every_handler_is_closed_to_those_who_are_not_logged_in(space) -> None:
    names = {made.fn.__name__ for made in space.handlers.values()}
    assert names == {"_log_in", "_look", "_pace", "_open", "_choose", "_csv"}
    given = {
        "_look": ["all", ALL],
        "_pace": [True, "all"],
        "_open": ["second"],
        "_choose": [],
        "_csv": ["all"],
    }
    chosen = {"row_value": ["second"] * len(TABLE), "index": [0, 0], "value": "second"}
    for number, made in space.handlers.items():
        assert made.api_visibility == "private"
        if made.fn.__name__ == "_log_in":
            continue
        for logged_in in (True, "true", None):  # it is not theirs to say
            data = [logged_in, *given[made.fn.__name__]]
            answer = Visitor(space).call(number, data, chosen)
            assert answer["success"] is False, made.fn.__name__
            assert answer["output"]["error"] == "you are not logged in: load the page again"
            assert set(answer["output"]) <= {"error", "visible", "duration", "title"}
    with urllib.request.urlopen(f"{space.url}dashboard") as page:
        assert page.status == 200 and b"toy@" not in page.read()


def test_the_secret_lets_in_one_visitor_and_wrong_ones_are_bounded(space, caplog) -> None:
    owner, other = Visitor(space), Visitor(space)
    assert owner.named("_log_in", [SECRET])["success"]
    assert owner.named("_csv", [None, "all"])["success"]
    assert not other.named("_csv", [None, "all"])["success"]
    assert other.named("_log_in", [None])["output"]["error"] == "this is not the owner's secret"
    for number in range(1, MOST_WRONG):
        answer = other.named("_log_in", [f"wrong {number} \ud800"])
        assert answer["output"]["error"] == "this is not the owner's secret"
    answer = other.named("_log_in", [SECRET])
    assert "wrong secrets were given within 60 s" in answer["output"]["error"]
    assert "a wrong secret was given: number 10 in a minute" in caplog.text
    assert "wrong 9" not in caplog.text
    assert owner.named("_csv", [None, "all"])["success"]


def test_the_last_hour_in_numbers(space) -> None:
    owner = Visitor(space)
    owner.named("_log_in", [SECRET])
    tiles, drift, *plots, table = owner.named("_look", [None, "last hour", ALL])["output"]["data"]
    for name, number in (
        ("requests", "4"),
        ("errors", "1 (25.0%)"),
        ("refused", "1 (25.0%)"),
        ("first token p95", "3.00 s"),
        ("tokens per second", "5.0"),
        ("satisfied", "0% of 1"),
    ):
        assert f"<dt>{name}</dt><dd>{number}</dd>" in tiles
    assert "<dt>stability index of prompt tokens</dt><dd>0.04, steady</dd>" in drift

    def totals(plot: dict) -> dict:
        frame = pd.DataFrame(plot["data"], columns=plot["columns"])
        return frame.groupby(frame.columns[1])[frame.columns[2]].sum().to_dict()

    outcomes, errors, first_token, speed, waiting, memory, given, thumbs, *_ = plots
    wrong = {"failed": 1, "refused": 1, "timeout": 0}
    assert totals(outcomes) == {"finished": 2, "length": 0, "stopped": 0, **wrong}
    assert totals(errors) == wrong
    assert "<dt>failed OSError</dt><dd>1</dd>" in tiles and "<dt>refused E</dt><dd>1" in tiles
    kinds = {"picture": 1, "picture and recording": 1, "recording": 0, "text alone": 2}
    assert totals(given) == kinds
    assert totals(thumbs) == {"down": 1, "up": 0}
    assert {row[1] for row in first_token["data"]} == {"p50", "p95", "p99", "new model"}
    assert {row[2] for row in first_token["data"] if row[2] is not None} == {3.0}
    assert {row[2] for row in speed["data"] if row[2] is not None} == {5.0}
    assert max(row[1] for row in waiting["data"]) == 7
    assert {row[2] for row in memory["data"]} == {None, 2.147483648}
    column = list(TABLE).index("request")
    assert [row[column] for row in table["data"]] == ["refused", "failed", "second", "first"]
    *_, table = owner.named("_look", [None, "all", "finished"])["output"]["data"]
    assert [row[column] for row in table["data"]] == ["second", "first", "old"]


def test_the_whole_time_shows_the_new_model(space) -> None:
    owner = Visitor(space)
    owner.named("_log_in", [SECRET])
    tiles, _, *plots, _ = owner.named("_look", [None, "all", ALL])["output"]["data"]
    assert "<p>New model: toy@1, " in tiles
    marks = [row for row in plots[2]["data"] if row[1] == "new model"][-3:]
    assert [row[2] for row in marks] == [0.0, 3.0, None] and len({row[0] for row in marks}) == 1


def test_one_request_and_what_its_user_wrote_is_text(space, media) -> None:
    owner = Visitor(space)
    owner.named("_log_in", [SECRET])
    chosen = {"row_value": ["second"] * len(TABLE), "index": [0, 0], "value": "x"}
    answer = owner.named("_choose", [None], chosen)["output"]["data"]
    numbers, question, said, rating, reason, correction, shown = answer[1:]
    assert (answer[0], numbers["id"], numbers["waiting"], rating) == ("second", "second", 7, "down")
    assert set(numbers) == set(COLUMNS)
    assert question == said == reason == correction == EVIL
    assert shown.count("<img src='data:image/png;base64,") == 1 and EVIL not in shown
    assert shown.count("<audio controls src='data:audio/") == 1
    texts = space.dashboard.texts
    assert [type(text) for text in texts] == [gr.Textbox] * 5  # which shows no HTML
    assert space.dashboard.table.datatype == "str"
    answer = owner.named("_open", [None, "refused "])["output"]["data"]
    assert answer[1:3] == ["not kept: the user did not consent"] * 2
    answer = owner.named("_open", [None, "nobody"])
    assert answer["output"]["error"].startswith("no such request is kept")


def test_a_hostile_error_is_escaped(space, store) -> None:
    store.add(Record("x", "a", time.time() - 1, outcome="failed", error=EVIL, model=EVIL), None)
    owner = Visitor(space)
    owner.named("_log_in", [SECRET])
    tiles, drift, *_ = owner.named("_look", [None, "all", ALL])["output"]["data"]
    assert "<script>" not in tiles + drift and "&lt;script&gt;" in tiles


def test_csv_has_the_numbers_of_the_time_and_no_text(space) -> None:
    owner = Visitor(space)
    owner.named("_log_in", [SECRET])
    for span, expected in (
        ("last hour", ["refused", "failed", "second", "first"]),
        ("all", ["refused", "failed", "second", "first", "old"]),
    ):
        (text,) = owner.named("_csv", [None, span])["output"]["data"]
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [row["id"] for row in rows] == expected
        assert list(rows[0]) == [*COLUMNS, "rating"] and rows[2]["rating"] == "-1.0"
        assert "script" not in text and "what?" not in text


def test_a_store_that_cannot_be_read_is_a_sentence(space, store) -> None:
    owner = Visitor(space)
    owner.named("_log_in", [SECRET])
    with sqlite3.connect(store.folder / "requests.sqlite3") as connection:
        connection.execute("DROP TABLE feedback")
    answer = owner.named("_look", [None, "all", ALL])
    assert answer["output"]["error"] == "the store cannot be read now: no such table: feedback"


@pytest.mark.parametrize(
    ("secret", "stored", "words"),
    [(None, True, "`PHI_MM_OWNER_SECRET`"), (SECRET, False, "`PHI_MM_STORE`")],
)
def test_without_a_secret_or_a_store_there_is_nothing_to_call(
    tmp_path: Path, secret: str | None, stored: bool, words: str
) -> None:
    engine = Engine(None, Limits())
    with gr.Blocks() as blocks:
        gr.Markdown("a page")
    Dashboard(engine, Records(tmp_path) if stored else None, Owner(secret)).add_to(blocks)
    assert not blocks.fns
    shown = [block.value for block in blocks.blocks.values() if isinstance(block, gr.Markdown)]
    assert words in shown[-1]


def test_a_store_without_records_shows_an_empty_page(tmp_path: Path) -> None:
    dashboard = Dashboard(Engine(None, Limits()), Records(tmp_path), Owner(SECRET))
    for span in ("last hour", "all"):
        tiles, drift, *plots, table = dashboard._look(True, span, ALL)
        assert "<dt>requests</dt><dd>0</dd>" in tiles and "nothing to compare with" in drift
        assert table == []
        for plot, component in zip(plots, [gr.BarPlot()] * len(plots), strict=True):
            component.postprocess(plot)  # gradio takes it
    assert dashboard.records.size() == (0, 0) and dashboard.records.ratings() == (0, 0)


def test_reading_does_not_keep_others_from_writing(store: Store) -> None:
    records = Records(store.folder)
    assert len(records.between(0, time.time())) == 5
    assert store.delete("a") == 3  # which needs that nobody reads
    assert len(records.between(0, time.time())) == 2
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        records._rows("DELETE FROM requests")


def test_drift() -> None:
    before = pd.Series(range(1000))
    assert figures.drift(before, before) == 0.0
    # All in the uppermost tenth, by hand: shares are (n + 0.5) / (1000 + 5).
    old, new = np.full(10, 100.5) / 1005, np.array([0.5] * 9 + [1000.5]) / 1005
    expected = np.sum((new - old) * np.log(new / old))
    assert figures.drift(before, before * 0 + 999) == pytest.approx(expected)
    assert figures.drift(before[:0], before) is figures.drift(before, before[:0]) is None
    same = pd.Series([7] * 50)
    assert figures.drift(same, same) == 0.0
    assert figures.drift(same, pd.Series([9] * 50)) > figures.DRIFTING
    assert [figures.reading(index)[:13] for index in (0.05, 0.2, 0.3, None)] == [
        "0.05, steady",
        "0.20, driftin",
        "0.30, drifted",
        "nothing to co",
    ]
