"""Words that would be a page's own if they could: nothing in them runs, and nothing is fetched."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import expect

from .person import Talk

WORDS = """\
<script>hacked = 1</script>
<img src=x onerror="hacked = 1"> <svg onload="hacked = 1"></svg> <b onclick="hacked = 1">bold</b>
<iframe srcdoc="<script>parent.hacked = 1</script>"></iframe>
<a href="javascript:hacked = 1" id="trap">link</a> [link](javascript:hacked=1)
![picture]({url}/markdown.png) <img src="{url}/html.png">
<div style="background: url({url}/style.png)">x</div> <link rel="stylesheet" href="{url}/x.css">
<video src="{url}/x.mp4" autoplay></video> <object data="{url}/x.svg"></object>
$\\href{{javascript:hacked=1}}{{x}}$"""


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Another server, and what it was asked for."""
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_nothing_in_words_runs_or_is_fetched(talk: Talk, elsewhere, tmp_path: Path) -> None:
    url, asked = elsewhere
    talk.ask(WORDS.format(url=url))
    expect(talk.said_by("user")).to_contain_text("bold")
    broken = tmp_path / "<img src=x onerror=hacked=1>.png"
    broken.write_text("no picture")
    talk.picture.locator("input[type=file]").set_input_files(broken)
    expect(talk.shown).to_be_visible()
    talk.question.fill("what is it?")
    talk.button("Send").click()
    expect(talk.said_by("bot").last).to_contain_text("expected a picture that can be opened")
    expect(talk.said_by("user").filter(has_text="img src=x")).to_have_count(1)
    for link in talk.conversation.locator("a").all():
        assert not (link.get_attribute("href") or "").startswith("javascript:")
    for trap in talk.conversation.locator("b, #trap").all():
        trap.click()
    assert talk.page.evaluate("typeof hacked") == "undefined"
    assert asked == []
    assert talk.ask("hello")
