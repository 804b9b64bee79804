"""What the repository holds beside its packages: train.py, the Space, recipes, cards, licence."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "train.py"
SPACE = ROOT / "spaces_app"
CONSTRAINTS = ROOT / "constraints.txt"
TINY_RECIPES = ROOT / "recipes" / "tiny"
MODEL_CARD = ROOT / "model_card.md"
ADAPTER_CARD = ROOT / "adapter_card.md"
LICENSE = ROOT / "LICENSE"


def check_checkout(path: Path) -> None:
    """Raises ValueError where the packages are installed without this part of the checkout."""
    if not path.exists():
        raise ValueError(f"got no {path}, expected a checkout: clone the repository")


def run_train(arguments: list[str]) -> None:
    """train.py in this process, as if it was started with these arguments.

    Raises:
        ValueError: the packages are installed without their checkout.
    """
    check_checkout(TRAIN)
    before = sys.argv
    sys.argv = [str(TRAIN), *arguments]
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
    finally:
        sys.argv = before


def launch_train(arguments: list[str], processes: int) -> None:
    """train.py in so many CPU processes of one thread each, by torchrun.

    A model as small as the tiny default gains nothing from a second thread, but trains twice as
    fast with a second process.

    Raises:
        ValueError: a process failed; it has said why.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # On a CPU the processes find each other only when the Trainer is told to stay on it.
    words = [str(TRAIN), *arguments, "training.use_cpu=true"]
    done = subprocess.run(
        [*launcher, f"--nproc_per_node={processes}", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise ValueError(
            f"{TRAIN.name} ended with exit code {done.returncode}; see its words above"
        )


def run_records(arguments: list[str]) -> None:
    """The Space's own command for its records, in its folder.

    Raises:
        ValueError: the packages are installed without their checkout, or the command failed; it has
            said why.
    """
    check_checkout(SPACE)
    done = subprocess.run([sys.executable, "-m", "records", *arguments], cwd=SPACE)
    if done.returncode:
        raise ValueError(f"the Space's records command ended with exit code {done.returncode}")


def run_space(artefact: str, revision: str | None, port: int) -> None:
    """The Space with an artefact, in a process of its own, until it ends.

    Args:
        artefact, revision: a folder, or a Hub id and its commit.

    Raises:
        ValueError: the packages are installed without their checkout, gradio is missing, or the
            process failed; it has said why.
    """
    check_checkout(SPACE)
    if importlib.util.find_spec("gradio") is None:
        raise ValueError('got no gradio, which the page is made of: pip install "phi-mm[app]"')
    folder = Path(artefact)
    settings = {"PHI_MM_MODEL": str(folder.resolve()) if folder.is_dir() else artefact}
    settings |= {"GRADIO_SERVER_PORT": str(port)} | (
        {"PHI_MM_REVISION": revision} if revision else {}
    )
    done = subprocess.run([sys.executable, "app.py"], cwd=SPACE, env={**os.environ, **settings})
    if done.returncode:
        raise ValueError(f"the Space ended with exit code {done.returncode}; see its words above")
