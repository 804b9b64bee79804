"""Many users at once: how quick the Space stays, what it refuses, and that every answer is the one
that a user alone gets.

    python benchmarks/load.py runs/demo/artefact --users 1 4 16 64 --minutes 1
    python benchmarks/load.py runs/demo/artefact --users 64 --minutes 20     # does memory grow?

Each user holds one conversation after the other: typed questions, pictures, recordings, both, and
second questions, over Gradio's plain HTTP and its stream of events. What is refused for want of
room is asked again a second later. This is asyncio with httpx, and not locust, for which an answer
that streams is one request: it has no time to first token, and no answer to compare. The last line
is JSON. The exit code is 1 when an answer was wrong, or an error no refusal.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil

SPACE = Path(__file__).parents[1] / "spaces_app"
EXAMPLES = SPACE / "examples"
REFUSALS = ("questions are waiting already", "there are too many questions")
PATIENCE = 300.0  # seconds for one answer
MEGABYTE = 1 << 20

Turn = tuple[str, str | None, str | None]  # words, picture, recording
CONVERSATIONS: list[list[Turn]] = [
    [("add eight and seven.", None, None), ("and nine and four?", None, None)],
    [
        ("please tell me the colour of the large thing.", "test_picture_00000.png", None),
        ("now describe what you see.", None, None),
    ],
    [("", None, "test_talk_00000_0.flac"), ("say that again.", None, None)],
    [
        ("", "test_picture_00001.png", "test_picture_00001_0.flac"),
        ("what is the colour of the small thing?", None, None),
        ("add two and three.", "test_picture_00002.png", None),
    ],
]


@dataclass
class Measured:
    """What happened at one number of users.

    Attributes:
        users, seconds: how many, and for how long.
        first, whole: seconds to the first word and to the whole answer, of each answer.
        refused: questions for which there was no room, asked again.
        errors: other sentences, and how often.
        wrong: answers that are not those of a user alone.
        memory: (seconds since the start, bytes) of the server.
    """

    users: int
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    def summary(self) -> dict:
        """All of it in numbers."""

        def quantile(values: list[float], percent: float) -> float:
            return round(float(np.percentile(values, percent)), 3) if values else float("nan")

        return {
            "users": self.users,
            "minutes": round(self.seconds / 60, 2),
            "answers": len(self.whole),
            "answers_per_second": round(len(self.whole) / self.seconds, 2),
            "first_word_p50": quantile(self.first, 50),
            "first_word_p95": quantile(self.first, 95),
            "answer_p50": quantile(self.whole, 50),
            "answer_p95": quantile(self.whole, 95),
            "refused": self.refused,
            "errors": sum(self.errors.values()),
            "wrong": len(self.wrong),
            **self._growth(),
        }

    def _growth(self) -> dict[str, float]:
        """Resident megabytes: at the start, half-way and at the end, each a tenth's median."""
        if len(self.memory) < 10:
            return {}
        sizes = np.array([size for _, size in self.memory]) / MEGABYTE
        tenth = len(sizes) // 10
        half = len(sizes) // 2
        parts = {"start": sizes[:tenth], "half": sizes[half : half + tenth], "end": sizes[-tenth:]}
        return {f"memory_{name}": round(float(np.median(part))) for name, part in parts.items()}


class Visitor:
    """Asks the Space as a program does.

    Args:
        client: to its address.
        length: most tokens of an answer.
    """

    def __init__(self, client: httpx.AsyncClient, length: int):
        self.client, self.length = client, length

    async def ask(self, turn: Turn, session: str) -> AsyncIterator[tuple[str, str]]:
        """Yields ("generating", text so far), and at last ("complete", text) or ("error", why)."""
        words, picture, recording = turn
        files = [await self._upload(name) for name in (picture, recording)]
        body = {"data": [words, *files, self.length, 0, False], "session_hash": session}
        said = await self.client.post("/gradio_api/call/ask", json=body)
        if said.status_code != 200:
            yield "error", f"HTTP {said.status_code}"
            return
        event = said.json()["event_id"]
        kind = ""
        async with self.client.stream("GET", f"/gradio_api/call/ask/{event}") as stream:
            async for line in stream.aiter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data" and kind in ("generating", "complete", "error"):
                    data = json.loads(value)
                    yield kind, data[0] if kind != "error" else str(data["error"])

    async def _upload(self, name: str | None) -> dict | None:
        if name is None:
            return None
        files = {"files": (name, (EXAMPLES / name).read_bytes())}
        said = await self.client.post("/gradio_api/upload", files=files)
        return {"path": said.raise_for_status().json()[0], "meta": {"_type": "gradio.FileData"}}


async def alone(visitor: Visitor) -> list[list[str]]:
    """The answers that one user gets."""
    answers = []
    for conversation in CONVERSATIONS:
        session, said = uuid.uuid4().hex, []
        for turn in conversation:
            async for kind, text in visitor.ask(turn, session):
                last = kind, text
            if last[0] != "complete":
                raise ValueError(f"got {last[1]!r} for {turn}, expected an answer")
            said.append(last[1])
        answers.append(said)
    return answers


async def talk(
    visitor: Visitor, number: int, right: list[list[str]], until: float, measured: Measured
) -> None:
    """One user: conversations one after the other, until it is time to go."""
    while time.monotonic() < until:
        place = number % len(CONVERSATIONS)
        number, session = number + 1, uuid.uuid4().hex
        for turn, expected in zip(CONVERSATIONS[place], right[place], strict=True):
            if not await _turn(visitor, turn, session, expected, until, measured):
                break


async def _turn(
    visitor: Visitor, turn: Turn, session: str, expected: str, until: float, measured: Measured
) -> bool:
    """Whether there was an answer, and the conversation can go on."""
    while True:
        kind, text, first, begun = "", "no end of the stream", None, time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE):
                async for kind, text in visitor.ask(turn, session):
                    if first is None and text and kind != "error":
                        first = time.monotonic() - begun
        except (httpx.HTTPError, TimeoutError) as error:
            kind, text = "error", type(error).__name__
        if kind == "complete":
            measured.whole.append(time.monotonic() - begun)
            measured.first.append(measured.whole[-1] if first is None else first)
            if text != expected:
                measured.wrong.append(f"{turn}: got {text!r}, expected {expected!r}")
            return True
        if not any(words in text for words in REFUSALS):
            measured.errors[text] += 1
            return False
        measured.refused += 1
        if time.monotonic() > until:
            return False
        await asyncio.sleep(1)


async def crowd(
    visitor: Visitor, users: int, right: list[list[str]], minutes: float, server: psutil.Process
) -> Measured:
    """So many users for so long."""
    measured, begun = Measured(users), time.monotonic()

    async def watch() -> None:
        while server is not None:
            measured.memory.append((time.monotonic() - begun, server.memory_info().rss))
            await asyncio.sleep(min(1.0, minutes))

    watching = asyncio.create_task(watch())
    until = begun + 60 * minutes
    await asyncio.gather(*(talk(visitor, i, right, until, measured) for i in range(users)))
    watching.cancel()
    measured.seconds = time.monotonic() - begun
    return measured


@contextlib.contextmanager
def served(artefact: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The Space's address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_TEMP_DIR": f"{folder}/uploads",
            "PHI_MM_MODEL": str(artefact.resolve()),
            "PHI_MM_PREFIX_MB": "64",  # soon full, so that what grows after that is a leak
            "PHI_MM_STORE": f"{folder}/store",
        }
        with open(f"{folder}/log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "app.py"], cwd=SPACE, env=env, stdout=log, stderr=log
            )
        try:
            _wait(f"http://127.0.0.1:{port}/ready", process, Path(folder) / "log")
            yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    while process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.2)
    raise ValueError(f"the Space ended with exit code {process.returncode}:\n{log.read_text()}")


def show(measured: list[Measured]) -> None:
    """A table, memory by the minute, what went wrong, and all of it as one line of JSON."""
    rows = [some.summary() for some in measured]
    for name in rows[0]:
        print(f"{name:>20}", *(f"{row.get(name, ''):>10}" for row in rows))
    for some in measured:
        minutes = {int(seconds // 60): size for seconds, size in some.memory}
        print(f"memory of {some.users} users, MB by the minute:", end=" ")
        print(*(round(size / MEGABYTE) for size in minutes.values()))
        for sentence, times in some.errors.most_common():
            print(f"{times} × {sentence}")
        for wrong in some.wrong[:5]:
            print(wrong)
    print(json.dumps(rows))


async def run(given: argparse.Namespace, url: str, server: psutil.Process | None) -> list[Measured]:
    # Shorter than the server's five seconds: who writes into a connection just as that closes it
    # reads an error.
    limits = httpx.Limits(
        max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0
    )
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=PATIENCE) as client:
        visitor = Visitor(client, given.length)
        right = await alone(visitor)
        return [await crowd(visitor, users, right, given.minutes, server) for users in given.users]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("artefact", type=Path, nargs="?", help="is served for this")
    parser.add_argument("--url", help="of a Space that runs already; its memory is not watched")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--minutes", type=float, default=1.0, help="for each number of users")
    parser.add_argument("--length", type=int, default=64, help="most tokens of an answer")
    given = parser.parse_args(arguments)
    if (given.artefact is None) == (given.url is None):
        parser.error("got no artefact or both, expected an artefact or --url")
    if given.url:
        measured = asyncio.run(run(given, given.url, None))
    else:
        with served(given.artefact) as (url, server):
            measured = asyncio.run(run(given, url, server))
    show(measured)
    sys.exit(any(some.wrong or some.errors for some in measured))


if __name__ == "__main__":
    main()
