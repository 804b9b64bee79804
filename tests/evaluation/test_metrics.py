"""Metrics against numbers counted by hand, and normalisation."""

from pathlib import Path

import evaluate
import pytest

from phi_mm.evaluation.metrics import METRICS, ExactMatch, SceneMatch, WordErrorRate
from phi_mm.evaluation.normalise import normalise

METRICS_FOLDER = Path(__file__).parents[2] / "phi_mm" / "evaluation" / "metrics"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  RED star. ", "red star"),
        ("at the top-left!", "at top left"),
        ("it's a dog", "its dog"),
        ("A", "a"),
        ("théâtre, anthem", "théâtre anthem"),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_normalise_keeps_articles_when_they_count() -> None:
    assert normalise("The cat, a dog.", articles=True) == "the cat a dog"


def test_exact_match_scores_each_answer() -> None:
    result = ExactMatch().compute(
        predictions=["The red.", "blue", "two of them", ""],
        references=["red", "green", "two", "no"],
    )
    assert result == {"exact_match": 0.25, "scores": [1.0, 0.0, 0.0, 0.0]}


def test_word_error_rate_weighs_sentences_by_their_words() -> None:
    result = WordErrorRate().compute(
        # one substitution and one deletion of 4 words; 2 insertions on 1 word; none of 5
        predictions=["a blue star", "go now please", "A red, red HEART there."],
        references=["a red star here", "go", "a red red heart there"],
    )
    assert result == {"wer": 4 / 10, "scores": [0.5, 2.0, 0.0], "words": [4, 1, 5]}


def test_word_error_rate_of_silence_is_one() -> None:
    result = WordErrorRate().compute(predictions=["", "."], references=["one two", "three"])
    assert result["wer"] == 1.0


def test_word_error_rate_refuses_a_reference_without_words() -> None:
    with pytest.raises(ValueError, match="at least one word"):
        WordErrorRate().compute(predictions=["x"], references=["?!"])


SCENE = "a small red star at the top left and a large blue circle in the middle"


@pytest.mark.parametrize(
    ("description", "score"),
    [
        (SCENE, 1.0),
        ("in the middle is a small blue circle, and there is a red star on the right", 1.0),
        ("a small red star at the top left", 0.0),
        ("a blue star and a red circle", 0.0),
        (f"{SCENE} and a red star", 0.0),
        (f"{SCENE} and a large red moon", 0.0),
        (SCENE.replace("blue circle", "cyan circle"), 0.0),
        ("a star and a circle", 0.0),
        ("", 0.0),
    ],
)
def test_scene_match_wants_every_shape_with_its_colour(description: str, score: float) -> None:
    result = SceneMatch().compute(predictions=[description], references=[SCENE])
    assert result == {"scene_match": score, "scores": [score]}


def test_scene_match_without_colours_compares_shapes() -> None:
    result = SceneMatch().compute(
        predictions=["a large star and a small heart", "a heart"],
        references=["a small heart at the top and a large star on the left", "a star"],
    )
    assert result["scores"] == [1.0, 0.0]


def test_scene_match_refuses_a_reference_without_shapes() -> None:
    with pytest.raises(ValueError, match="names shapes"):
        SceneMatch().compute(predictions=["a red star"], references=["a lovely day"])


def test_modules_load_by_path_as_evaluate_does(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path))
    metric = evaluate.load(str(METRICS_FOLDER / "exact_match.py"))
    result = metric.compute(predictions=["a cat"], references=["cat"])
    assert result["exact_match"] == 1.0
    metric = evaluate.load(str(METRICS_FOLDER / "yes_no.py"))
    assert metric.compute(predictions=["Yes."], references=["yes"])["f1"] == 1.0
    assert set(METRICS) == {"exact_match", "scene_match", "wer", "yes_no"}
