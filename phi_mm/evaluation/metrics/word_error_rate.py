"""Word error rate: substituted, inserted and deleted words over the words that were said.

evaluate.load("phi_mm/evaluation/metrics/word_error_rate.py").compute(...)
"""

import datasets
import evaluate
import jiwer

from phi_mm.evaluation.normalise import normalise

_DESCRIPTION = "Word errors (jiwer's alignment) over the words of all references together."
_INPUTS = """
Args:
    predictions: transcripts, as strings.
    references: what was said, one for each.
Returns:
    wer: all errors over all words of the references; above 1 where more is written than was said.
    scores: the error rate of each transcript, 0.0 when it is right.
    words: the words of each reference, which weigh its score in `wer`.
Raises:
    ValueError: on a reference without a word.
"""


class WordErrorRate(evaluate.Metric):
    """See `_INPUTS`. Case and punctuation do not count; every word, articles too, does."""

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
        counted = [_errors_and_words(given, right) for given, right in pairs]
        errors, words = (sum(column) for column in zip(*counted, strict=True))
        return {
            "wer": errors / words,
            "scores": [wrong / of for wrong, of in counted],
            "words": [of for _, of in counted],
        }


def _errors_and_words(prediction: str, reference: str) -> tuple[int, int]:
    said = normalise(reference, articles=True)
    if not said:
        raise ValueError(f"got the reference {reference!r}, expected at least one word")
    aligned = jiwer.process_words(said, normalise(prediction, articles=True))
    errors = aligned.substitutions + aligned.insertions + aligned.deletions
    return errors, len(said.split())
