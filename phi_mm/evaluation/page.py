"""The report as one HTML page that needs nothing else: pictures and recordings are inside it."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from phi_mm.evaluation.tasks import Item, Row, Task, scores_by_kind
from phi_mm.pages import media_uri, template

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SHOWN = 60  # questions of a task on the page: all of them stand in predictions.jsonl
NAMES = {
    "image_qa": "Questions about pictures",
    "image_qa_spoken": "Spoken questions about pictures",
    "describe": "Descriptions of pictures",
    "audio_qa": "Spoken questions",
    "asr": "Writing down speech",
    "asr_base": "Writing down speech: Whisper alone",
    "listening": "Typed questions about recordings",
    "text_qa": "Written questions",
    "text_qa_before": "Written questions: Phi alone, before training",
}
CONTROL_NAMES = {
    "blank": "blank picture",
    "shuffled": "another row's picture",
    "silence": "silent recording",
}


@dataclass(frozen=True)
class Card:
    """One question on the page."""

    task: str
    name: str  # of the task, in words
    kind: str
    parts: list[tuple[str, str]]  # (type, text or data URI), as asked
    said: str | None  # what is said in the recording
    answer: str
    expected: str
    right: bool
    without: list[tuple[str, str]]  # control -> what was answered then


def render_page(tasks: list[Task], title: str, day: str) -> str:
    """The page as text; `title` and `day` stand in its head."""
    cards = [card for task in tqdm(tasks, desc="report", leave=False) for card in _cards(task)]
    shares = [task for task in tasks if task.metric != "wer"]
    errors = [task for task in tasks if task.metric == "wer"]
    return template(TEMPLATE).render(
        title=title,
        day=day,
        charts=[
            ("Right answers", "longer is better", [_bars(task) for task in shares]),
            ("Word error rate", "shorter is better", [_bars(task) for task in errors]),
        ],
        kinds=[(task_name(task.name), _kinds(task)) for task in shares],
        tasks=[(task.name, task_name(task.name)) for task in tasks],
        cards=cards,
        shown=SHOWN,
    )


def task_name(task: str) -> str:
    """A task in words."""
    return NAMES.get(task, task)


def _bars(task: Task) -> dict[str, Any]:
    row: Row = task.measured.row
    return {
        "name": task_name(task.name),
        "row": row,
        "controls": [
            (CONTROL_NAMES[outcome.row.control], outcome.row.value) for outcome in task.outcomes[1:]
        ],
    }


def _kinds(task: Task) -> list[tuple[str, int, float]]:
    """(kind, questions, share that is right) of each kind of question."""
    kinds = scores_by_kind(task)
    return [(kind, len(found), sum(found) / len(found)) for kind, found in kinds.items()]


def _cards(task: Task) -> list[Card]:
    """A random choice of the task's questions, always the same one, in the order of the test."""
    everything = range(len(task.items))
    chosen = sorted(random.Random(task.name).sample(everything, min(SHOWN, len(everything))))
    return [_card(task, index) for index in chosen]


def _card(task: Task, index: int) -> Card:
    item = task.items[index]
    return Card(
        task=task.name,
        name=task_name(task.name),
        kind=item.kind,
        parts=_parts(item),
        said=item.transcript,
        answer=task.measured.answers[index],
        expected=item.reference,
        right=task.is_right(task.measured.scores[index]),
        without=[
            (CONTROL_NAMES[outcome.row.control], outcome.answers[index])
            for outcome in task.outcomes[1:]
        ],
    )


def _parts(item: Item) -> list[tuple[str, str]]:
    """Text as it is, local media as data URIs, media on the web by their address."""
    parts = []
    for part in (part for message in item.prompt for part in message["content"]):
        kind = part["type"]
        if kind == "text":
            parts.append((kind, part["text"]))
        elif part[kind].startswith(("http://", "https://")):
            parts.append(("text", f"[{kind}: {part[kind]}]"))
        else:
            parts.append((kind, media_uri(kind, part[kind])))
    return parts
