"""Exact match: the answer is the reference, apart from case, punctuation, articles and spacing.

evaluate.load("phi_mm/evaluation/metrics/exact_match.py").compute(predictions=..., references=...)
"""

import datasets
import evaluate

from phi_mm.evaluation.normalise import normalise

_DESCRIPTION = "The share of answers that are the reference, after normalisation."
_INPUTS = """
Args:
    predictions: answers, as strings.
    references: the right answers, one for each.
Returns:
    exact_match: mean of `scores`.
    scores: 1.0 or 0.0 for each answer.
"""


class ExactMatch(evaluate.Metric):
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
        pairs = zip(predictions, references, strict=True)
        scores = [float(normalise(given) == normalise(right)) for given, right in pairs]
        return {"exact_match": sum(scores) / len(scores), "scores": scores}
