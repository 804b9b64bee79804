"""Metrics as `evaluate.Metric` modules, each giving a score for every item beside the mean."""

from phi_mm.evaluation.metrics.exact_match import ExactMatch
from phi_mm.evaluation.metrics.scene_match import SceneMatch
from phi_mm.evaluation.metrics.word_error_rate import WordErrorRate
from phi_mm.evaluation.metrics.yes_no import YesNo

METRICS = {
    "exact_match": ExactMatch,
    "scene_match": SceneMatch,
    "wer": WordErrorRate,
    "yes_no": YesNo,
}

__all__ = ["METRICS", "ExactMatch", "SceneMatch", "WordErrorRate", "YesNo"]
