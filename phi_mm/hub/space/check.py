"""Whether the folder of a Space builds, starts and answers, in an environment made for it alone."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import SpaceCard
from huggingface_hub.utils import httpx

from phi_mm.hub.space.folder import REQUIREMENTS
from phi_mm.hub.space.plan import TOKEN

logger = logging.getLogger(__name__)

LAST_LINES = 15  # of a log, told when something failed
PROGRESS = re.compile(r"(Collecting|Processing|Installing) .*?(?= \(from |:|$)")  # of pip's lines
START_SECONDS = 1800  # so long the Hub waits for a Space
POLL_SECONDS = 0.5
QUESTION = {"text": "What can you do?", "length": 16}
# Of this process, and not of a Space's: settings, paths of modules, who is logged in.
NOT_ITS_OWN = ("PHI_MM_", "GRADIO_", "PYTHON", "VIRTUAL_ENV", TOKEN)
STORE = "PHI_MM_STORE"  # on the Hub a path like /data, which is not here
# Of the Space's machine, not of this one; and where its records are copied to.
NOT_TRIED = ("PHI_MM_PRECISION", "PHI_MM_DATASET")


def check_build(folder: Path, variables: Mapping[str, str], secrets: Mapping[str, str]) -> str:
    """Installs what the folder requires into a new environment, starts it and asks it.

    Args:
        folder: of a Space.
        variables, secrets: its settings.

    Returns:
        Its answer.

    Raises:
        ValueError: with the last lines of the log, when it does not install, start or answer.
    """
    here, there = ".".join(map(str, sys.version_info[:2])), _python_version(folder)
    if here != there:
        logger.info("this is Python %s, the Space's is %s: what differs is not seen", here, there)
    with tempfile.TemporaryDirectory(prefix="phi-mm-space-") as work:
        logger.info("installing into a new environment, which takes minutes")
        environment = Path(work) / "environment"
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        python = environment / "bin" / "python"
        install(python, folder)
        logger.info("starting it with its settings")
        return start_and_ask(python, folder, variables, secrets, Path(work))


def install(python: Path, folder: Path) -> None:
    """Installs the requirements of a folder for an interpreter.

    Raises:
        ValueError: with the last lines that pip wrote.
    """
    command = [python, "-m", "pip", "install", "--no-input", "-r", REQUIREMENTS]
    lines = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        command,
        cwd=folder,
        env=_environment({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as pip:
        for line in pip.stdout:
            lines.append(line.rstrip())
            if progress := PROGRESS.match(line):
                logger.info("  %s", progress[0])
    if pip.returncode:
        raise ValueError(_failure(f"{REQUIREMENTS} cannot be installed", lines))


def start_and_ask(
    python: Path,
    folder: Path,
    variables: Mapping[str, str],
    secrets: Mapping[str, str],
    work: Path,
) -> str:
    """Starts the folder's app as the Hub does, asks it one question, and ends it.

    Args:
        python: the interpreter.
        folder: of a Space.
        variables, secrets: its settings.
        work: a folder for what it writes.

    Returns:
        Its answer.

    Raises:
        ValueError: with the last lines of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {**variables, **secrets, "GRADIO_SERVER_PORT": str(port)}
    settings |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_TEMP_DIR": str(work / "uploads")}
    settings = {name: value for name, value in settings.items() if name not in NOT_TRIED}
    if STORE in settings:
        settings[STORE] = str(work / "store")
    log = work / "app.log"
    with log.open("wb") as output:
        app = subprocess.Popen(
            [python, "app.py"], cwd=folder, env=_environment(settings), stdout=output, stderr=output
        )
    try:
        return _ask(app, f"http://127.0.0.1:{port}")
    except (ValueError, httpx.HTTPError) as error:
        lines = log.read_text("utf-8", errors="replace").splitlines()[-LAST_LINES:]
        shown = [_without(line, secrets.values()) for line in lines]
        raise ValueError(_failure(f"the Space does not work: {error}", shown)) from error
    finally:
        _end(app)


def _ask(app: subprocess.Popen, url: str) -> str:
    """The answer of an app once it is ready.

    Raises:
        ValueError: it ended, could not load its model, took too long, or had no answer.
        httpx.HTTPError: it refused.
    """
    with httpx.Client(base_url=url, timeout=START_SECONDS, trust_env=False) as client:
        _wait_until_ready(app, client)
        asked = client.post("/gradio_api/call/v2/ask", json=QUESTION).raise_for_status()
        told = client.get(f"/gradio_api/call/ask/{asked.json()['event_id']}").raise_for_status()
    event, data = told.text.strip().split("\n\n")[-1].split("\n")[:2]
    if event != "event: complete":
        raise ValueError(f"it answered {data.removeprefix('data: ')}")
    return json.loads(data.removeprefix("data: "))[0]


def _wait_until_ready(app: subprocess.Popen, client: httpx.Client) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if app.poll() is not None:
            raise ValueError(f"app.py ended with exit code {app.returncode}")
        try:
            if client.get("/ready").status_code == 200:
                return
            health = client.get("/health")
        except httpx.TransportError:  # it does not listen yet
            health = None
        if health is not None and health.status_code != 200:
            raise ValueError(health.json()["state"])
        time.sleep(POLL_SECONDS)
    raise ValueError(f"it was not ready after {START_SECONDS} s")


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(NOT_ITS_OWN)}
    kept |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    if TOKEN not in settings:  # nor does a Space know the token of whoever deployed it
        kept["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
    return kept | {"GRADIO_ANALYTICS_ENABLED": "False", **settings}


def _end(app: subprocess.Popen) -> None:
    app.terminate()
    try:
        app.wait(timeout=10)
    except subprocess.TimeoutExpired:
        app.kill()
        app.wait()


def _failure(what: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{what}; the last lines of its log:", *(f"  {line}" for line in lines)])


def _without(line: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        line = line.replace(secret, "***")
    return line


def _python_version(folder: Path) -> str:
    return SpaceCard((folder / "README.md").read_text(encoding="utf-8")).data.python_version
