"""The Space in a process of its own, started as users start it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Served:
    """A Space that runs.

    Attributes:
        url: where it is.
        folder: its `log`, its `store`, its `uploads`, and `tmp` for other files.
        command: the process that was started; the Space is its child.
    """

    url: str
    folder: Path
    command: subprocess.Popen

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def process(self) -> psutil.Process:
        """The Space's own."""
        (process,) = psutil.Process(self.command.pid).children()
        return process

    def files(self) -> set[str]:
        """Names of all that lies in `uploads` and `tmp`."""
        folders = (self.folder / "uploads", self.folder / "tmp")
        return {path.name for folder in folders for path in folder.rglob("*") if path.is_file()}

    def upload(self, name: str, content: bytes) -> tuple[int, str]:
        """Status, and the path of the file or why it was refused."""
        boundary = uuid.uuid4().hex
        head = f'Content-Disposition: form-data; name="files"; filename="{name}"'
        body = f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + f"\r\n--{boundary}--".encode()
        kind = f"multipart/form-data; boundary={boundary}"
        status, said = send(f"{self.url}/gradio_api/upload", body, kind)
        return status, json.loads(said)[0] if status == 200 else said.decode()

    def ask(self, *fields: Any, **body: Any) -> tuple[str, Any]:
        """The last event for a question, and what it says: an answer, or the error's sentence.

        Args:
            fields: question, picture, recording, longest answer, temperature, whether it may be
                kept; left out, as usual.
            body: more of the request.
        """
        usual = ["hello", None, None, 16, 0, False]
        fields = [*fields, *usual[len(fields) :]]
        status, said = get(f"{self.url}/gradio_api/call/ask", {"data": fields, **body})
        if status != 200:
            return str(status), said.decode()
        return self.read(json.loads(said)["event_id"])

    def read(self, event: str) -> tuple[str, Any]:
        """The last event of a stream, as `ask` gives it."""
        _, stream = get(f"{self.url}/gradio_api/call/ask/{event}")
        name, data = stream.decode().strip().split("\n\n")[-1].split("\n")
        said = json.loads(data.removeprefix("data: "))
        name = name.removeprefix("event: ")
        return name, said[0] if name == "complete" else said["error"]


def get(url: str, body: dict | None = None) -> tuple[int, bytes]:
    return send(url, None if body is None else json.dumps(body).encode())


def send(
    url: str, body: bytes | Iterable[bytes] | None, kind: str = "application/json"
) -> tuple[int, bytes]:
    request = urllib.request.Request(url, body, {"content-type": kind})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@contextmanager
def serve(artefact: Path, folder: Path, until: str = "ready", **settings: str) -> Iterator[Served]:
    """What `phi-mm serve` serves, until the block ends.

    Args:
        until: "ready", the block begins when the model answers; or "health", when there is a page.
        settings: environment variables.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "HF_HUB_OFFLINE": "1",
        "PHI_MM_STORE": str(folder / "store"),
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder / "tmp"),
        **settings,
    }
    command = [sys.executable, "-m", "phi_mm.cli", "serve", str(artefact), "--port", str(port)]
    (folder / "tmp").mkdir(exist_ok=True)
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
        )
    space = Served(f"http://127.0.0.1:{port}", folder, process)
    try:
        while not _good(f"{space.url}/{until}"):
            assert process.poll() is None, space.log
            time.sleep(0.1)
        yield space
    finally:
        with suppress(ProcessLookupError):  # ended by the test
            os.killpg(process.pid, signal.SIGTERM)  # the process and the Space that it started
        process.wait()


def _good(url: str) -> bool:
    try:
        return get(url)[0] == 200
    except OSError:
        return False
