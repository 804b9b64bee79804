"""Chromium, the Space that it is shown, and what a person does there."""

import shutil
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import soundfile
from engine.loading import load
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from phi_mm.hub.export import save_artefact

from ..conftest import plainly
from ..serving import ROOT, Served, serve

PATIENCE = 30_000  # milliseconds: a machine may be busy
EXAMPLES = ROOT / "spaces_app" / "examples"
CHROMIUM = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]


class Talk:
    """The page, as somebody uses it.

    Args:
        page: is on the Space.
    """

    def __init__(self, page: Page):
        self.page = page
        self.question = page.get_by_label("Question", exact=True)
        self.picture, self.recording = page.locator("#picture"), page.locator("#recording")
        self.conversation = page.get_by_role("log")
        self.shown = self.picture.get_by_role("button", name="Remove Image")
        self.played = self.recording.get_by_role("button", name="Play", exact=True)
        # Gradio's fields have one of this name too, without words.
        self.clear = page.get_by_role("button", name="Clear").filter(has_text="Clear")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def said_by(self, who: str) -> Locator:
        """The messages of "user" or "bot", one after the other."""
        return self.conversation.get_by_test_id(who)

    def set(self, name: str, value: float) -> None:
        """A slider of the settings, which are open."""
        number = self.page.get_by_label(f"number input for {name}")
        number.fill(str(value))
        number.press("Tab")

    def show(self, path: Path | str) -> None:
        """Uploads a picture."""
        self.picture.locator("input[type=file]").set_input_files(path)
        expect(self.shown).to_be_visible()

    def play(self, path: Path | str) -> None:
        """Uploads a recording."""
        self.recording.locator("input[type=file]").set_input_files(path)
        expect(self.played).to_be_visible()

    def ask(self, text: str = "") -> str:
        """Asks with what is in the fields, and waits for the whole answer."""
        notes = self.said_by("bot").filter(has_text="tokens/s")
        before = notes.count()
        self.question.fill(text)
        self.button("Send").click()
        expect(notes).to_have_count(before + 1)
        return self.said_by("bot").nth(-2).inner_text()


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
    with serve(artefact, tmp_path_factory.mktemp("browser")) as space:
        yield space


@pytest.fixture(scope="session")
def expected(artefact: Path) -> Callable[[list[dict], int], str]:
    """The answer to messages by transformers alone."""
    model, processor = load(str(artefact), None, "int8")

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
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"there is no browser: none of {', '.join(names)} is installed")
    with sync_playwright() as playwright:
        arguments = [*CHROMIUM, f"--use-file-for-fake-audio-capture={spoken}"]
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


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

    expect.set_options(timeout=PATIENCE)
    yield visit
    for context in contexts:
        context.close()


@pytest.fixture
def talk(visit: Callable[..., Page], space: Served) -> Talk:
    """The page with its settings open and answers of 16 letters."""
    talk = Talk(visit(space.url))
    talk.button("Settings ▼").click()
    talk.set("Longest answer", 16)
    return talk
