"""Yes or no, as POPE scores it: the answer's first sentence is read for a "no".

evaluate.load("phi_mm/evaluation/metrics/yes_no.py").compute(predictions=..., references=...)
"""

import datasets
import evaluate

from phi_mm.evaluation.normalise import normalise

_CITATION = """@inproceedings{Li-hallucination-2023,
  title = {Evaluating Object Hallucination in Large Vision-Language Models},
  author = {Yifan Li and Yifan Du and Kun Zhou and Jinpeng Wang and Wayne Xin Zhao and Ji-Rong Wen},
  booktitle = {EMNLP},
  year = {2023}
}"""
_DESCRIPTION = """Accuracy, and precision, recall and F1 of "yes", as POPE's own evaluate.py counts
them: only what stands before the first full stop counts, and it is a "no" where it holds the word
"no" or "not", and a "yes" otherwise."""
_INPUTS = """
Args:
    predictions: answers, as strings.
    references: "yes" or "no", one for each.
Returns:
    yes_no: accuracy.
    scores: 1.0 or 0.0 for each answer.
    precision, recall, f1: of "yes"; 0.0 where nothing is counted.
    yes_ratio: share of answers that are a "yes".
    invalid: answers without the word "yes", "no" or "not", which count as above.
Raises:
    ValueError: for a reference that is neither.
"""
NO, YES = {"no", "not"}, {"yes"}


class YesNo(evaluate.Metric):
    """See `_INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict:
        right = [_reference(text) for text in references]
        words = [{*normalise(text.split(".")[0]).split()} for text in predictions]
        said = [not own & NO for own in words]
        hits = sum(one and other for one, other in zip(said, right, strict=True))
        precision, recall = _share(hits, sum(said)), _share(hits, sum(right))
        scores = [float(one == other) for one, other in zip(said, right, strict=True)]
        return {
            "yes_no": sum(scores) / len(scores),
            "scores": scores,
            "precision": precision,
            "recall": recall,
            "f1": _share(2 * precision * recall, precision + recall),
            "yes_ratio": sum(said) / len(said),
            "invalid": sum(not own & (NO | YES) for own in words),
        }


def _reference(text: str) -> bool:
    answer = normalise(text)
    if answer not in ("yes", "no"):
        raise ValueError(f"got the reference {text!r}, expected yes or no")
    return answer == "yes"


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
