"""The report on a mixture as one HTML page: faults, rows to look at, and lengths in tokens."""

import random
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from phi_mm.datasets.faults import Kind
from phi_mm.datasets.media import kind_of
from phi_mm.datasets.report import NOTES, SHOWN, Finding, Part, Report, histogram, policy_line
from phi_mm.files import write_whole
from phi_mm.pages import media_uri, template

TEMPLATE = Path(__file__).with_name("check.html.jinja")
PAGE = "data.html"
EXAMPLES = 12  # rows of a part on the page, drawn at random
LONGEST_TEXT = 600  # characters of a turn on the page
ITEMS = 8  # turns, and media, of a row on the page


@dataclass(frozen=True)
class Card:
    """One row on the page."""

    title: str
    where: str
    fault: str
    turns: list[
        tuple[str, list[tuple[str, str]]]
    ]  # role, and (type, text or data URI) of its parts
    left_out: int  # turns


def write_page(report: Report, out: Path, title: str) -> Path:
    """Writes the page to the folder `out`, made where it is not there; `title` heads it."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / PAGE, _render(report, title))
    return out / PAGE


def _render(report: Report, title: str) -> str:
    return template(TEMPLATE).render(
        title=title,
        day=date.today().isoformat(),
        faults=report.faults,
        counts=[(kind, len(found), kind in NOTES) for kind, found in report.by_kind.items()],
        parts=[_part(part) for part in report.parts],
        shown=SHOWN,
        findings=[
            (kind, len(found), [_finding(finding) for finding in found[:SHOWN]])
            for kind, found in report.by_kind.items()
            if found
        ],
        examples=[
            (part.role, part.name, [_card(part, row, "") for row in _examples(part)])
            for part in report.parts
        ],
    )


def _part(part: Part) -> dict:
    bins = histogram(part.tokens)
    return {
        "role": part.role,
        "name": part.name,
        "facts": [
            ("rows", part.rows),
            ("answers", part.answers),
            ("images", part.count("image")),
            ("recordings", part.count("audio")),
            ("minutes of sound", round(part.seconds / 60, 1)),
            ("media files", len(part.examined.files)),
        ],
        "policy": policy_line(part),
        "bins": bins,
        "most": max((count for count, _, _ in bins), default=0),
        "longest": max(part.tokens, default=0),
    }


def _examples(part: Part) -> list[int]:
    """A random choice of the part's rows, always the same one."""
    return sorted(random.Random(part.rows).sample(range(part.rows), min(EXAMPLES, part.rows)))


def _finding(finding: Finding) -> Card:
    return _card(finding.part, finding.row, finding.text)


def _card(part: Part, index: int, fault: str) -> Card:
    row = part.examined.rows[index]
    faults = zip(part.examined.files["path"][:], part.examined.files["fault"][:], strict=True)
    lost = {path for path, fault in faults if fault and kind_of(fault) != Kind.MISLABELLED}
    messages = row["messages"]
    return Card(
        title=f"row {row['id']}",
        where=part.name,
        fault=fault,
        turns=[
            (message["role"], [_shown(content, lost) for content in message["content"][:ITEMS]])
            for message in messages[:ITEMS]
        ],
        left_out=max(0, len(messages) - ITEMS),
    )


def _shown(content: dict, lost: set[str]) -> tuple[str, str]:
    kind = content["type"]
    value = content[kind]
    if kind != "text":
        return ("text", f"[{kind}: {value}]") if value in lost else (kind, media_uri(kind, value))
    return kind, value if len(value) <= LONGEST_TEXT else value[:LONGEST_TEXT] + " ..."
