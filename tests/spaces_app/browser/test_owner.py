"""The owner's page, and what visitors think of answers."""

import sqlite3
from collections.abc import Callable

from playwright.sync_api import Page, expect

from ..serving import Served
from .conftest import SECRET
from .person import Talk


def rows(space: Served, query: str, *values: str) -> list[tuple]:
    with sqlite3.connect(space.folder / "store" / "requests.sqlite3") as store:
        return store.execute(query, values).fetchall()


def test_the_dashboard_opens_for_the_owner_alone_and_counts_what_was_asked(
    talk: Talk, visit: Callable[..., Page], space: Served
) -> None:
    talk.ask("hello")
    talk.ask("and then?")
    newest = "SELECT id, conversation FROM requests ORDER BY number DESC LIMIT 1"
    ((request, conversation),) = rows(space, newest)
    page = visit(f"{space.url}/dashboard")
    secret = page.get_by_label("Secret")
    expect(secret).to_be_visible()
    expect(page.get_by_text("first token p50")).to_have_count(0)
    secret.fill("of somebody else entirely")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_text("this is not the owner's secret")).to_be_visible()
    expect(page.get_by_text("first token p50")).to_have_count(0)
    secret.fill(SECRET)
    secret.press("Enter")
    expect(page.get_by_text("first token p50")).to_be_visible()
    expect(secret).to_be_hidden()
    ((asked,),) = rows(space, "SELECT count(*) FROM requests")
    told = page.locator("#tiles div:has(> dt:text-is('requests')) > dd")
    expect(told).to_have_text(str(asked))
    page.locator("#request textarea").fill(request)
    page.locator("#request textarea").press("Enter")
    expect(page.get_by_text(conversation)).to_be_visible()
    expect(page.get_by_label("Question")).to_have_value("not kept: the user did not consent")


def test_thumbs_and_a_corrected_answer_are_kept_with_consent(talk: Talk, space: Served) -> None:
    answer = talk.ask("who are you?")
    talk.conversation.get_by_role("button", name="Dislike").first.click()
    form = talk.page.locator("#rating")
    expect(form.get_by_label("Your rating is of this answer")).to_have_value(answer)
    form.get_by_label("What should it have said?").fill("phi-mm")
    talk.button("Send feedback").click()
    expect(talk.page.get_by_text("tick the box that lets the owner keep")).to_be_visible()
    kept = "SELECT rating, correction FROM feedback JOIN requests ON feedback.request = requests.id"
    kept += " WHERE characters = 12 ORDER BY requests.number DESC LIMIT 1"
    assert rows(space, kept) == [(-1, None)]
    talk.page.get_by_label("The owner may keep").check()
    talk.button("Send feedback").click()
    expect(form).to_be_hidden()
    assert rows(space, kept) == [(-1, "phi-mm")]
    told = rows(space, "SELECT question, answer FROM requests WHERE answer = ?", answer)
    assert told == [("who are you?", answer)]
