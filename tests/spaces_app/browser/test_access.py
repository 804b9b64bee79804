"""The page by keyboard, by screen reader, in the dark and on a phone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from ..serving import Served
from .person import Talk

PHONE = {"width": 390, "height": 844}
# Of gradio 6.31: the footer's picture of a cog has the words beside it as its own text.
GRADIOS_OWN = {"image-redundant-alt"}
FOCUS = """() => {
  const element = document.activeElement, style = getComputedStyle(element);
  return [element.getAttribute("aria-label") || element.innerText || element.tagName,
          style.outlineStyle];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(
    visit: Callable[..., Page], space: Served, media: Path, scheme: str
) -> None:
    talk = Talk(visit(space.url, color_scheme=scheme))
    expect(talk.page.get_by_text("Ready:")).to_be_visible()
    dark = talk.page.evaluate("document.body.classList.contains('dark')")
    assert dark == (scheme == "dark")
    talk.open_settings()
    talk.set("Longest answer", 16)
    talk.show(f"{media}/0.png")
    talk.play(f"{media}/1.wav")
    talk.ask("what?")
    expect(talk.conversation.locator("img")).to_have_attribute(
        "alt", "The picture of this question"
    )
    faults = Axe().run(talk.page).response["violations"]
    told = {fault["id"]: [node["html"] for node in fault["nodes"]] for fault in faults}
    assert told.keys() <= GRADIOS_OWN, told
    assert talk.page.evaluate("document.documentElement.lang") == "en"
    loaded = talk.page.evaluate("performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded and all(url.startswith((space.url, "blob:", "data:")) for url in loaded)
    expect(talk.conversation).to_have_attribute("aria-live", "polite")


def test_the_keyboard_is_enough(talk: Talk) -> None:
    talk.question.focus()
    talk.page.keyboard.type("one")
    talk.page.keyboard.press("Shift+Enter")
    talk.page.keyboard.type("two")
    expect(talk.question).to_have_value("one\ntwo")
    talk.page.keyboard.press("Enter")
    expect(talk.said_by("bot").last).to_contain_text("tokens/s")
    assert talk.said_by("user").first.inner_text() == "one\ntwo"
    reached = []
    while "Settings" not in "".join(reached[-1:]) and len(reached) < 40:
        name, outline = talk.page.evaluate(FOCUS)
        assert outline == "solid", name
        reached.append(name.split("\n")[0])
        talk.page.keyboard.press("Tab")
    assert reached[:4] == ["TEXTAREA", "Send", "Stop", "Clear"]
    assert {"Upload file", "Capture from camera", "Record audio"} < set(reached)
    assert reached[-1] == "Settings"


def test_a_phone_shows_conversation_and_question_at_once(
    visit: Callable[..., Page], space: Served
) -> None:
    talk = Talk(visit(space.url, viewport=PHONE, has_touch=True, is_mobile=True))
    expect(talk.page.get_by_text("Ready:")).to_be_visible()
    places = [
        talk.page.locator("#talk").bounding_box(),
        talk.question.bounding_box(),
        talk.button("Send").bounding_box(),
        talk.picture.bounding_box(),
        talk.recording.bounding_box(),
    ]
    tops = [place["y"] for place in places]
    assert tops == sorted(tops)
    assert tops[2] + places[2]["height"] <= PHONE["height"]
    assert all(place["x"] >= 0 and place["x"] + place["width"] <= 390 for place in places)
    assert talk.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
