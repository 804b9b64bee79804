"""Pictures of the Space for the docs.

python -m tests.spaces_app.browser.screenshots runs/demo/artefact docs/images
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from ..serving import serve
from .person import EXAMPLES, PATIENCE, Talk, chromium, find_chromium

SECRET = "of the screenshots alone"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
TALL = {"width": 1280, "height": 1250}
PICTURE, QUESTION = EXAMPLES / "test_picture_00001.png", EXAMPLES / "test_picture_00001_0.flac"


def take(artefact: Path, folder: Path) -> None:
    """Talks with an artefact and leaves space-*.png in a folder.

    Raises:
        ValueError: there is no browser.
    """
    program = find_chromium()
    if program is None:
        raise ValueError("got no Chromium, expected one: apt-get install chromium")
    with (
        tempfile.TemporaryDirectory() as temporary,
        serve(artefact, Path(temporary), PHI_MM_OWNER_SECRET=SECRET) as space,
        chromium(program, QUESTION) as browser,
    ):
        talked = [
            ("desktop", DESKTOP, "light"),
            ("phone", PHONE, "light"),
            ("dark", DESKTOP, "dark"),
        ]
        for name, size, scheme in talked:
            page = _open(browser, space.url, size, scheme)
            _talk(Talk(page))
            _save(page, folder / f"space-{name}.png")
            page.get_by_role("button", name="Like", exact=True).last.click()
            page.locator("#rating").wait_for()
        page = _open(browser, f"{space.url}/dashboard", TALL, "light")
        page.get_by_label("Secret").fill(SECRET)
        page.get_by_label("Secret").press("Enter")
        page.get_by_label("all", exact=True).check()
        expect(page.locator("#tiles")).to_contain_text(f"{2 * len(talked)}")
        _save(page, folder / "space-dashboard.png")


def _open(browser: Browser, url: str, size: dict[str, int], scheme: str) -> Page:
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    return page


def _talk(talk: Talk) -> None:
    expect(talk.page.get_by_text("Ready:")).to_be_visible()
    talk.show(PICTURE)
    talk.ask("now describe what you see.")
    talk.play(QUESTION)
    talk.ask()
    talk.page.evaluate("window.scrollTo(0, 0)")


def _save(page: Page, path: Path) -> None:
    page.wait_for_timeout(1000)  # pictures and waves are drawn
    page.screenshot(path=path)
    with Image.open(path) as picture:
        picture.convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
