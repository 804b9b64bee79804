"""The loop: the Space serves, users correct, `phi-mm feedback export`, training, evaluation.

pytest tests/training/test_feedback.py
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from gradio_client import Client, handle_file
from PIL import Image

from phi_mm.cli import main
from phi_mm.evaluation import evaluate_run
from phi_mm.feedback import export
from phi_mm.hub.export import save_artefact
from phi_mm.recipes import save_recipe

ROOT = Path(__file__).parents[2]
FEEDBACK = "INSERT INTO feedback VALUES (?, ?, 9.0, ?, NULL, ?)"


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG under another name, and a recording."""
    folder = tmp_path_factory.mktemp("media")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png", format="JPEG")
    soundfile.write(folder / "sound.wav", np.sin(np.arange(9_000) / 9), 16_000)
    return folder


@pytest.fixture(scope="module")
def space(make_phi_mm: Callable, tmp_path_factory: pytest.TempPathFactory):
    """Store and address of a Space that serves a random model in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(ROOT / "spaces_app")
        patched.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        from engine.generation import Generator
        from engine.loading import load
        from engine.service import Engine, Limits
        from pages.chat import ChatPage
        from records.journal import Journal
        from records.store import Store

        folder = tmp_path_factory.mktemp("space")
        save_artefact(*make_phi_mm(), folder / "artefact")
        loaded = load(str(folder / "artefact"), None, "fp32")
        journal = Journal(Store(folder / "store", 1000))
        engine = Engine(lambda: Generator(*loaded, 1 << 30, 1 << 30), Limits(), journal)
        engine.start()
        blocks = ChatPage(engine).build()
        _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True)
        yield folder / "store", url
        blocks.close()
        engine.close()


@pytest.fixture(scope="module")
def store(space: tuple[Path, str], media: Path) -> Path:
    """The records of eight conversations, a picture and a recording in each first turn: the second
    answer is corrected, the first is not.
    """
    folder, url = space
    for number in range(8):
        client = Client(url, verbose=False)
        given = handle_file(media / "picture.png"), handle_file(media / "sound.wav")
        client.predict(f"what is <image> {number}?", *given, length=16, api_name="/ask")
        client.predict("and where?", length=16, api_name="/ask")
        correction = {"reason": "no", "correction": f"on the left, {number}", "keep": True}
        client.predict(-1, **correction, api_name="/feedback")
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_served_and_corrected_is_trained_on_and_measured(
    store: Path, media: Path, recipe: Callable, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "feedback"
    main(["feedback", "export", str(store), str(out), "--share", "0.4"])
    train, test = read(out / "train.jsonl"), read(out / "test.jsonl")
    assert capsys.readouterr().out == (
        f"train.jsonl: {len(train)} rows\ntest.jsonl: {len(test)} rows\n"
    )
    assert train and test and len(train) + len(test) == 8
    with sqlite3.connect(store / "requests.sqlite3") as connection:
        answers = dict(connection.execute("SELECT id, answer FROM requests WHERE parent = ''"))
        parents = dict(connection.execute("SELECT id, parent FROM requests"))
    for row in [*train, *test]:
        first = parents[row["id"]]
        number = row["messages"][-1]["content"][-1]
        assert row["messages"] == [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": f"media/{first}.0.jpeg"},
                    {"type": "audio", "audio": f"media/{first}.1.wav"},
                    {"type": "text", "text": f"what is <image> {number}?"},
                ],
            },
            {"role": "assistant", "content": answers[first], "weight": 0},
            {"role": "user", "content": [{"type": "text", "text": "and where?"}]},
            {"role": "assistant", "content": f"on the left, {number}"},
        ]
        picture = out / "media" / f"{first}.0.jpeg"
        assert picture.read_bytes() == (media / "picture.png").read_bytes()

    made = recipe(
        f"data.train={out}/train.jsonl",
        "training.max_steps=2",
        f"evaluation=[{{task: feedback, data: {out}/test.jsonl, metric: exact_match}}]",
        tune="frozen",
    )
    save_recipe(made, tmp_path / "recipe.yaml")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), str(tmp_path / "recipe.yaml")],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in ("train.jsonl", "test.jsonl"):
        main(["data", "check", str(out / name), "--processor", str(made.run_dir)])
        report = capsys.readouterr().out
        assert "rows with no supervised token: 0" in report and "corrupt media: 0" in report
    (task,) = evaluate_run(made.run_dir)
    references = [item.reference for item in task.items]
    assert references == [row["messages"][-1]["content"] for row in test]
    assert task.measured.row.n == len(test)
    prompt = task.items[0].prompt
    assert [part["type"] for part in prompt[0]["content"]] == ["image", "audio", "text"]


@pytest.fixture
def copied(store: Path, tmp_path: Path) -> tuple[Path, sqlite3.Connection]:
    """A copy of the store that a test may change, and its database."""
    folder = tmp_path / "copied"
    with sqlite3.connect(store / "requests.sqlite3") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copytree(store, folder)
    return folder, sqlite3.connect(folder / "requests.sqlite3", isolation_level=None)


def test_what_is_left_out_and_why(copied: tuple, tmp_path: Path) -> None:
    folder, connection = copied
    firsts = connection.execute(
        "SELECT id, conversation FROM requests WHERE parent = '' ORDER BY number"
    ).fetchall()
    names = [name for name, _ in firsts]
    change = "UPDATE requests SET {} WHERE id = ?".format
    connection.execute(change("question = NULL, answer = NULL, media = '[]'"), [names[0]])
    connection.execute("DELETE FROM requests WHERE id = ?", [names[1]])
    (folder / "media" / f"{names[2]}.0.png").unlink()
    (folder / "media" / f"{names[3]}.1.wav").write_bytes(b"no sound")
    connection.execute(change("media = '[]'"), [names[4]])
    for number, outcome in ((5, "finished"), (6, "length")):
        connection.execute(change(f"outcome = '{outcome}'"), [names[number]])
        connection.execute(FEEDBACK, [*firsts[number], 1, None])
    connection.execute(FEEDBACK, [*firsts[7], -1, None])
    connection.execute("UPDATE feedback SET rating = 0 WHERE conversation = ?", [firsts[7][1]])
    connection.execute("UPDATE feedback SET rating = -1 WHERE request = ?", [names[7]])
    connection.execute("BEGIN EXCLUSIVE")  # as the Space does while it writes
    without = export(str(folder), tmp_path / "without", share=0)
    liked = export(str(folder), tmp_path / "liked", share=1, liked=True)
    connection.close()
    expected = {
        "no consent for an earlier turn": 1,
        "an earlier turn is gone": 1,
        "a picture or recording is gone": 2,
        "a picture or recording cannot be trained on": 1,
        "disliked, without a corrected answer": 1,
    }
    assert without.left_out == expected | {"liked; --liked takes them": 2}
    assert without.rows == {"train.jsonl": 2}
    assert liked.left_out == expected | {"liked, but the answer was cut": 1}
    assert liked.rows == {"test.jsonl": 3}
    assert not (tmp_path / "liked" / "train.jsonl").exists()
    good = next(row for row in read(tmp_path / "liked" / "test.jsonl") if row["id"] == names[5])
    assert [message.get("weight") for message in good["messages"]] == [None, None]
    # Nothing is copied of turns that give no row.
    kept = {path.name.split(".")[0] for path in (tmp_path / "without" / "media").iterdir()}
    assert kept == {names[5], names[6]}


def test_conversations_stay_on_their_side(store: Path, tmp_path: Path) -> None:
    sides = []
    for share in (0.0, 0.3, 0.6, 1.0):
        export(str(store), tmp_path / str(share), share)
        file = tmp_path / str(share) / "test.jsonl"
        sides.append({row["conversation"] for row in read(file)} if file.exists() else set())
    assert sides[0] == set() and len(sides[3]) == 8
    assert sides[0] <= sides[1] <= sides[2] <= sides[3]


def test_the_data_set_gives_the_same_rows(
    store: Path, loopback, login: Callable, tmp_path: Path
) -> None:
    from records.hub_copy import HubCopy
    from records.store import Store

    login(loopback.token("fay"))
    with HubCopy(Store(store, 1000), "fay/records", 1000):
        pass
    export(str(store), tmp_path / "folder")
    export("fay/records", tmp_path / "data-set")
    files = [path.relative_to(tmp_path / "folder") for path in (tmp_path / "folder").rglob("*")]
    assert len(files) > 17  # 16 media files
    for file in files:
        one, other = tmp_path / "folder" / file, tmp_path / "data-set" / file
        if file.suffix == ".jsonl":
            assert {row["id"]: row for row in read(one)} == {row["id"]: row for row in read(other)}
        elif one.is_file():
            assert one.read_bytes() == other.read_bytes()


def test_what_cannot_be_exported(store: Path, copied: tuple, tmp_path: Path, login) -> None:
    folder, connection = copied
    for given, out, share, words in (
        (str(tmp_path), "out", 0.2, "expected a folder with requests.sqlite3"),
        (str(folder), "copied", 0.2, "which holds something: give a new folder"),
        (str(folder), "out", 1.5, "got the share 1.5, expected one from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=words):
            export(given, tmp_path / out, share)
    login(None)
    with pytest.raises(ValueError, match="cannot read fay/nothing: "):
        export("fay/nothing", tmp_path / "out")
    connection.execute("UPDATE feedback SET correction = NULL")
    connection.close()
    with pytest.raises(ValueError, match=r"got no turn to export .*\n.*\n.*\nleft out: 8 \(disl"):
        export(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (folder / "requests.sqlite3").write_text("no database")
    with pytest.raises(ValueError, match="which cannot be read: file is not a database"):
        export(str(folder), tmp_path / "out")
