"""The folder of a Space: a copy of spaces_app/, pinned, with a page that says what was set."""

import hashlib
import json
import shutil
from pathlib import Path

from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from phi_mm.checkout import CONSTRAINTS, LICENSE, SPACE, check_checkout
from phi_mm.hub.space.plan import MODEL, OWNER_SECRET, REVISION, Space

DEPLOYED = "deployed.json"  # what was written, by which it is known again as ours
REQUIREMENTS = "requirements.txt"
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"  # without several gigabytes of CUDA


def check_replaceable(folder: Path) -> None:
    """Refuses a folder that holds anything that an earlier call did not write.

    Raises:
        ValueError: it is no folder, or names the files that would be lost.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"got {folder}, which is a file, expected a folder to write")
    written = read_deployed(folder / DEPLOYED)
    others = [name for name, digest in digests(folder).items() if written.get(name) != digest]
    if others:
        raise ValueError(
            f"got {folder}, which holds {', '.join(others[:5])}{' ...' if others[5:] else ''}, "
            "expected a new folder, or one that phi-mm deploy-space wrote and nobody changed"
        )


def read_deployed(path: Path) -> dict[str, str]:
    """The digests by file that a deployment noted; none where there was no deployment."""
    if not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))["files"]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 by path inside the folder, but for caches and the note itself."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
        if (folder / name).is_file() and "__pycache__" not in name and name != DEPLOYED
    }


def write_folder(folder: Path, space: Space) -> None:
    """Writes the Space's repository to `folder`, which must not exist.

    Raises:
        ValueError: the packages are installed without their checkout.
    """
    check_checkout(SPACE)
    shutil.copytree(SPACE, folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(LICENSE, folder / LICENSE.name)
    (folder / REQUIREMENTS).write_text(pinned_requirements(space), encoding="utf-8")
    (folder / "README.md").write_text(_readme(space), encoding="utf-8")
    note = json.dumps({"files": digests(folder)}, indent=2) + "\n"
    (folder / DEPLOYED).write_text(note, encoding="utf-8")


def pinned_requirements(space: Space) -> str:
    """What spaces_app/requirements.txt names, in the versions of constraints.txt.

    torch is the build that the hardware wants; on ZeroGPU the image brings its own.

    Raises:
        ValueError: constraints.txt has no version of one of them.
    """
    pins = _pins()
    lines = [f"--extra-index-url {CPU_BUILDS}"] if space.on_cpu else []
    for requirement in read_requirements(SPACE / REQUIREMENTS):
        name = canonicalize_name(requirement.name)
        if name not in pins:
            raise ValueError(f"got no version of {name} in {CONSTRAINTS}, expected {name}==...")
        if not (space.zero and name == "torch"):
            requirement.specifier = pins[name]
        lines.append(str(requirement))
    return "\n".join(lines) + "\n"


def read_requirements(path: Path) -> list[Requirement]:
    """The requirements of a file, comments left out."""
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def _pins() -> dict:
    check_checkout(CONSTRAINTS)
    pinned = read_requirements(CONSTRAINTS)
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in pinned}


def _readme(space: Space) -> str:
    """README.md of spaces_app/ with this Space's front matter, and a section about it."""
    card = SpaceCard((SPACE / "README.md").read_text(encoding="utf-8"))
    card.data.title = space.name.split("/")[-1]
    card.data.sdk_version = next(iter(_pins()["gradio"])).version
    card.data.models = [space.model]
    card.data.tags = ["phi-mm", "multimodal"]
    card.data.suggested_hardware = space.hardware
    model, commit = space.variables[MODEL], space.variables[REVISION]
    variables = [f"| `{name}` | `{value}` |" for name, value in space.variables.items()]
    names = ", ".join(f"`{name}`" for name in sorted({OWNER_SECRET, *space.secrets}))
    lines = [
        "## This Space",
        "",
        f"It serves [{model}](https://huggingface.co/{model}/tree/{commit}), and was written by "
        "`phi-mm deploy-space`; the same command updates it. Variables that it sets:",
        "",
        "| variable | value |",
        "|---|---|",
        *variables,
        "",
        f"Secrets: {names}.",
    ]
    return f"{card.content.rstrip()}\n\n" + "\n".join(lines) + "\n"
