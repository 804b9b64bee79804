"""Scene match: a description names every thing of the tiny world's scene, in any order.

evaluate.load("phi_mm/evaluation/metrics/scene_match.py").compute(predictions=..., references=...)
"""

import re
from collections import Counter

import datasets
import evaluate

from phi_mm.tiny.scenes import COLOURS, MORE_COLOURS, MORE_SHAPES, SHAPES

_DESCRIPTION = (
    "The share of descriptions that name each shape with its colour, none more and none less, "
    "in any order. Sizes and places are not looked at."
)
_INPUTS = """
Args:
    predictions: descriptions, as strings.
    references: right descriptions, one for each.
Returns:
    scene_match: mean of `scores`.
    scores: 1.0 or 0.0 for each description.
Raises:
    ValueError: on a reference that names no shape of the tiny world.
"""
_COLOUR = "|".join((*COLOURS, *MORE_COLOURS))
_SHAPE = "|".join((*SHAPES, *MORE_SHAPES))
_THING = re.compile(rf"\b(?:({_COLOUR}) )?({_SHAPE})\b")


class SceneMatch(evaluate.Metric):
    """See `_INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict:
        wanted = [things(reference) for reference in references]
        for reference, found in zip(references, wanted, strict=True):
            if not found:
                raise ValueError(
                    f"got the reference {reference!r}, expected one that names shapes among "
                    f"{', '.join(SHAPES)}"
                )
        named = [things(prediction) for prediction in predictions]
        scores = [float(a == b) for a, b in zip(named, wanted, strict=True)]
        return {"scene_match": sum(scores) / len(scores), "scores": scores}


def things(description: str) -> Counter[tuple[str, str]]:
    """(colour, shape) of everything named, the colour "" where none stands before the shape."""
    return Counter(_THING.findall(description.lower()))
