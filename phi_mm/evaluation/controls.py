"""Controls: the same questions with the picture or the recording made worthless.

A model that answers as well without its eyes and ears was never using them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from processing import PhiMMProcessor

Messages = list[dict[str, Any]]
BLANK_SIDE = 64  # pixels; the processor scales every picture anyway


def blank(prompts: list[Messages], processor: PhiMMProcessor) -> list[Messages]:
    """Every picture becomes a plain square in the processor's mean colour: zeros for the tower."""
    mean = tuple(round(255 * channel) for channel in processor.image_processor.image_mean)
    square = Image.new("RGB", (BLANK_SIDE, BLANK_SIDE), mean)
    return _replace(prompts, "image", lambda _: square)


def shuffled(prompts: list[Messages], processor: PhiMMProcessor) -> list[Messages]:
    """Every picture is swapped for another row's: from half the test away, and never the same one.

    Raises:
        ValueError: where all rows show one picture.
    """
    pictures = [part["image"] for part in _parts(prompts) if part["type"] == "image"]
    others = iter([_another(pictures, position) for position in range(len(pictures))])
    return _replace(prompts, "image", lambda _: next(others))


def silence(prompts: list[Messages], processor: PhiMMProcessor) -> list[Messages]:
    """Every recording becomes as much silence."""
    return _replace(
        prompts, "audio", lambda recording: np.zeros_like(processor.load_audio(recording))
    )


CONTROLS: dict[str, Callable[[list[Messages], PhiMMProcessor], list[Messages]]] = {
    "blank": blank,
    "shuffled": shuffled,
    "silence": silence,
}


def _another(pictures: list[Any], position: int) -> Any:
    for step in range(len(pictures)):
        other = pictures[(position + len(pictures) // 2 + step) % len(pictures)]
        if other != pictures[position]:
            return other
    raise ValueError("got rows that all show one picture, expected two different ones to swap")


def _parts(prompts: list[Messages]) -> list[dict]:
    return [part for messages in prompts for message in messages for part in message["content"]]


def _replace(prompts: list[Messages], kind: str, change: Callable[[Any], Any]) -> list[Messages]:
    if not any(part["type"] == kind for part in _parts(prompts)):
        raise ValueError(f"got prompts without {kind}, expected one to take away: drop the control")
    return [
        [
            {
                **message,
                "content": [
                    {**part, kind: change(part[kind])} if part["type"] == kind else part
                    for part in message["content"]
                ],
            }
            for message in messages
        ]
        for messages in prompts
    ]
