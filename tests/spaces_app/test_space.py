"""The whole Space in a process of its own, started as users start it: page, API, health."""

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine.loading import load
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult
from settings import Settings

from .conftest import assistant, plainly, user
from .serving import ROOT, get, serve

EXAMPLES = ROOT / "spaces_app" / "examples"
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def url(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `phi-mm serve` serves the artefact."""
    folder, settings = tmp_path_factory.mktemp("serve"), {"GRADIO_MCP_SERVER": "True"}
    settings["PHI_MM_PRECISION"] = "int8"
    with serve(artefact, folder, PHI_MM_PREFIX_MB="8", **settings) as space:
        yield space.url
    assert "int8: as set" in space.log
    told = [json.loads(line) for line in space.log.splitlines() if line.startswith("{")]
    with sqlite3.connect(space.folder / "store" / "requests.sqlite3") as store:
        rows = store.execute("SELECT id, precision, question, answer FROM requests").fetchall()
    assert rows == [(line["id"], "int8", None, None) for line in told] and rows


def test_health_and_readiness(url: str, artefact: Path) -> None:
    expected = {
        "state": f"Ready: {artefact.name} in int8, sees pictures and hears recordings.",
        "waiting": 0,
        "answering": False,
    }
    for route in ("health", "ready"):
        status, body = get(f"{url}/{route}")
        assert (status, json.loads(body)) == (200, expected)
    status, body = get(url)
    assert status == 200 and b"phi-mm" in body


def test_answers_are_the_models_own_over_several_turns(
    url: str, artefact: Path, media: Path
) -> None:
    model, processor = load(str(artefact), None, "int8")

    def expected(messages: list[dict]) -> str:
        return processor.tokenizer.decode(plainly(model, processor, messages, 16)).strip()

    clients = Client(url, verbose=False), Client(url, verbose=False)
    first = [user(f"{media}/0.png", f"{media}/1.wav", "what?")]
    for client in clients:
        given = {"image": handle_file(f"{media}/0.png"), "audio": handle_file(f"{media}/1.wav")}
        answer = client.predict(text="what?", **given, length=16, api_name="/ask")
        assert answer == expected(first)
    second = [*first, assistant(answer), user("and then?")]
    job = clients[0].submit(text="and then?", length=16, api_name="/ask")
    grown = list(job)
    assert grown[-1] == expected(second)
    assert len(grown) > 3
    clients[1].predict(api_name="/forget")
    alone = clients[1].predict(text="and then?", length=16, api_name="/ask")
    assert alone == expected([user("and then?")])


def test_curl_is_enough(url: str, artefact: Path) -> None:
    """As README.md of the Space has it, with a conversation that goes on."""
    model, processor = load(str(artefact), None, "int8")
    messages = []
    for question in ("hello", "again"):
        messages.append(user(question))
        body = {"data": [question, None, None, 16, 0, False], "session_hash": "my-conversation"}
        status, answer = get(f"{url}/gradio_api/call/ask", body)
        assert status == 200
        _, stream = get(f"{url}/gradio_api/call/ask/{json.loads(answer)['event_id']}")
        event, data = stream.decode().strip().split("\n\n")[-1].split("\n")
        assert event == "event: complete"
        text = json.loads(data.removeprefix("data: "))[0]
        ids = plainly(model, processor, messages, 16)
        assert text == processor.tokenizer.decode(ids).strip()
        messages.append(assistant(text))


def test_models_may_ask_by_mcp(url: str, artefact: Path) -> None:
    model, processor = load(str(artefact), None, "int8")

    async def ask() -> tuple[dict, list[CallToolResult]]:
        async with (
            streamable_http_client(f"{url}/gradio_api/mcp/") as (reading, writing, _),
            ClientSession(reading, writing) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            given = [
                {"text": "hello", "length": 16},
                {"text": "again", "length": 16},
                {"text": " "},
            ]
            return tools, [await session.call_tool("ask", words) for words in given]

    tools, (hello, again, nothing) = asyncio.run(ask())
    assert "picture" in tools["ask"].description
    assert {"text", "image", "audio", "length"} <= tools["ask"].inputSchema["properties"].keys()
    for question, answer in (("hello", hello), ("again", again)):  # each stands alone
        ids = plainly(model, processor, [user(question)], 16)
        assert answer.content[0].text == processor.tokenizer.decode(ids).strip()
    assert hello.content != again.content
    assert nothing.isError
    assert "got no question: type one, or record one" in nothing.content[0].text


def test_errors_are_sentences_and_the_conversation_survives(url: str, tmp_path: Path) -> None:
    client = Client(url, verbose=False)
    before = client.predict(text="hello", length=16, api_name="/ask")
    with pytest.raises(AppError, match="got no question: type one, or record one"):
        client.predict(text="  ", length=16, api_name="/ask")
    (tmp_path / "mine.png").write_text("no picture")
    with pytest.raises(AppError, match="got the image 'mine.png', expected a picture that can be"):
        client.predict(text="x", image=handle_file(str(tmp_path / "mine.png")), api_name="/ask")
    (tmp_path / "mine.wav").write_text("no sound")
    with pytest.raises(AppError, match="got the audio 'mine.wav', expected a recording that can"):
        client.predict(text="x", audio=handle_file(str(tmp_path / "mine.wav")), api_name="/ask")
    with pytest.raises(AppError, match="conversation of .* tokens, expected fewer than 2048"):
        client.predict(text="x" * 2100, api_name="/ask")
    after = client.predict(text="hello", length=16, api_name="/ask")
    other = Client(url, verbose=False)
    assert other.predict(text="hello", length=16, api_name="/ask") == before
    assert other.predict(text="hello", length=16, api_name="/ask") == after


def test_files_of_the_server_are_not_opened(url: str) -> None:
    passwords = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    for media in ([passwords, None], [None, passwords]):
        body = {"data": ["what?", *media, 16, 0, False]}
        _, answer = get(f"{url}/gradio_api/call/ask", body)
        _, stream = get(f"{url}/gradio_api/call/ask/{json.loads(answer)['event_id']}")
        assert b"event: error" in stream and b"expected a" not in stream


def test_only_what_is_documented_can_be_called(url: str) -> None:
    api = Client(url, verbose=False).view_api(return_format="dict", print_info=False)
    assert list(api["named_endpoints"]) == ["/ask", "/forget", "/feedback", "/delete"]
    names = [p["parameter_name"] for p in api["named_endpoints"]["/ask"]["parameters"]]
    assert names == ["text", "image", "audio", "length", "temperature", "keep"]
    assert "picture" in api["named_endpoints"]["/ask"]["description"]
    names = [p["parameter_name"] for p in api["named_endpoints"]["/feedback"]["parameters"]]
    assert names == ["rating", "reason", "correction", "keep"]


def test_examples_are_there_and_are_those_of_the_command(tmp_path: Path, capsys) -> None:
    from phi_mm.cli import main

    lines = (EXAMPLES / "examples.tsv").read_text().splitlines()
    named = {name for line in lines for name in line.split("\t")[1:] if name}
    assert {path.name for path in EXAMPLES.iterdir()} == {*named, "examples.tsv"}
    main(["tiny", "examples", str(tmp_path)])
    for path in EXAMPLES.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
    assert capsys.readouterr().out.count("\n") == len(lines) == 5


def test_settings_say_what_is_wrong(artefact: Path) -> None:
    good = Settings.read({"PHI_MM_MODEL": str(artefact), "PHI_MM_WAITING": "3"})
    assert (good.limits.waiting, good.precision, good.media_bytes) == (3, "auto", 256 << 20)
    assert Settings.read({"PHI_MM_MODEL": "a/b", "PHI_MM_REVISION": COMMIT}).revision == COMMIT
    for given, message in (
        ({}, "got no PHI_MM_MODEL, expected an artefact"),
        ({"PHI_MM_MODEL": "a/b"}, "REVISION=None, expected the 40 digits of a commit"),
        ({"PHI_MM_MODEL": "a/b", "PHI_MM_REVISION": "main"}, "REVISION=main, expected the 40"),
        ({"PHI_MM_MODEL": str(artefact), "PHI_MM_PRECISION": "int4"}, "int4, expected one of auto"),
        ({"PHI_MM_MODEL": str(artefact), "PHI_MM_WAITING": "0"}, "got PHI_MM_WAITING=0, expected"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings.read(given)


def test_the_owners_pages_are_closed_without_a_secret(url: str) -> None:
    status, body = get(f"{url}/metrics")
    assert status == 403 and body.startswith(b"got no PHI_MM_OWNER_SECRET")
    status, body = get(f"{url}/dashboard")
    assert status == 200 and b"No secret is set, so nobody is let in." in body
