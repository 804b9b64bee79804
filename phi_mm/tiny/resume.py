"""The state of a base's training on disk: whole or not there, and only for the same recipe."""

import os
from pathlib import Path
from typing import Any

import torch


def save_state(state: dict[str, Any], path: Path) -> None:
    """Written beside and moved into place: an interrupted save leaves the one before."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_state(path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """What `save_state` wrote. Raises ValueError when that run followed another recipe."""
    state = torch.load(path, weights_only=True)
    if state["recipe"] != recipe:
        raise ValueError(
            f"got a saved run of recipe {state['recipe']} in {path}, expected "
            f"{recipe}; delete {path} or give another work folder"
        )
    return state
