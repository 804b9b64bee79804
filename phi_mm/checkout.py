"""What the repository holds beside its packages: train.py, tiny recipes, model card, licence."""

import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "train.py"
TINY_RECIPES = ROOT / "recipes" / "tiny"
MODEL_CARD = ROOT / "model_card.md"
LICENSE = ROOT / "LICENSE"


def run_train(arguments: list[str]) -> None:
    """train.py in this process, as if it was started with these arguments.

    Raises:
        ValueError: the packages are installed without their checkout.
    """
    if not TRAIN.is_file():
        raise ValueError(f"got no {TRAIN}, expected a checkout: clone the repository")
    before = sys.argv
    sys.argv = [str(TRAIN), *arguments]
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
    finally:
        sys.argv = before


def launch_train(arguments: list[str], processes: int) -> None:
    """train.py in so many CPU processes of one thread each, by accelerate.

    Models as small as the tiny default's gain nothing from a second thread, but train twice as fast
    with a second process.

    Raises:
        ValueError: a process failed; it has said why.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    shape = ["--cpu", f"--num_processes={processes}", "--num_cpu_threads_per_process=1"]
    plain = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    done = subprocess.run([*launcher, *shape, *plain, str(TRAIN), *arguments])
    if done.returncode:
        raise ValueError(
            f"{TRAIN.name} ended with exit code {done.returncode}, its words are above"
        )
