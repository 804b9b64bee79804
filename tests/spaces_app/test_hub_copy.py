"""The records' copy on the Hub: what goes there, what is deleted there, and a Hub that is away."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gradio_client import Client
from httpx import HTTPError
from loopback import LoopbackHub
from records import hub_copy
from records.hub_copy import HubCopy, folder_of
from records.outbox import FEEDBACK
from records.record import Content, Feedback, Record
from records.store import Store
from settings import Settings

from phi_mm.cli import main

SPACE = Path(__file__).parents[2] / "spaces_app"
SECRET = "my secret is a green moon"
NAMES = {letter: letter * 32 for letter in "abcd"}
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store", 100)
    yield store
    store.close()


@pytest.fixture
def owner(loopback: LoopbackHub, login: Callable, request: pytest.FixtureRequest) -> str:
    """A user of the Hub of this test alone, who is logged in."""
    name = request.node.name.replace("_", "-")[:60]
    login(loopback.token(name))
    return name


@pytest.fixture
def copy_of(store: Store, owner: str) -> Iterator[Callable[..., HubCopy]]:
    """Function that begins to copy the store to the owner's data set, and has done so once."""
    made = []

    def begin() -> HubCopy:
        made.append(HubCopy(store, f"{owner}/records", 1000))
        push(made[-1])
        return made[-1]

    yield begin
    for copy in made:
        copy.stop()


def push(copy: HubCopy) -> None:
    copy.trigger().result()


def add(store: Store, name: str, conversation: str, *media: Path, keep: bool = True) -> None:
    content = Content(f"{SECRET} {name}", "yes", [str(path) for path in media])
    record = Record(name, NAMES.get(conversation, conversation), 1.0, images=len(media))
    store.add(record, content if keep else None)


def lines(files: dict[str, bytes]) -> list[tuple[str, list[dict]]]:
    """Each file of rows, in the order of their numbers."""
    named = [(path, files[path].decode()) for path in files if path.endswith(".jsonl")]
    read = [(path, [json.loads(line) for line in text.splitlines()]) for path, text in named]
    return sorted(read, key=lambda item: item[1][0]["number"])


def test_rows_are_copied_once_and_again_when_they_change(
    loopback, store, copy_of, owner, media: Path, monkeypatch
) -> None:
    add(store, "r1", "a", media / "0.png")  # from before there was a data set
    copy = copy_of()
    repository = loopback.repositories[f"datasets/{owner}/records"]
    assert repository.private
    first = loopback.files(f"datasets/{owner}/records")
    folder = f"conversations/aa/{NAMES['a']}"
    assert list(first) == [f"{folder}/1.jsonl", f"{folder}/media/r1.0.png"]
    assert first[f"{folder}/media/r1.0.png"] == (media / "0.png").read_bytes()

    for number in range(2, 6):
        add(store, f"r{number}", "ab"[number % 2], keep=False)
    monkeypatch.setattr(hub_copy, "MOST_ROWS", 3)
    commits = len(repository.commits)
    for _ in range(4):
        push(copy)
    assert len(repository.commits) == commits + 2
    store.rate(Feedback("r1", NAMES["a"], 9.0, -1, "wrong", "a moon"), {})
    store.rate(Feedback("r1", NAMES["a"], 9.5, 1), {})
    filled = {"r2": Content(f"{SECRET} later", "no", [str(media / "1.png")])}
    store.rate(Feedback("r3", NAMES["b"], 9.0, 1), filled)  # r2 is not of that conversation
    push(copy)
    files = loopback.files(f"datasets/{owner}/records")
    assert all(files[path] == content for path, content in first.items())
    numbers = [[(row["number"], row["id"]) for row in rows] for _, rows in lines(files)]
    assert numbers == [
        [(1, "r1")],
        [(2, "r2"), (4, "r4")],
        [(3, "r3")],
        [(5, "r5")],
        [(7, "r1")],
        [(8, "r3")],
    ]
    rows = {row["id"]: row for _, rows in lines(files) for row in rows}
    assert rows["r1"]["question"] == f"{SECRET} r1" and rows["r1"]["media"] == ["r1.0.png"]
    assert [rows["r1"][name] for name in FEEDBACK] == [9.5, 1, "wrong", "a moon"]
    for name in ("r2", "r3", "r4", "r5"):
        assert (rows[name]["question"], rows[name]["answer"], rows[name]["media"]) == (
            None,
            None,
            [],
        )

    # A crash between a commit and the note of it: the same files are written again.
    with sqlite3.connect(store.folder / "requests.sqlite3") as connection:
        connection.execute("UPDATE copies SET cursor = 6")
    push(copy)
    assert loopback.files(f"datasets/{owner}/records") == files


def test_deletion_reaches_the_hub_and_its_history(
    loopback, store, copy_of, owner, media: Path
) -> None:
    copy = copy_of()
    add(store, "d1", "a", media / "0.png", media / "1.png")
    add(store, "d2", "b", media / "1.png")  # the same picture
    push(copy)
    add(store, "d3", "a")
    push(copy)
    store.rows = 1
    add(store, "d4", "b", keep=False)  # all others are too old now, and stay on the Hub
    push(copy)
    data_set = f"datasets/{owner}/records"
    assert len(lines(loopback.files(data_set))) == 4
    only_in_a = (media / "0.png").read_bytes()
    assert only_in_a in loopback.blobs.values()

    copy.hub.endpoint = NOWHERE
    assert store.delete(NAMES["a"]) == 0
    push(copy)
    assert len(lines(loopback.files(data_set))) == 4
    copy.hub.endpoint = loopback.url
    push(copy)
    assert copy.outbox.deletions() == []
    files = loopback.files(data_set)
    assert [row["id"] for _, rows in lines(files) for row in rows] == ["d2", "d4"]
    assert files[f"{folder_of(NAMES['b'])}/media/d2.0.png"] == (media / "1.png").read_bytes()
    kept = [*loopback.blobs.values()]
    assert only_in_a not in kept
    assert not any(f"{SECRET} d1".encode() in blob for blob in kept)
    assert any(f"{SECRET} d2".encode() in blob for blob in kept)
    assert len(loopback.repositories[data_set].commits) == 1


@pytest.mark.parametrize("name", ["../../outside", "/etc", "..", "A" * 32, "", "a" * 31 + "/"])
def test_a_name_is_never_a_path(name: str) -> None:
    root, two, folder = folder_of(name).split("/")
    assert root == "conversations" and folder.startswith(two) and len(folder) == 32
    assert set(folder) <= set("0123456789abcdef") and folder_of(name) != folder_of(f"{name}x")


def test_a_hub_that_is_away_is_told_once_and_gone_on_with(
    loopback, store, copy_of, owner, caplog, monkeypatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.constants.ENDPOINT", NOWHERE)
        copy = copy_of()
    for number in range(3):
        add(store, f"r{number}", "a", keep=False)
        push(copy)
    copy.hub.endpoint = loopback.url
    push(copy)
    push(copy)
    told = [record.getMessage() for record in caplog.records if record.name == "phi-mm"]
    assert len(told) == 2
    assert told[0].startswith(f"records are not copied to {owner}/records (ConnectError: ")
    assert told[1] == f"records are copied to {owner}/records again"
    assert len(lines(loopback.files(f"datasets/{owner}/records"))) == 1


def test_who_may_not_write_and_what_would_be_public(
    loopback, store, copy_of, owner, login, caplog
) -> None:
    login(loopback.token(owner, role="read"))
    add(store, "r1", "a")
    copy = copy_of()
    assert "(the access token may only read: set HF_TOKEN to one that writes)" in caplog.text
    login(None)
    push(copy)
    assert f"datasets/{owner}/records" not in loopback.repositories
    login(loopback.token(owner))
    push(copy)
    repository = loopback.repositories[f"datasets/{owner}/records"]
    assert len(lines(loopback.files(f"datasets/{owner}/records"))) == 1
    repository.private = False
    add(store, "r2", "a")
    push(copy)
    assert len(lines(loopback.files(f"datasets/{owner}/records"))) == 1
    assert "records, which is public, expected a private data set" in caplog.text
    with pytest.raises(ValueError, match="which is public, expected a private data set"):
        copy_of()


def test_the_end_of_the_block_sends_what_is_new(loopback, store, owner) -> None:
    with HubCopy(store, f"{owner}/records", 1000):
        add(store, "r1", "a")
    assert len(lines(loopback.files(f"datasets/{owner}/records"))) == 1


def test_owners_delete_by_name(loopback, store, copy_of, owner, media, capfd) -> None:
    copy = copy_of()
    add(store, "r1", "a", media / "2.png")
    add(store, "r2", "b", media / "3.png")
    push(copy)
    main(["feedback", "delete", str(store.folder), NAMES["a"]])
    assert capfd.readouterr().out == "1 records deleted\n"
    assert [path.name for path in store.media.iterdir()] == ["r2.0.png"]
    assert copy.outbox.deletions() == [NAMES["a"]]
    main(["feedback", "delete", f"{owner}/records", NAMES["b"]])
    assert capfd.readouterr().out == "deleted from the data set\n"
    files = loopback.files(f"datasets/{owner}/records")
    assert [path for path, _ in lines(files)] == [f"{folder_of(NAMES['a'])}/1.jsonl"]
    push(copy)
    assert loopback.files(f"datasets/{owner}/records") == {}
    with pytest.raises(SystemExit):
        main(["feedback", "delete", str(store.folder / "none" / "x"), NAMES["b"]])
    assert "expected a folder with requests.sqlite3, or the id" in capfd.readouterr().err


def test_settings_of_the_data_set(artefact: Path, tmp_path: Path) -> None:
    given = {"PHI_MM_MODEL": str(artefact), "PHI_MM_STORE": str(tmp_path)}
    assert Settings.read(given).dataset is None
    given |= {"PHI_MM_DATASET": "ann/records"}
    assert (Settings.read(given).dataset, Settings.read(given).dataset_minutes) == (
        "ann/records",
        5,
    )
    for wrong in ({"PHI_MM_DATASET": "ann"}, {"PHI_MM_STORE": ""}, {"PHI_MM_DATASET": "a/../b"}):
        with pytest.raises(ValueError, match="expected OWNER/NAME, and a folder for the records"):
            Settings.read(given | wrong)


def test_the_whole_space_copies_its_records(
    loopback, owner, artefact: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SERVER_PORT": str(port),
        "PHI_MM_DATASET": f"{owner}/records",
        "PHI_MM_DATASET_MINUTES": "1000",
        "PHI_MM_MODEL": str(artefact),
        "PHI_MM_STORE": str(tmp_path / "store"),
    }
    with (tmp_path / "log").open("w") as log:
        start = {"cwd": SPACE, "env": env, "stdout": log, "stderr": log}
        process = subprocess.Popen([sys.executable, "app.py"], **start)
        for _ in range(600):
            try:
                client = Client(f"http://127.0.0.1:{port}", verbose=False)
                break
            except (OSError, HTTPError):
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
        client.predict("hello", length=16, keep=True, api_name="/ask")
        process.terminate()
        assert process.wait(timeout=60) == 0, (tmp_path / "log").read_text()
        ((_, rows),) = lines(loopback.files(f"datasets/{owner}/records"))
        assert [row["question"] for row in rows] == ["hello"]
