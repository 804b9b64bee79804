"""A conversation through a pipe: attachments, broken files, commands."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from phi_mm.chat import HELP, chat
from phi_mm.hub.export import save_artefact
from phi_mm.hub.fresh import respond


@pytest.fixture(scope="module")
def artefact(make_phi_mm: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "artefact"
    save_artefact(*make_phi_mm(), folder)
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a picture, a recording, and a picture that is none."""
    folder = tmp_path_factory.mktemp("media")
    Image.new("RGB", (9, 8), "red").save(folder / "my picture.png")
    noise = np.random.default_rng(0).normal(0, 0.1, 8_000)
    soundfile.write(folder / "question.wav", noise, 16_000)
    (folder / "broken.png").write_text("this is no picture")
    return folder


@pytest.fixture
def talk(artefact: Path, capsys) -> Callable[..., str]:
    """Function that says lines through a pipe and returns what is shown below the help."""

    def say(*lines: str) -> str:
        chat(str(artefact), io.StringIO("".join(f"{line}\n" for line in lines)), max_new_tokens=4)
        shown = capsys.readouterr().out
        assert shown.startswith(HELP)
        return shown.removeprefix(HELP + "\n")

    return say


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_answers_are_the_models_own_over_several_turns(talk, make_phi_mm: Callable) -> None:
    model, processor = make_phi_mm()
    first = [{"role": "user", "content": [text("hello")]}]
    answer, _ = respond(model, processor, first, 4)
    second = [
        *first,
        {"role": "assistant", "content": [text(answer)]},
        {"role": "user", "content": [text("again")]},
    ]
    more, _ = respond(model, processor, second, 4)
    shown = talk("hello", "again")
    assert answer in shown.partition("> again")[0]
    assert more in shown.partition("> again")[2]
    alone, _ = respond(model, processor, [{"role": "user", "content": [text("again")]}], 4)
    assert alone in talk("hello", "/reset", "again").partition("forgotten")[2]


def test_a_broken_file_is_one_sentence_and_the_conversation_goes_on(talk, media: Path) -> None:
    shown = talk(
        f"/image {media}/broken.png",
        "/image",
        f"/audio {media}/none.wav",
        "still there?",
        "/quit",
        "x",
    ).splitlines()
    assert shown[1].startswith(f"got the image '{media}/broken.png', expected a picture")
    assert shown[3] == "got no file: type /image FILE"
    assert shown[5].startswith(f"got the audio '{media}/none.wav', expected a recording")
    assert shown[6] == "> still there?"
    assert "> x" not in shown


def test_attachments_reach_the_model(talk, media: Path, make_phi_mm: Callable) -> None:
    model, processor = make_phi_mm()
    image = {"type": "image", "image": str(media / "my picture.png")}
    audio = {"type": "audio", "audio": str(media / "question.wav")}
    asked = [{"role": "user", "content": [image, audio, image, text("what?")]}]
    answer, _ = respond(model, processor, asked, 4)
    heard, _ = respond(model, processor, [{"role": "user", "content": [audio]}], 4)
    attach = f'/image "{image["image"]}"', f"/audio {audio['audio']}", f"/image {image['image']}"
    shown = talk(*attach, "what?", "/reset", attach[1], "")
    assert answer in shown.partition("> what?")[2].partition("forgotten")[0]
    assert heard in shown.partition("forgotten")[2]


def test_nothing_asked_and_unknown_commands(talk, media: Path) -> None:
    shown = talk("", "/foo", f"/image {media}/my picture.png", "", "/help")
    assert "got /foo, expected /image, /audio" in shown
    assert "got no question" in shown
    assert shown.rstrip().endswith(HELP)
