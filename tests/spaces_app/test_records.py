"""What is written of each request: the numbers always, the content with consent, answers first."""

import asyncio
import json
import logging
import signal
import sqlite3
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from engine.generation import Answer, Begun, Request, Text
from engine.service import Engine, Limits
from pages.chat import ChatPage
from pages.conversation import Conversation
from records.store import Content, Record, Store
from settings import Settings

from .conftest import user

SPACE = Path(__file__).parents[2] / "spaces_app"
SECRET = "my secret is a red star"


def rows(folder: Path, columns: str) -> list[tuple]:
    """As another program reads them, the oldest first."""
    with sqlite3.connect(folder / "requests.sqlite3") as connection:
        return connection.execute(f"SELECT {columns} FROM requests ORDER BY number").fetchall()


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "media").iterdir())


def lines(caplog: pytest.LogCaptureFixture) -> list[dict]:
    """Of the console, one for each request."""
    records = [record for record in caplog.records if record.name == "phi-mm.requests"]
    return [json.loads(record.getMessage()) for record in records]


def test_the_oldest_rows_go_and_deletion_leaves_nothing(tmp_path: Path, media: Path) -> None:
    store = Store(tmp_path, rows=3)
    for number in range(5):
        content = Content(f"{SECRET} {number}\ud800", "yes", [f"{media}/{number % 4}.png"])
        store.add(Record(f"r{number}", "ab"[number % 2], 10.0 + number), content)
    store.add(Record("r5", "b", 15.0), None)
    assert rows(tmp_path, "id, time, question, answer") == [
        ("r3", 13.0, f"{SECRET} 3?", "yes"),
        ("r4", 14.0, f"{SECRET} 4?", "yes"),
        ("r5", 15.0, None, None),
    ]
    assert kept(tmp_path) == ["r3.0.png", "r4.0.png"]
    assert (tmp_path / "media" / "r3.0.png").read_bytes() == (media / "3.png").read_bytes()
    assert store.delete("b") == 2 and store.delete("c") == 0
    assert rows(tmp_path, "id") == [("r4",)] and kept(tmp_path) == ["r4.0.png"]
    assert store.delete("a") == 1 and kept(tmp_path) == []
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert files and all(SECRET.encode() not in path.read_bytes() for path in files)
    store.close()


WRITER = """
import sys
from pathlib import Path
from records.journal import Journal
from records.store import Content, Record, Store
store = Store(Path(sys.argv[1]), 10_000)
for number in range(10_000):
    store.add(Record(f"r{number}", "a", 0.0), Content("what?", "yes", [sys.argv[2]]))
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, media: Path) -> None:
    picture = media / "0.png"
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(picture)]
    process = subprocess.Popen(command, cwd=SPACE, stdout=subprocess.PIPE, text=True)
    acknowledged = [int(process.stdout.readline()) for _ in range(40)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in process.stdout]
    assert process.wait() == -signal.SIGKILL and acknowledged == list(range(len(acknowledged)))
    (tmp_path / "media" / "unnamed.0.png").write_bytes(b"copied, and then killed")
    store = Store(tmp_path, 10_000)
    store.add(Record("after", "b", 0.0), None)
    found = [name for (name,) in rows(tmp_path, "id")]
    assert found[: len(acknowledged)] == [f"r{number}" for number in acknowledged]
    # The one that was on its way may be there too, whole.
    assert len(found) - 1 - len(acknowledged) in (0, 1) and found[-1] == "after"
    assert kept(tmp_path) == sorted(f"{name}.0.png" for name in found[:-1])
    copies = (tmp_path / "media").iterdir()
    assert all(path.read_bytes() == picture.read_bytes() for path in copies)
    with sqlite3.connect(tmp_path / "requests.sqlite3") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.close()


FAILING = """
import asyncio, logging, os, resource, sys
from pathlib import Path
from records.journal import Journal
from records.journal import Journal
from records.store import Content, Record, Store

def write(journal, *names, size=1):
    for name in names:
        asyncio.run(journal.write(Record(name, "a", 0.0), Content("x" * size, "yes")))

logging.basicConfig(format="%(message)s")
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
journal = Journal(Store(Path("full"), 100))
write(journal, "before")
write(journal, "full", "full", "full", size=300_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
write(journal, "after", size=300_000)
journal.close()
os.chmod(".", 0o555)
if os.geteuid() == 0:
    os.seteuid(65534)  # for root nothing is read-only
write(Journal(Store(Path("closed"), 100)), "closed", "closed")
print("the answers went on")
"""


def test_a_full_and_a_read_only_disk_are_told_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FAILING]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(SPACE)}, capture_output=True, text=True
    )
    tmp_path.chmod(0o755)
    assert done.stdout == "the answers went on\n", done.stderr
    full, again, closed = done.stderr.splitlines()
    assert full.startswith("records are not stored in full (") and full.endswith("; answers go on")
    assert rows(tmp_path / "full", "id") == [("before",), ("after",)]
    assert again == "records are stored again; 3 were not"
    assert closed.startswith("records are not stored in closed (PermissionError:")


async def collect(engine: Engine, request: Request) -> list:
    return [event async for event in engine.stream(request)]


def test_a_record_says_what_the_answer_took(make_engine, media, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    engine, folder = make_engine(), tmp_path / "store"
    messages = [user(f"{media}/0.png", f"{media}/1.wav", SECRET)]
    for keep in (False, True):
        events = asyncio.run(collect(engine, Request("a", messages, 6, keep=keep)))
        assert sum(isinstance(event, Begun) for event in events) == 1
        answer, record = events[-1], lines(caplog)[-1]
        # It was on the disk before the answer was whole.
        assert rows(folder, ", ".join(record))[-1] == tuple(record.values())
        assert record["outcome"] == "length" and record["error"] == ""
        assert record["conversation"] == "a" and record["precision"] == "fp32"
        assert record["model"] == "toy@0123abc" and record["waiting"] == 0
        assert record["characters"] == len(SECRET)
        assert (record["images"], record["recordings"]) == (1, 1)
        assert record["encoded_media"] == answer.encoded_media == (0 if keep else 2)
        assert record["new_tokens"] == 6
        assert record["prompt_tokens"] == answer.prompt_tokens
        assert record["reused_tokens"] == answer.reused_tokens
        assert record["media_seconds"] == answer.media_seconds
        assert record["first_token_seconds"] == answer.first_token_seconds
        assert record["total_seconds"] >= record["waited_seconds"] + answer.total_seconds
        assert record["waited_seconds"] > 0 and record["resident_bytes"] > 1 << 26
    assert set(lines(caplog)[0]) == set(asdict(Record("", "", 0.0)))
    assert SECRET not in caplog.text
    first, second = rows(folder, "id, question, answer")
    assert first[1:] == (None, None) and second[1:] == (SECRET, answer.text)
    assert kept(folder) == [f"{second[0]}.0.png", f"{second[0]}.1.wav"]
    heard = (folder / "media" / f"{second[0]}.1.wav").read_bytes()
    assert heard == (media / "1.wav").read_bytes()


def test_every_outcome_has_its_record(make_engine, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "phi-mm.requests")
    engine = make_engine()

    async def fail(request: Request) -> None:
        with pytest.raises(ValueError):
            await collect(engine, request)

    async def ask_all() -> None:
        await fail(Request("refused", [user("x" * 2100)]))
        await fail(Request("gone", [user(f"{tmp_path}/gone.png", SECRET)], keep=True))
        engine.limits = Limits(answer_seconds=0.0)
        await fail(Request("late", [user("hello")]))
        engine.limits = Limits()
        reader, engine.generator.reader.read = engine.generator.reader.read, None
        await fail(Request("broken", [user("hello")]))
        engine.generator.reader.read = reader
        stream = engine.stream(Request("left", [user("hello")], 2000))
        async for event in stream:
            if isinstance(event, Text):
                break
        await stream.aclose()
        async for event in engine.stream(Request("stopped", [user("hello")], 2000)):
            if isinstance(event, Text):
                engine.stop("stopped")
        assert isinstance(event, Answer)

    asyncio.run(ask_all())
    expected = [
        ("refused", "refused", "ValueError", None),
        ("gone", "refused", "ValueError", SECRET),
        ("late", "timeout", "Interrupted", None),
        ("broken", "failed", "TypeError", None),
        ("left", "stopped", "", None),
        ("stopped", "stopped", "", None),
    ]
    assert rows(tmp_path / "store", "conversation, outcome, error, question") == expected
    told = [tuple(line[name] for name in ("conversation", "outcome")) for line in lines(caplog)]
    assert told == [row[:2] for row in expected]


def test_a_locked_database_breaks_no_answer(make_engine, tmp_path, caplog) -> None:
    engine, folder = make_engine(), tmp_path / "store"
    request = Request("a", [user("hello")], 6)
    free = asyncio.run(collect(engine, request))[-1]
    with sqlite3.connect(folder / "requests.sqlite3", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        locked = [asyncio.run(collect(engine, request))[-1] for _ in range(2)]
        other.execute("ROLLBACK")
    other.close()
    assert [answer.token_ids for answer in locked] == [free.token_ids] * 2
    asyncio.run(collect(engine, request))
    told = [record.getMessage() for record in caplog.records if record.name == "phi-mm"]
    assert told == [
        f"records are not stored in {folder} (OperationalError: database is locked); answers go on",
        "records are stored again; 2 were not",
    ]
    assert len(rows(folder, "id")) == 2


def test_the_page_asks_for_consent_and_deletes(make_engine, media, tmp_path) -> None:
    engine, folder = make_engine(), tmp_path / "store"
    page = ChatPage(engine)
    page.build()
    assert page.keep.value is False and page.keep.visible and page.delete.visible
    without = ChatPage(Engine(engine.load, Limits()))
    without.build()
    assert not without.keep.visible and not without.delete.visible
    talk, other = Conversation(), Conversation()

    async def talk_and_delete() -> None:
        async for _ in page._send(SECRET, f"{media}/0.png", None, 6, 0.0, True, talk):
            pass
        async for _ in page._send(SECRET, f"{media}/1.png", None, 6, 0.0, False, other):
            pass
        assert rows(folder, "question") == [(SECRET,), (None,)] and len(kept(folder)) == 1
        under_way = page._send(SECRET, None, None, 2000, 0.0, True, talk)
        async for _ in under_way:
            if talk.turns and talk.turns[-1].answer:
                break
        name = talk.name
        assert await page._delete(talk) == ([], "", None, None)
        assert rows(folder, "conversation") == [(other.name,)] and kept(folder) == []
        async for _ in under_way:  # its record comes after the deletion
            pass
        async for _ in page._send("hello", None, None, 6, 0.0, True, talk):
            pass
        assert talk.name != name
        assert rows(folder, "conversation, question") == [(other.name, None), (talk.name, "hello")]

    asyncio.run(talk_and_delete())


def test_settings_of_the_store(artefact: Path, tmp_path: Path) -> None:
    given = {"PHI_MM_MODEL": str(artefact)}
    assert (Settings.read(given).store, Settings.read(given).log_rows) == (None, 100_000)
    given |= {"PHI_MM_STORE": str(tmp_path), "PHI_MM_LOG_ROWS": "7"}
    assert (Settings.read(given).store, Settings.read(given).log_rows) == (tmp_path, 7)
