"""Somebody at a browser."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from ..serving import ROOT

EXAMPLES = ROOT / "spaces_app" / "examples"
PATIENCE = 60_000  # milliseconds: a machine may be busy
NAMES = ("chromium", "chromium-browser", "google-chrome")
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

    def open_settings(self) -> None:
        expect(self.page.get_by_text("Ready:")).to_be_visible()
        self.button("Settings ▼").click()

    def set(self, name: str, value: float) -> None:
        """A slider of the settings, which are open."""
        number = self.page.get_by_label(f"number input for {name}")
        slider = self.page.get_by_label(f"range slider for {name}")
        for _ in range(20):  # what is typed while gradio still builds the page is lost
            number.fill(str(value))
            number.press("Tab")
            self.page.wait_for_timeout(100)
            if slider.input_value() == str(value):
                return
        raise AssertionError(f"{name} is {slider.input_value()}, and not {value}")

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


def find_chromium() -> str | None:
    """The program, where it is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium(program: str, spoken: Path) -> Iterator[Browser]:
    """A browser while the block runs.

    Args:
        spoken: a wav that its microphone hears, again and again.
    """
    expect.set_options(timeout=PATIENCE)
    arguments = [*CHROMIUM, f"--use-file-for-fake-audio-capture={spoken}"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()
