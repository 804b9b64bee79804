"""Tasks: held-out rows, a metric, a baseline and controls, as a run's recipe names them."""

import difflib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from phi_mm.assembly import load_run
from phi_mm.datasets import load_rows
from phi_mm.evaluation import answers
from phi_mm.evaluation.controls import CONTROLS
from phi_mm.evaluation.forms import load_columns
from phi_mm.evaluation.intervals import bootstrap, wilson
from phi_mm.evaluation.items import Item
from phi_mm.evaluation.metrics import METRICS
from phi_mm.evaluation.normalise import normalise
from phi_mm.recipes import EvaluationTask, Recipe, load_recipe
from processing import PhiMMProcessor

Messages = list[dict[str, Any]]
WHISPER_ALONE, PHI_ALONE = "asr_base", "text_qa_before"
BY_A_BASE = (WHISPER_ALONE, PHI_ALONE)  # answered by a base model alone, to compare with
SPLITS = ("test", "val")  # names of the folders that hold each task's file


@dataclass(frozen=True)
class Row:
    """One measured number, a row of metrics.json.

    `control` is None for the measurement itself and names what was taken away otherwise; `baseline`
    is what the commonest answer to each kind of question would score. `details` are what the metric
    tells beside its value, such as precision and recall.
    """

    task: str
    metric: str
    value: float
    n: int
    low: float
    high: float
    baseline: float
    control: str | None
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A row with the answers it counts, in the order of the items."""

    row: Row
    answers: list[str]
    scores: list[float]


@dataclass
class Task:
    """What is to be measured, and then what was: one outcome for each of None and the controls."""

    name: str
    metric: str
    items: list[Item]
    controls: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def measured(self) -> Outcome:
        """The measurement itself, without a control."""
        return self.outcomes[0]

    def is_right(self, score: float) -> bool:
        """Whether a score of this task's metric means a right answer."""
        return score == (0.0 if self.metric == "wer" else 1.0)


def evaluate_run(
    run: Path, split: str = "test", limit: int | None = None, batch_size: int = 64, seed: int = 0
) -> list[Task]:
    """Measures a trained run on everything that its recipe's `evaluation` names.

    Args:
        run: a run folder.
        split: "test", or "val" for the folder `val` beside the recipe's `test`.
        limit: at most so many questions a task, the first ones.
        batch_size: questions answered at once.
        seed: of the bootstrap.

    Raises:
        ValueError: before any model is loaded, for a run without recipe or evaluation, an unknown
            metric, control or file, or a task that the run cannot carry out.
    """
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"got {run}, expected a run folder with recipe.yaml: train it first")
    recipe = load_recipe(run / "recipe.yaml")
    tasks = plan(recipe, split, limit)
    model, processor = load_run(run, merge=True)
    model = model.to(answers.device())
    for task in tasks:
        carry_out(task, recipe, model, processor, batch_size, np.random.default_rng(seed))
    return tasks


def plan(recipe: Recipe, split: str, limit: int | None) -> list[Task]:
    """The recipe's tasks with their rows; entries that differ in control alone are one."""
    if not recipe.evaluation:
        raise ValueError(
            "got a recipe without `evaluation`, expected a list of {task, data, metric}"
        )
    tasks: dict[str, Task] = {}
    for entry in recipe.evaluation:
        _check(entry, recipe)
        if entry.task not in tasks:
            path = _data_of(entry, split)
            items = (
                load_items(path, entry.task, limit)
                if entry.columns is None
                else load_columns(path, entry, limit)
            )
            tasks[entry.task] = Task(entry.task, entry.metric, items)
        if entry.control is not None:
            tasks[entry.task].controls.append(entry.control)
    return list(tasks.values())


def load_items(path: Path, task: str, limit: int | None = None) -> list[Item]:
    """The questions of a file: each row's last turn is the answer, what stands before is asked."""
    items = []
    rows = load_rows(path)
    for row in rows.select(range(min(limit or len(rows), len(rows)))):
        *prompt, last = row["messages"]
        said = " ".join(part["text"] for part in last["content"])
        kind, transcript = row.get("kind") or task, row.get("transcript")
        answer = row.get("answer")
        reference = said if answer is None else str(answer)
        items.append(Item(row["id"], kind, prompt, reference, transcript))
    return items


def carry_out(
    task: Task,
    recipe: Recipe,
    model: PreTrainedModel,
    processor: PhiMMProcessor,
    batch_size: int,
    generator: np.random.Generator,
) -> None:
    """Fills in the task's outcomes: the measurement, then each control."""
    prompts = [item.prompt for item in task.items]
    baseline = majority_score(task)
    longest = max(len(processor.tokenizer(item.reference)["input_ids"]) for item in task.items)
    room = longest + longest // 4 + 4  # an answer that runs on is wrong long before
    alone = task.name == PHI_ALONE
    speaker = answers.text_base(recipe, processor) if alone else model
    for control in [None, *task.controls]:
        shown = CONTROLS[control](prompts, processor) if control else prompts
        title = f"{task.name}, {control}" if control else task.name
        if task.name == WHISPER_ALONE:
            said = answers.transcribe(recipe, processor, shown, batch_size, title)
        else:
            said = answers.answer(speaker, processor, shown, room, batch_size, title)
        value, scores, (low, high), details = score(task, said, generator)
        row = Row(task.name, task.metric, value, len(said), low, high, baseline, control, details)
        task.outcomes.append(Outcome(row, said, scores))


def score(
    task: Task, said: list[str], generator: np.random.Generator
) -> tuple[float, list[float], tuple[float, float], dict[str, float]]:
    """Value, score of every item, 95 % interval, and what else the metric tells."""
    references = [item.reference for item in task.items]
    result = _compute(task.metric, said, references)
    value, scores = result.pop(task.metric), result.pop("scores")
    words = result.pop("words", None)
    if words is None:
        return value, scores, wilson(sum(scores), len(scores)), result
    return value, scores, bootstrap(scores, words, generator), result


def majority_score(task: Task) -> float:
    """What always giving the commonest answer to a question's kind scores, answers counted on the
    test itself: the best that can be had without looking.

    Nobody guesses a transcript: for word error rates it is 1.0, the score of saying nothing.
    """
    if task.metric == "wer":
        return 1.0
    by_kind = defaultdict(Counter)
    for item in task.items:
        by_kind[item.kind][normalise(item.reference)] += 1
    said = [by_kind[item.kind].most_common(1)[0][0] for item in task.items]
    return _compute(task.metric, said, [item.reference for item in task.items])[task.metric]


def scores_by_kind(task: Task) -> dict[str, list[float]]:
    """Scores of the measurement, sorted by kind of question."""
    kinds = defaultdict(list)
    for item, value in zip(task.items, task.measured.scores, strict=True):
        kinds[item.kind].append(value)
    return dict(sorted(kinds.items()))


def metrics_rows(tasks: list[Task]) -> list[dict]:
    """The rows of metrics.json."""
    return [asdict(outcome.row) for task in tasks for outcome in task.outcomes]


def _compute(metric: str, predictions: list[str], references: list[str]) -> dict:
    module = METRICS[metric](keep_in_memory=True)
    return module.compute(predictions=predictions, references=references)


def _check(entry: EvaluationTask, recipe: Recipe) -> None:
    for what, name, known in (
        ("metric", entry.metric, METRICS),
        ("control", entry.control, CONTROLS),
    ):
        if name is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"got {what} {name!r} in the evaluation of {entry.task}, expected one of "
                f"{', '.join(known)}: did you mean {near!r}?"
            )
    if entry.task == WHISPER_ALONE and recipe.model.audio is None:
        raise ValueError(f"got the task {WHISPER_ALONE}, but the recipe has no model.audio")


def _data_of(entry: EvaluationTask, split: str) -> Path:
    """The task's file; for another split than test, its namesake in that split's folder."""
    path = Path(entry.data)
    if split not in SPLITS:
        raise ValueError(f"got the split {split!r}, expected one of {', '.join(SPLITS)}")
    if split == "test":
        return path
    if path.parent.name != "test":
        raise ValueError(
            f"got {path}, expected a file in a folder named test, beside which a folder {split} "
            "holds the file of the same name"
        )
    return path.parent.parent / split / path.name
