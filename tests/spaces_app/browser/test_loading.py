"""The page while the model is being loaded, and what was heard by one that reads transcripts."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from phi_mm.hub.export import save_artefact

from ..serving import Served, get, serve
from .person import Talk

# The model's code is its artefact's: this one waits until it may go on.
SLOW = """

while not __import__("pathlib").Path({gate!r}).exists():
    __import__("time").sleep(0.05)
"""


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model is loaded once this file is there."""
    return tmp_path_factory.mktemp("gate") / "gate"


@pytest.fixture(scope="module")
def slow_space(
    make_phi_mm: Callable, tmp_path_factory: pytest.TempPathFactory, gate: Path
) -> Iterator[Served]:
    """A Space without a secret, whose model is still being loaded; it reads what Whisper heard."""
    folder = tmp_path_factory.mktemp("slow")
    model, processor = make_phi_mm(audio_route="transcript")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    processor.transcript_tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    save_artefact(model, processor, folder / "artefact")
    with (folder / "artefact" / "modeling_phi_mm.py").open("a") as code:
        code.write(SLOW.format(gate=str(gate)))
    with serve(folder / "artefact", folder, until="health") as space:
        yield space


def test_a_question_waits_until_the_model_is_there_and_what_was_heard_is_shown(
    visit: Callable[..., Page], slow_space: Served, gate: Path, media: Path
) -> None:
    assert get(f"{slow_space.url}/ready")[0] == 503
    talk = Talk(visit(slow_space.url))
    sentence = "The model is being loaded; questions wait until it is there."
    expect(talk.page.get_by_text(sentence)).to_be_visible()
    talk.play(f"{media}/1.wav")
    talk.question.fill("what?")
    talk.button("Send").click()
    expect(talk.said_by("bot")).to_have_text(["waiting: number 1 in the queue"])
    gate.touch()
    expect(talk.page.get_by_text("reads what Whisper heard in recordings")).to_be_visible()
    expect(talk.said_by("bot").last).to_contain_text("tokens/s")
    status, body = get(f"{slow_space.url}/ready")
    assert status == 200 and json.loads(body)["waiting"] == 0
    recording, heard, question = talk.said_by("user").all()
    expect(recording.get_by_role("button", name="Play", exact=True)).to_be_visible()
    expect(heard).to_contain_text("heard: w")
    expect(question).to_have_text("what?")


def test_the_dashboard_lets_nobody_in_where_there_is_no_secret(
    visit: Callable[..., Page], slow_space: Served
) -> None:
    page = visit(f"{slow_space.url}/dashboard")
    expect(page.get_by_text("No secret is set, so nobody is let in.")).to_be_visible()
    expect(page.get_by_label("Secret")).to_have_count(0)
