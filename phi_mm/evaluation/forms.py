"""Questions in files of another form: JSON lines, or a JSON list, whose columns a recipe names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi_mm.evaluation.items import Item
from phi_mm.recipes import EvaluationTask


def load_columns(path: Path, entry: EvaluationTask, limit: int | None = None) -> list[Item]:
    """The questions of a file whose columns `entry` names.

    Args:
        path: JSON lines, or one JSON list of objects.
        entry: with `columns` from what is needed to the file's own names, `media`, the folder of
            pictures and recordings, and `prompt`, what is made of a question.
        limit: at most so many, the first ones.

    Raises:
        ValueError: naming the row, for one that is no JSON object, lacks a column, or shows a file
            that is not there.
    """
    return [
        _item(row, f"row {number} of {path}", entry)
        for number, row in enumerate(_rows(path), start=1)
        if limit is None or number <= limit
    ]


def _rows(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"got line {number} of {path}, expected a JSON object: {error}"
                ) from None


def _item(row: Any, where: str, entry: EvaluationTask) -> Item:
    if not isinstance(row, dict):
        raise ValueError(f"got {where}: {row!r}, expected a JSON object")
    found = {}
    for need, name in entry.columns.items():
        if name not in row:
            raise ValueError(f"got {where} without {name!r}, expected columns {sorted(row)}")
        found[need] = row[name]
    content = []
    for kind in ("image", "audio"):
        if kind in found:
            path = Path(entry.media or "") / str(found[kind])
            if not path.is_file():
                raise ValueError(f"got {where}, which names {path}, expected a file: set media")
            content.append({"type": kind, kind: str(path)})
    if "question" in found:
        asked = entry.prompt.format(question=found["question"])
        content.append({"type": "text", "text": asked})
    return Item(
        id=str(found.get("id", where)),
        kind=str(found.get("kind", entry.task)),
        prompt=[{"role": "user", "content": content}],
        reference=str(found["answer"]),
        transcript=found.get("transcript"),
    )
