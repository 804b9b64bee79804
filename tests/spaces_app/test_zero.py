"""ZeroGPU without one: a lender that treats what passes as `spaces` does, and the whole Space."""

import pickle
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
import pytest
from engine.generation import Ending, Generator, Interrupted, Request
from engine.zero import LentGenerator, estimate

from phi_mm.checkout import SPACE
from phi_mm.hub.space.check import start_and_ask

from .conftest import answer_lent, plainly, user

PLENTY = 1 << 30
# Like the real one it has a GPU for the thread that imported it, and for no other.
SPACES = """
import threading

def GPU(function, duration):
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("there is no GPU in this thread")
    return function
"""


class Unreadable(Exception):
    """Can be pickled, and then not be read."""

    def __init__(self, words: str, *, cause: str):
        super().__init__(words)


def lend(function: Callable, duration: Callable) -> Callable:
    """What is given, and what is yielded, goes through another process."""

    def lent(*args) -> Iterator:
        for event in function(*pickle.loads(pickle.dumps(args))):
            yield pickle.loads(pickle.dumps(event))

    return lent


def ending(seconds: float = 60.0) -> Ending:
    return Ending(threading.Event(), time.monotonic() + seconds)


def test_answers_and_errors_pass_between_processes(loaded, media: Path) -> None:
    generator = Generator(*loaded, PLENTY, PLENTY)
    lent, heard = LentGenerator(generator, lend), []
    messages = [user(f"{media}/0.png", f"{media}/1.wav", "what?")]
    answer = answer_lent(lent, Request("one", messages, 8), heard.append, ending())
    assert answer.token_ids == plainly(*loaded, messages, 8) and heard
    for raised, kind, words in (
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ValueError, "can't decode byte 0xff"),
        (Interrupted("timeout"), Interrupted, "timeout"),
        (Unreadable("broken", cause="x"), RuntimeError, "Unreadable: broken"),
    ):

        def fail(*_: object, error: Exception = raised) -> None:
            raise error

        generator.reader.read = fail
        with pytest.raises(kind, match=words) as told:
            answer_lent(lent, Request("two", messages, 8), heard.append, ending())
        assert type(told.value) is kind
        kept = 0 if kind is RuntimeError else 1  # perhaps it had no memory left
        assert len(generator.prefixes.kept) == kept


def test_what_spaces_refuses_is_a_sentence(loaded) -> None:
    def refuse(function: Callable, duration: Callable) -> Callable:
        def lent(*args) -> Iterator:
            raise gr.Error("You have exceeded your ZeroGPU quota", print_exception=False)
            yield

        return lent

    lent = LentGenerator(Generator(*loaded, PLENTY, PLENTY), refuse)
    with pytest.raises(ValueError) as told:
        answer_lent(lent, Request("one", [user("hello")], 8), print, ending())
    assert str(told.value) == "the GPU is not to be had: You have exceeded your ZeroGPU quota"


def test_an_answer_ends_with_its_loan(loaded) -> None:
    given = []

    def note(function: Callable, duration: Callable) -> Callable:
        def lent(request: Request, seconds: float) -> Iterator:
            given.append(seconds)
            return function(request, seconds)

        return lent

    lent = LentGenerator(Generator(*loaded, PLENTY, PLENTY), note)
    request = Request("one", [user("hello")], 8)
    answer_lent(lent, request, lambda event: None, ending(1000))
    answer_lent(lent, request, lambda event: None, ending(5))
    assert given[0] == estimate(request) == 10 and 4 < given[1] <= 5


def test_the_model_is_loaded_where_spaces_pretends_a_gpu(artefact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(SPACE, tmp_path / "space")
    (folder / "spaces.py").write_text(SPACES)
    variables = {"PHI_MM_MODEL": str(artefact), "SPACES_ZERO_GPU": "true"}
    answer = start_and_ask(Path(sys.executable), folder, variables, {}, tmp_path)
    assert answer
