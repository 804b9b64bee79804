"""What breaks under the Space while it serves, and what its users and its owner are told."""

import json
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from .serving import Served, get, serve

COMMIT = "0123456789abcdef" * 2 + "01234567"


def rows(space: Served) -> list[tuple[str, str]]:
    """(id, outcome) of the records, from a database that is whole."""
    with closing(sqlite3.connect(space.folder / "store" / "requests.sqlite3")) as store:
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return store.execute("SELECT id, outcome FROM requests ORDER BY number").fetchall()


def begin(space: Served) -> None:
    """Asks for a long answer, and returns when it has begun."""
    body = {"data": ["hello", None, None, 512, 0, False]}
    get(f"{space.url}/gradio_api/call/ask", body)
    while not json.loads(get(f"{space.url}/health")[1])["answering"]:
        time.sleep(0.01)


def told(space: Served) -> list[dict]:
    """The log's lines of requests."""
    return [json.loads(line) for line in space.log.splitlines() if line.startswith('{"id"')]


def test_kill_9_a_locked_database_a_model_that_is_gone_and_sigterm(
    artefact: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "artefact"
    shutil.copytree(artefact, copy)
    with serve(copy, tmp_path) as space:
        right = space.ask("hello")
        space.ask("hello")
        begin(space)
        space.process.kill()
        assert space.command.wait() != 0
        assert "the Space ended with exit code -9" in space.log
        before = rows(space)
        assert before == [(line["id"], "length") for line in told(space)] and len(before) == 2
    with serve(copy, tmp_path) as space:
        assert space.ask("hello") == right
        assert rows(space)[:-1] == before
        assert list((tmp_path / "store" / "media").iterdir()) == []
        path = tmp_path / "store" / "requests.sqlite3"
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            assert space.ask("hello") == right
            other.execute("ROLLBACK")
        shutil.rmtree(copy)
        assert space.ask("hello") == right and get(f"{space.url}/ready")[0] == 200
        assert "database is locked); answers go on" in space.log
        assert "records are stored again; 1 were not" in space.log
        begin(space)
        space.process.send_signal(signal.SIGTERM)
        assert space.command.wait() == 0
        assert [outcome for _, outcome in rows(space)] == ["length"] * 4 + ["stopped"]
        assert "Traceback" not in space.log
        assert not list((tmp_path / "store").glob("*-wal"))  # closed as it should be


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two small disks, which can be full: for uploads, and for the store."""
    disks = tmp_path / "uploads-disk", tmp_path / "store-disk"
    mounted = []
    for folder, size in zip(disks, (270, 2), strict=True):
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "none", str(folder)]
        if shutil.which("mount") and not subprocess.run(command, capture_output=True).returncode:
            mounted.append(folder)
    try:
        if len(mounted) < len(disks):
            pytest.skip("a disk that can be full must be mounted, which not everybody may do")
        yield disks
    finally:
        for folder in mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """A file that leaves no room."""
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def test_full_and_read_only_disks(artefact: Path, tmp_path: Path, media: Path, disks) -> None:
    uploads, store = disks
    picture = (media / "0.png").read_bytes()
    settings = {"GRADIO_TEMP_DIR": f"{uploads}/files", "PHI_MM_STORE": f"{store}/records"}
    refused = (507, "files cannot be kept now: ask without one, or try again later")
    with serve(artefact, tmp_path, **settings) as space:
        right = space.ask("hello")
        status, path = space.upload("a.png", picture)
        given = {"path": path, "meta": {"_type": "gradio.FileData"}}
        seen = space.ask("hello", given)
        assert status == 200 and seen[0] == "complete"
        fillers = fill(uploads), fill(store)
        assert space.upload("b.png", picture) == refused
        assert space.ask("hello") == right and space.ask("hello", given) == seen
        assert space.log.count("records are not stored in") == 1
        for filler in fillers:
            filler.unlink()
        assert space.upload("c.png", picture)[0] == 200
        assert space.ask("hello") == right
        assert "records are stored again; 2 were not" in space.log
        subprocess.run(["mount", "-o", "remount,ro", str(uploads)], check=True)
        assert space.upload("d.png", picture) == refused
        assert space.ask("hello") == right and space.ask("hello", given) == seen
        subprocess.run(["mount", "-o", "remount,rw", str(uploads)], check=True)
        files = [path.name for path in uploads.rglob("*") if path.is_file()]
        assert {"a.png", "c.png"} <= set(files)
        assert not {"b.png", "d.png"} & set(files) and not [f for f in files if f.startswith("tmp")]


def test_the_hub_cannot_be_reached_at_the_start(tmp_path: Path) -> None:
    settings = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens there
        "HF_HOME": str(tmp_path / "home"),
        "PHI_MM_REVISION": COMMIT,
    }
    with serve("nobody/nothing", tmp_path, until="", **settings) as space:
        while (status := get(f"{space.url}/ready"))[0] != 503 or b"being loaded" in status[1]:
            time.sleep(0.1)
        for route in ("ready", "health"):
            status, said = get(f"{space.url}/{route}")
            sentence = json.loads(said)["state"]
            assert status == 503 and sentence.startswith("the model could not be loaded: ")
        assert space.ask("hello") == ("error", sentence)
        assert get(space.url)[0] == 200 and space.command.poll() is None
        assert [line["outcome"] for line in told(space)] == ["failed"]
