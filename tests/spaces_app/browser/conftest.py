"""A Space, and a browser that visits it."""

import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import soundfile
from engine.loading import load
from playwright.sync_api import Browser, Page

from phi_mm.hub.export import save_artefact

from ..conftest import plainly
from ..serving import Served, serve
from .person import EXAMPLES, NAMES, PATIENCE, Talk, chromium, find_chromium

SECRET = "known to the owner alone"


@pytest.fixture(scope="session")
def artefact(make_phi_mm: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says nothing but small letters, so that no answer ends early or is Markdown."""
    model, processor = make_phi_mm()
    letters = processor.tokenizer.convert_tokens_to_ids(list(string.ascii_lowercase))
    others = set(range(model.config.text_config.vocab_size)) - set(letters)
    model.generation_config.suppress_tokens = sorted(others)
    folder = tmp_path_factory.mktemp("letters") / "artefact"
    save_artefact(model, processor, folder)
    return folder


@pytest.fixture(scope="session")
def space(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("browser")
    with serve(artefact, folder, PHI_MM_OWNER_SECRET=SECRET) as space:
        yield space


@pytest.fixture(scope="session")
def expected(artefact: Path) -> Callable[[list[dict], int], str]:
    """The answer to messages by transformers alone."""
    model, processor = load(str(artefact), None, "fp32")

    def expected(messages: list[dict], tokens: int = 16) -> str:
        return processor.tokenizer.decode(plainly(model, processor, messages, tokens))

    return expected


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is said into the browser's microphone, again and again."""
    sound, rate = soundfile.read(EXAMPLES / "test_talk_00000_0.flac")
    path = tmp_path_factory.mktemp("spoken") / "spoken.wav"
    soundfile.write(path, sound, rate)
    return path


@pytest.fixture(scope="module")
def browser(spoken: Path) -> Iterator[Browser]:
    """Of a module and not of the session: its event loop runs as long as it is there, and tests
    elsewhere have their own.
    """
    program = find_chromium()
    if program is None:
        pytest.skip(f"there is no browser: none of {', '.join(NAMES)} is installed")
    with chromium(program, spoken) as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address as somebody new; takes what a context of Playwright takes."""
    contexts = []

    def visit(url: str, **given) -> Page:
        contexts.append(browser.new_context(**given))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture
def talk(visit: Callable[..., Page], space: Served) -> Talk:
    """The page with its settings open and answers of 16 letters."""
    talk = Talk(visit(space.url))
    talk.open_settings()
    talk.set("Longest answer", 16)
    return talk
