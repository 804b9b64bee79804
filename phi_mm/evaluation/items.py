"""One question of an evaluation."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Item:
    """One question and its right answer."""

    id: str
    kind: str
    prompt: list[dict[str, Any]]
    reference: str
    transcript: str | None  # what is said in the prompt's recording, where the row tells
