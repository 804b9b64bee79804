"""deploy-space: the folder, its trial, and the Space on a Hub on the loopback."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from loopback import LoopbackHub
from packaging.requirements import Requirement

from phi_mm.checkout import CONSTRAINTS, LICENSE, SPACE
from phi_mm.cli import main
from phi_mm.hub.space import folder as space_folder
from phi_mm.hub.space.check import check_build, install, start_and_ask
from phi_mm.hub.space.folder import read_requirements, write_folder
from phi_mm.hub.space.plan import Space, read_secrets

VALUE = "a-value-that-nobody-may-see"
# A whole app of the standard library alone, so that its environment is quick to make.
SMALL_APP = """
import json, os
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        answer = json.dumps([os.environ["PHI_MM_WAITING"] + os.environ.get("HF_TOKEN", "nobody")])
        self.tell("{}" if self.path == "/ready" else f"event: complete\\ndata: {answer}\\n\\n")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.tell('{"event_id": "1"}')

    def tell(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

HTTPServer(("127.0.0.1", int(os.environ["GRADIO_SERVER_PORT"])), Handler).serve_forever()
"""

FAILED_APP = (
    SMALL_APP.replace("send_response(200)", "send_response(503)")
    .replace('self.path == "/ready"', "False")
    .replace(
        'f"event: complete\\ndata: {answer}\\n\\n"',
        """'{"state": "the model could not be loaded"}'""",
    )
)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def copied() -> set[str]:
    """What of spaces_app/ belongs into a Space."""
    return {name for name in contents(SPACE) if "__pycache__" not in name}


def put_model(artefact: Path, repo: str, private: bool = False) -> str:
    """An artefact on the Hub; its commit."""
    HfApi().create_repo(repo, private=private, exist_ok=True)
    return HfApi().upload_folder(repo_id=repo, folder_path=artefact).oid


def deploy(folder: Path, name: str, *options: str, model: str = "ann/served") -> None:
    main(["deploy-space", str(folder), "--model", model, "--space", name, "--no-check", *options])


def test_a_space_is_written_and_pushed_with_its_settings_first(
    artefact: Path, login: Callable, loopback: LoopbackHub, tmp_path: Path, capfd, monkeypatch
) -> None:
    token = loopback.token("ann")
    login(token)
    commit = put_model(artefact, "ann/served")
    monkeypatch.setenv("MINE", VALUE)
    begun = len(loopback.seen)
    options = ("--variable", "PHI_MM_WAITING=7", "--secret", "OTHER=MINE")
    deploy(tmp_path / "talk", "talk", *options)

    files = contents(tmp_path / "talk")
    assert set(files) == {*copied(), "LICENSE", "deployed.json"}
    assert files["LICENSE"] == LICENSE.read_bytes()
    changed = {name for name in copied() if files[name] != (SPACE / name).read_bytes()}
    assert changed == {"README.md", "requirements.txt"}
    _, front, text = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "title": "talk",
        "emoji": "👁️",
        "colorFrom": "indigo",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": "6.31.0",
        "python_version": "3.12",
        "app_file": "app.py",
        "license": "apache-2.0",
        "short_description": "Talk with a Phi that also sees and hears",
        "models": ["ann/served"],
        "tags": ["phi-mm", "multimodal"],
        "suggested_hardware": "cpu-basic",
    }
    assert f"| `PHI_MM_REVISION` | `{commit}` |" in text
    assert "Secrets: `OTHER`, `PHI_MM_OWNER_SECRET`." in text

    made = loopback.repositories["spaces/ann/talk"]
    assert made.variables == {
        "PHI_MM_MODEL": "ann/served",
        "PHI_MM_REVISION": commit,
        "PHI_MM_WAITING": "7",
    }
    assert set(made.secrets) == {"OTHER", "PHI_MM_OWNER_SECRET"} and made.secrets["OTHER"] == VALUE
    assert (made.private, made.hardware) == (False, "cpu-basic")
    assert loopback.files("spaces/ann/talk") == files
    posted = [s.path.split("/")[-1] for s in loopback.seen[begun:] if s.method == "POST"]
    assert posted[-1] == "main" and posted.count("variables") == 3 and posted.count("secrets") == 2

    out, err = capfd.readouterr()
    owner = made.secrets["PHI_MM_OWNER_SECRET"]
    assert len(owner) >= 32 and (out + err).count(owner) == 1
    told = [s for s in loopback.seen[begun:] if not s.path.endswith("/secrets")]
    everywhere = b"".join([*files.values(), *(s.path.encode() + s.body for s in told)])
    assert not any(secret.encode() in everywhere for secret in (VALUE, owner, token))
    assert VALUE not in out + err and token not in out + err


def test_the_same_command_updates_a_space(
    artefact: Path, login: Callable, loopback: LoopbackHub, tmp_path: Path, capfd, monkeypatch
) -> None:
    login(loopback.token("ann"))
    put_model(artefact, "ann/moving")
    earlier = shutil.copytree(SPACE, tmp_path / "earlier")
    (earlier / "engine" / "gone.py").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(space_folder, "SPACE", earlier)
        deploy(tmp_path / "again", "ann/again", "--private", model="ann/moving")
    assert "engine/gone.py" in loopback.files("spaces/ann/again")
    made = loopback.repositories["spaces/ann/again"]
    assert made.private
    owner = made.secrets["PHI_MM_OWNER_SECRET"]
    api = HfApi()
    for repo, kind in (("ann/again", "space"), ("ann/moving", None)):
        commit = api.upload_file(
            path_or_fileobj=b"mine", path_in_repo="mine.txt", repo_id=repo, repo_type=kind
        ).oid
    capfd.readouterr()

    options = ("--private", "--hardware", "t4-small")
    older = made.variables["PHI_MM_REVISION"]
    deploy(tmp_path / "again", "ann/again", *options, model="ann/moving")
    files = contents(tmp_path / "again")
    assert loopback.files("spaces/ann/again") == files | {"mine.txt": b"mine"}
    assert "engine/gone.py" not in files
    assert made.variables["PHI_MM_REVISION"] == commit
    assert (made.hardware, made.secrets["PHI_MM_OWNER_SECRET"]) == ("t4-small", owner)
    out = capfd.readouterr().out
    assert owner not in out and "t4-small is billed by the hour" in out
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left

    begun = len(loopback.seen)
    deploy(tmp_path / "again", "ann/again", *options, model="ann/moving")
    posted = {s.path.split("/")[-1] for s in loopback.seen[begun:] if s.method == "POST"}
    assert not posted & {"variables", "secrets", "hardware"}  # each would restart it
    deploy(tmp_path / "again", "ann/again", *options, "--revision", older, model="ann/moving")
    assert made.variables["PHI_MM_REVISION"] == older != commit


def test_torch_is_what_the_hardware_wants(tmp_path: Path) -> None:
    pins = {r.name.lower(): str(r.specifier) for r in read_requirements(CONSTRAINTS)}
    variables = {"PHI_MM_MODEL": "ann/served", "PHI_MM_REVISION": "0" * 40}
    for hardware, torch in (
        ("cpu-upgrade", f"torch{pins['torch']}"),
        ("zero-a10g", "torch>=2.6"),
        ("t4-small", f"torch{pins['torch']}"),
    ):
        write_folder(
            tmp_path / hardware, Space("ann/served", "x", hardware=hardware, variables=variables)
        )
        lines = (tmp_path / hardware / "requirements.txt").read_text().splitlines()
        builds = "--extra-index-url https://download.pytorch.org/whl/cpu"
        assert (lines[0] == builds) == (hardware == "cpu-upgrade")
        given = {r.name: str(r) for r in map(Requirement, lines[lines[0] == builds :])}
        assert given.pop("torch") == torch
        assert given.pop("gradio") == f"gradio[mcp]{pins['gradio']}"
        assert given == {name: name + pins[name] for name in given} and len(given) >= 9


def refusal(*line: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["deploy-space", *line])
    return str(stopped.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--hardware=big"],
            "got the hardware 'big', expected one of cpu-basic, cpu-upgrade, zero",
        ),
        (["--space=a/b/c"], "Repo id must"),
        (["--model=a//b"], "Repo id must"),
        (["--variable=X"], "got --variable X, expected NAME=VALUE"),
        (
            ["--variable=PHI_MM_REVISION=x"],
            "got --variable PHI_MM_REVISION, which --model and --rev",
        ),
        (["--variable=HF_TOKEN=x"], "got the variable HF_TOKEN, which everybody can read"),
        (["--variable=X=hf_" + "a" * 34], "got the variable X, which everybody can read"),
        (["--variable=HOME=x", "--secret=HOME"], "got HOME as a variable and as a secret"),
        (["--secret=HF_TOKEN=" + VALUE], "got --secret HF_TOKEN with nothing to read it from"),
        (["--secret==HOME"], "got a --secret without a name"),
    ],
)
def test_a_line_that_cannot_be_is_refused_at_once(
    options: list[str], message: str, tmp_path: Path
) -> None:
    said = refusal(str(tmp_path / "new"), "--model=ann/x", "--space=x", *options)
    assert message in said and VALUE not in said and "aaaa" not in said
    assert not (tmp_path / "new").exists()


def test_secrets_are_read_from_the_environment() -> None:
    environment = {"A": "1", "B": "2"}
    assert read_secrets(["A", "C=B"], environment) == {"A": "1", "C": "2"}


def test_what_is_somebody_elses_is_not_replaced(
    artefact: Path, login: Callable, loopback: LoopbackHub, tmp_path: Path
) -> None:
    login(loopback.token("ann"))
    put_model(artefact, "ann/served")
    line = (str(tmp_path / "mine"), "--model=ann/served", "--space=other", "--no-check")
    (tmp_path / "mine").mkdir()
    deploy(tmp_path / "mine", "other", "--no-push")  # an empty folder is nobody's
    assert "spaces/ann/other" not in loopback.repositories
    (tmp_path / "mine" / "app.py").write_text("mine")
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "mine, which holds app.py, notes.txt, expected a new folder" in refusal(*line)
    (tmp_path / "file").write_text("x")
    assert "which is a file" in refusal(str(tmp_path / "file"), *line[1:])

    HfApi().create_repo("ann/other", repo_type="space", space_sdk="gradio")
    upload = {"repo_id": "ann/other", "repo_type": "space", "path_or_fileobj": b"x"}
    HfApi().upload_file(path_in_repo="app.py", **upload)
    assert "got the Space ann/other, which holds app.py" in refusal(
        str(tmp_path / "new"), *line[1:]
    )
    assert not (tmp_path / "new").exists()


def test_a_model_that_the_space_could_not_load_is_refused(
    artefact: Path, login: Callable, loopback: LoopbackHub, tmp_path: Path, monkeypatch
) -> None:
    def refused(model: str, *options: str) -> str:
        place = (str(tmp_path / "new"), "--space=ann/never")
        return refusal(*place, f"--model={model}", *options)

    ann = loopback.token("ann")
    login(ann)
    put_model(artefact, "ann/hidden", private=True)
    copy = shutil.copytree(artefact, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for name, change in (
        ("ann/vllm", {"auto_map": {"AutoModel": "modeling_phi_mm.PhiMMModel"}}),
        ("ann/llama", {"model_type": "llama"}),
    ):
        (copy / "config.json").write_text(json.dumps(config | change))
        put_model(copy, name)
    HfApi().create_repo("ann/empty")
    monkeypatch.chdir(tmp_path)

    assert "got the local folder copy as --model" in refused("copy")
    for name in ("ann/nothing", "ann/empty"):
        assert f"got --model {name}, expected a model that phi-mm push made" in refused(name)
    assert "of model type 'llama', expected 'phi_mm'" in refused("ann/llama")
    assert "AutoModel is modeling_phi_mm.PhiMMModel" in refused("ann/vllm")
    assert "cannot read ann/vllm: Invalid rev id: v9" in refused("ann/vllm", "--revision=v9")
    private = refused("ann/hidden")
    assert "which is private, expected a token" in private and "--secret HF_TOKEN=ENV" in private
    monkeypatch.setenv("READS", loopback.token("bob", role="read"))
    with_bobs = refused("ann/hidden", "--secret=HF_TOKEN=READS")
    assert "cannot read ann/hidden with the token of --secret HF_TOKEN: " in with_bobs
    monkeypatch.setenv("READS", loopback.token("ann", role="read"))
    options = ("--secret", "HF_TOKEN=READS", "--no-push")
    deploy(tmp_path / "hidden", "x", *options, model="ann/hidden")

    login(loopback.token("ann", role="read"))
    assert "access token of ann that may only read" in refused("ann/llama")
    login(None)
    assert "got no access token for ann/never" in refused("ann/llama")
    assert "spaces/ann/never" not in loopback.repositories
    assert not (tmp_path / "new").exists()


def test_what_does_not_build_is_neither_written_nor_pushed(
    artefact: Path, login: Callable, loopback: LoopbackHub, tmp_path: Path, monkeypatch
) -> None:
    login(loopback.token("ann"))
    put_model(artefact, "ann/served")
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path))):
        monkeypatch.setenv(name, value)
    said = refusal(str(tmp_path / "new"), "--model=ann/served", "--space=unbuilt")
    assert "requirements.txt cannot be installed; the last lines of its log:" in said
    assert "No matching distribution found for accelerate==" in said
    assert not list(tmp_path.glob("*new*")) and "spaces/ann/unbuilt" not in loopback.repositories


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder of a Space with an app that needs nothing."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "README.md").write_text('---\nsdk: gradio\npython_version: "3.12"\n---\n')
    (folder / "requirements.txt").write_text("")
    (folder / "app.py").write_text(SMALL_APP)
    return folder


def test_a_folder_is_built_started_and_asked(small: Path, monkeypatch) -> None:
    """Without what the environment of whoever deploys would lend it."""
    for name in ("HF_TOKEN", "PHI_MM_WAITING"):
        monkeypatch.setenv(name, "mine")
    assert check_build(small, {"PHI_MM_WAITING": "7"}, {}) == "7nobody"
    python, settings = Path(sys.executable), {"PHI_MM_WAITING": "8"}
    assert start_and_ask(python, small, settings, {"HF_TOKEN": "its"}, small) == "8its"


@pytest.mark.parametrize(
    ("app", "message"),
    [
        ("import os, no_such_module_here", "app.py ended with exit code 1"),
        ("import os; print(os.environ['MINE']); raise SystemExit(3)", "ended with exit code 3"),
        (SMALL_APP.replace("event: complete", "event: error"), "it answered "),
        (FAILED_APP, "does not work: the model could not be loaded"),
    ],
)
def test_an_app_that_does_not_work_is_told_with_its_last_lines(
    small: Path, app: str, message: str
) -> None:
    (small / "app.py").write_text("print('begun', flush=True)\n" + app)
    with pytest.raises(ValueError, match="the Space does not work: ") as failed:
        secrets = {"MINE": VALUE}
        start_and_ask(Path(sys.executable), small, {"PHI_MM_WAITING": "7"}, secrets, small)
    said = str(failed.value)
    assert message in said and "the last lines of its log:\n  begun" in said and VALUE not in said
    assert "No module named 'no_such_module_here'" in said or "no_such" not in app


def test_the_real_space_is_started_and_asked(
    artefact: Path, login: Callable, loopback: LoopbackHub, tmp_path: Path
) -> None:
    """By the interpreter of these tests, which has what is required."""
    login(loopback.token("ann"))
    commit = put_model(artefact, "ann/served")
    login(None)
    variables = {"PHI_MM_MODEL": "ann/served", "PHI_MM_REVISION": commit}
    space = Space("ann/served", "talk", hardware="t4-small", variables=variables)
    write_folder(tmp_path / "talk", space)
    python, work = Path(sys.executable), tmp_path / "work"
    work.mkdir()
    install(python, tmp_path / "talk")  # all of it is there
    # The Space's own: nothing of it is here, and no records are copied to the Hub from here.
    there = {"PHI_MM_PRECISION": "nf4", "PHI_MM_STORE": "/data", "PHI_MM_DATASET": "no/name/this"}
    answer = start_and_ask(python, tmp_path / "talk", variables | there, {}, work)
    assert isinstance(answer, str) and (work / "store" / "requests.sqlite3").is_file()
    assert "__pycache__" not in "".join(contents(tmp_path / "talk"))
