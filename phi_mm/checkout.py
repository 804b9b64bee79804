"""What the repository holds beside its packages: train.py, tiny recipes, model card, licence."""

import runpy
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
