"""A person types, shows and says something, and changes his mind."""

import base64
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import soundfile
import soxr
from playwright.sync_api import Page, expect
from scipy.signal import correlate

from ..conftest import assistant, user
from ..serving import Served
from .person import EXAMPLES, Talk

# Notes every text that the last message but one, the answer, has had.
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const answer = document.querySelector("[data-testid=bot]");
    const text = answer ? answer.innerText : "";
    if (text != window.seen.at(-1)) window.seen.push(text);
  }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""
# As when a picture is copied somewhere else.
COPY = """async (base64) => {
  const bytes = await (await fetch("data:image/png;base64," + base64)).blob();
  await navigator.clipboard.write([new ClipboardItem({"image/png": bytes})]);
}"""


def test_an_answer_grows_into_the_models_own(talk: Talk, expected: Callable) -> None:
    talk.set("Longest answer", 128)
    talk.page.evaluate(WATCH)
    answer = talk.ask("hello")
    assert answer == expected([user("hello")], 128)
    grown = [text for text in talk.page.evaluate("seen") if answer.startswith(text) and text]
    assert len(grown) > 3 and grown == sorted(set(grown), key=len) and grown[-1] == answer
    expect(talk.said_by("user")).to_have_text(["hello"])
    expect(talk.question).to_have_value("")
    second = talk.ask("and then?")
    assert second == expected([user("hello"), assistant(answer), user("and then?")], 128)
    expect(talk.said_by("bot").last).to_contain_text("tokens from memory")


def test_a_picture_is_uploaded_or_pasted(talk: Talk, media: Path, expected: Callable) -> None:
    talk.show(f"{media}/0.png")
    assert talk.ask("what?") == expected([user(f"{media}/0.png", "what?")])
    expect(talk.shown).to_be_hidden()
    expect(talk.conversation.locator("img")).to_have_attribute(
        "alt", "The picture of this question"
    )
    talk.clear.click()
    expect(talk.said_by("user")).to_have_count(0)

    talk.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    talk.page.evaluate(COPY, base64.b64encode((media / "1.png").read_bytes()).decode())
    talk.button("Paste from clipboard").click()
    expect(talk.shown).to_be_visible()
    assert talk.ask("what?") == expected([user(f"{media}/1.png", "what?")])


def test_a_recording_is_uploaded_and_needs_no_text(
    talk: Talk, media: Path, expected: Callable
) -> None:
    talk.play(f"{media}/2.wav")
    assert talk.ask() == expected([user(f"{media}/2.wav")])
    expect(talk.conversation.get_by_role("button", name="Play", exact=True)).to_be_visible()


def test_what_the_microphone_hears_reaches_the_model(
    talk: Talk, space: Served, spoken: Path, expected: Callable
) -> None:
    talk.button("Record audio").click()
    talk.button("Record").click()
    expect(talk.recording.get_by_text("0:03")).to_be_visible()
    talk.button("Stop").last.click()
    expect(talk.played).to_be_visible()
    talk.page.get_by_label("The owner may keep").check()
    answer = talk.ask()
    with sqlite3.connect(space.folder / "store" / "requests.sqlite3") as store:
        rows = store.execute("SELECT media FROM requests WHERE answer = ?", [answer]).fetchall()
    (name,) = json.loads(rows[-1][0])
    kept = space.folder / "store" / "media" / name
    assert answer == expected([user(str(kept))])
    sound, rate = soundfile.read(kept)
    assert 2.5 < len(sound) / rate < 6
    assert likeness(sound, rate, spoken) > 0.5
    assert likeness(sound, rate, EXAMPLES / "test_picture_00001_0.flac") < 0.3


def likeness(sound, rate: int, path: Path) -> float:
    """1 when the sound of a file is in another as it is, near 0 when it is not."""
    one, (other, other_rate) = soxr.resample(sound, rate, 16_000), soundfile.read(path)
    assert other_rate == 16_000
    return abs(correlate(one, other)).max() / ((one**2).sum() * (other**2).sum()) ** 0.5


def test_stop_ends_the_answer_and_the_next_question_is_answered(
    talk: Talk, expected: Callable
) -> None:
    talk.set("Longest answer", 512)
    talk.question.fill("hello")
    talk.button("Send").click()
    expect(talk.said_by("bot").first).to_contain_text("aj")
    talk.question.fill("too early")
    talk.button("Send").click()
    expect(talk.page.get_by_text("still being answered")).to_be_visible()
    expect(talk.question).to_have_value("too early")
    talk.button("Stop").click()
    expect(talk.said_by("bot").last).to_contain_text("tokens from memory · stopped")
    said = talk.said_by("bot").first.inner_text()
    whole = expected([user("hello")], 512)
    assert whole.startswith(said) and 2 <= len(said) < len(whole) == 512
    talk.set("Longest answer", 16)
    then = talk.ask("and then?")
    assert then == expected([user("hello"), assistant(said), user("and then?")])


def test_retry_edit_and_clear(talk: Talk, expected: Callable) -> None:
    first = talk.ask("hello")
    talk.set("Longest answer", 32)
    talk.button("Retry").click()
    expect(talk.said_by("bot").first).to_have_text(expected([user("hello")], 32))
    expect(talk.said_by("bot").last).to_contain_text("tokens/s")
    talk.button("Edit").click()
    talk.conversation.get_by_role("textbox").fill("good evening")
    talk.button("Submit").click()
    edited = expected([user("good evening")], 32)
    expect(talk.said_by("bot").first).to_have_text(edited)
    expect(talk.said_by("user")).to_have_text(["good evening"])
    assert not edited.startswith(first)

    talk.set("Longest answer", 512)
    talk.question.fill("and then?")
    talk.button("Send").click()
    expect(talk.said_by("bot").nth(2)).to_contain_text("a")
    talk.set("Longest answer", 16)
    talk.clear.click()  # while it is answered, which the next question need not wait for
    expect(talk.said_by("bot")).to_have_count(0)
    assert talk.ask("hello") == first
    expect(talk.said_by("bot")).to_have_count(2)


def test_an_example_fills_the_fields(talk: Talk, expected: Callable) -> None:
    talk.button("a picture + a spoken question").click()
    expect(talk.shown).to_be_visible()
    expect(talk.played).to_be_visible()
    picture, recording = EXAMPLES / "test_picture_00001.png", EXAMPLES / "test_picture_00001_0.flac"
    asked = {"role": "user", "content": [{"type": "image", "image": str(picture)}]}
    asked["content"].append({"type": "audio", "audio": str(recording)})
    assert talk.ask() == expected([asked])
    talk.button("add eight and seven.").click()
    expect(talk.question).to_have_value("add eight and seven.")


def test_errors_are_sentences_and_the_conversation_goes_on(
    talk: Talk, tmp_path: Path, expected: Callable
) -> None:
    (tmp_path / "mine.png").write_text("no picture")
    talk.show(tmp_path / "mine.png")
    talk.question.fill("what?")
    talk.button("Send").click()
    sentence = "got the image 'mine.png', expected a picture that can be"
    expect(talk.said_by("bot").first).to_contain_text(sentence)
    assert talk.ask("hello") == expected([user("hello")])
    talk.button("Send").click()
    expect(talk.page.get_by_text("got no question: type one, or record one")).to_be_visible()
    expect(talk.said_by("user").filter(has_text="hello")).to_have_count(1)


def test_temperature_leaves_the_answer_to_chance(talk: Talk, expected: Callable) -> None:
    talk.set("Longest answer", 48)
    talk.set("Temperature", 1.5)
    assert talk.ask("hello") != expected([user("hello")], 48)
    talk.set("Temperature", 0)
    talk.clear.click()
    expect(talk.said_by("user")).to_have_count(0)
    assert talk.ask("hello") == expected([user("hello")], 48)


def test_a_conversation_is_of_one_page_as_long_as_it_is_open(
    talk: Talk, visit: Callable[..., Page], space: Served, media: Path, expected: Callable
) -> None:
    other = Talk(visit(space.url))
    other.open_settings()
    other.set("Longest answer", 16)
    talk.show(f"{media}/0.png")
    mine = talk.ask("what?")
    theirs = other.ask("hello")
    then = [user("hello"), assistant(theirs), user("what?")]
    assert theirs == expected([user("hello")]) and other.ask("what?") == expected(then)
    then = [user(f"{media}/0.png", "what?"), assistant(mine), user("what?")]
    assert talk.ask("what?") == expected(then)
    talk.page.reload()
    expect(talk.page.get_by_text("Ready:")).to_be_visible()
    expect(talk.said_by("user")).to_have_count(0)
    talk.open_settings()
    talk.set("Longest answer", 16)
    assert talk.ask("what?") == expected([user("what?")])
