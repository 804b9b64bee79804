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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Served:
    """A Space that runs.

    Attributes:
        url: where it is.
        folder: its `log`, its `store` and its `uploads`.
    """

    url: str
    folder: Path

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


def get(url: str, body: dict | None = None) -> tuple[int, bytes]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
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
        **settings,
    }
    command = [sys.executable, "-m", "phi_mm.cli", "serve", str(artefact), "--port", str(port)]
    space = Served(f"http://127.0.0.1:{port}", folder)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while not _good(f"{space.url}/{until}"):
            assert process.poll() is None, space.log
            time.sleep(0.1)
        yield space
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the process and the Space that it started
        process.wait()


def _good(url: str) -> bool:
    try:
        return get(url)[0] == 200
    except OSError:
        return False
