"""The examples on the page of the Space: questions of the tiny world's test, drawn and spoken.

phi-mm tiny examples spaces_app/examples
"""

import shutil
import tempfile
from pathlib import Path

from phi_mm.tiny import exams
from phi_mm.tiny.lessons import Item

# What is taken of which item: (kind of item, its number, task).
SHOWN = (
    ("picture", 0, "image_qa"),
    ("picture", 1, "image_qa_spoken"),
    ("picture", 2, "describe"),
    ("talk", 0, "audio_qa"),
    ("talk", 1, "text_qa"),
)


def write_examples(out: Path, seed: int = 0) -> list[tuple[str, str, str]]:
    """Writes pictures, recordings and `examples.tsv`: question, picture and recording a line.

    Returns:
        The lines.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("images", "audio"):
            Path(folder, kind).mkdir()
        rows = [_row(Path(folder), seed, *shown) for shown in SHOWN]
        lines = [_line(row, Path(folder), out) for row in rows]
    text = "".join("\t".join(line) + "\n" for line in lines)
    (out / "examples.tsv").write_text(text, encoding="utf-8")
    return lines


def _row(folder: Path, seed: int, kind: str, number: int, task: str) -> dict:
    make = exams.picture if kind == "picture" else exams.talk
    return next(r for r in make(Item(folder, seed, "test", kind, number)) if r["task"] == task)


def _line(row: dict, folder: Path, out: Path) -> tuple[str, str, str]:
    asked = row["conversations"][0]["value"]
    for mark in ("<image>", "<audio>"):
        asked = asked.replace(mark, "")
    media = {kind: row.get(kind, "") for kind in ("image", "audio")}
    for path in filter(None, media.values()):
        shutil.copy(folder / path, out)
    return asked.strip(), *(Path(path).name for path in media.values())
