"""What was measured: a table on the screen, metrics.json, predictions.jsonl, a page report.html."""

import json
from datetime import date
from pathlib import Path

from phi_mm.evaluation.page import render_page
from phi_mm.evaluation.tasks import Item, Outcome, Row, Task, metrics_rows

METRIC_NAMES = {
    "exact_match": "exact match",
    "scene_match": "scene match",
    "wer": "word error rate",
    "yes_no": "yes or no",
}


def write_report(tasks: list[Task], out: Path, title: str) -> None:
    """Fills `out` with metrics.json, predictions.jsonl and report.html.

    Args:
        tasks: as `evaluate_run` returns them.
        out: a folder; made where it is not there.
        title: what was measured, for the page's head.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for task in tasks:
            for outcome in task.outcomes:
                file.writelines(
                    json.dumps(line, ensure_ascii=False) + "\n" for line in lines(task, outcome)
                )
    page = render_page(tasks, title, date.today().isoformat())
    (out / "report.html").write_text(page, encoding="utf-8")
    rows = json.dumps(metrics_rows(tasks), indent=1)
    (out / "metrics.json").write_text(rows + "\n", encoding="utf-8")  # last: all the rest is there


def lines(task: Task, outcome: Outcome) -> list[dict]:
    """The outcome's answers, one dict an item."""
    return [
        {
            "task": task.name,
            "id": item.id,
            "kind": item.kind,
            "control": outcome.row.control,
            "asked": asked(item),
            "media": media(item),
            "said": item.transcript,
            "answer": answer,
            "expected": item.reference,
            "score": score,
            "right": task.is_right(score),
        }
        for item, answer, score in zip(task.items, outcome.answers, outcome.scores, strict=True)
    ]


def asked(item: Item) -> str:
    """The prompt as text, media as [image] and [audio], turns parted by a bar."""
    turns = [
        " ".join(part.get("text", f"[{part['type']}]").strip() for part in message["content"])
        for message in item.prompt
    ]
    return " | ".join(turns)


def media(item: Item) -> list[str]:
    """Paths or URLs of the prompt's pictures and recordings, in reading order."""
    parts = [part for message in item.prompt for part in message["content"]]
    return [part[part["type"]] for part in parts if part["type"] != "text"]


def table(rows: list[Row]) -> str:
    """All rows as plain text: one line a task, its controls in columns."""
    controls = list(dict.fromkeys(row.control for row in rows if row.control))
    head = ["task", "metric", "score", "95 %", "majority", *controls, "n"]
    lines = [head]
    for row in (row for row in rows if row.control is None):
        under = {r.control: r for r in rows if r.task == row.task and r.control}
        lines.append(
            [
                row.task,
                METRIC_NAMES[row.metric],
                percent(row.value),
                f"{percent(row.low)} to {percent(row.high)}",
                percent(row.baseline),
                *(percent(under[name].value) if name in under else "" for name in controls),
                str(row.n),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    if any(row.metric == "wer" for row in rows):
        text.append("word error rate: lower is better")
    for row in (row for row in rows if row.details and row.control is None):
        told = ", ".join(f"{name} {value:.4g}" for name, value in row.details.items())
        text.append(f"{row.task}: {told}")
    return "\n".join(text)


def percent(share: float) -> str:
    """0.934 as "93.4 %"."""
    return f"{100 * share:.1f} %"
