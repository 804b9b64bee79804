"""From what is known to what the page shows: all that is put into HTML is escaped."""

import base64
import html
import mimetypes
import time
from pathlib import Path
from typing import Any

import pandas as pd

from . import figures

MOST_CHANGES = 5  # of the model, that are named
MOST_CLASSES = 12  # of errors
LARGEST_MEDIUM = 20 << 20  # bytes that are sent to be shown
TABLE = {
    "time (UTC)": "when",
    "outcome": "outcome",
    "error": "error",
    "first token s": "first",
    "total s": "total_seconds",
    "prompt": "prompt_tokens",
    "reused": "reused_tokens",
    "new": "new_tokens",
    "pictures": "images",
    "recordings": "recordings",
    "thumb": "thumb",
    "model": "model",
    "request": "id",
}
CSS = """
.nav-holder {display: none}  /* visitors have no business with the dashboard */
.tiles {display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 0.6rem}
.tiles div {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 0.6rem}
.tiles div {background: var(--block-background-fill)}
.tiles dt {font-size: 0.8rem; opacity: 0.75}
.tiles dd {font-size: 1.15rem; margin: 0; font-weight: 600; overflow-wrap: anywhere}
#tiles p {margin: 0.6rem 0}
.media img, .media audio {max-width: 100%; max-height: 24rem}
"""


def tiles(numbers: dict[str, Any]) -> str:
    """Numbers by their names."""
    pairs = [
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in numbers.items()
    ]
    return f"<dl class='tiles'>{''.join(pairs)}</dl>"


def state(sentence: str) -> str:
    """How the engine is."""
    return f"<p>{html.escape(sentence)}</p>"


def errors(frame: pd.DataFrame) -> str:
    """How often which class of error, the most frequent ones."""
    classes = list(figures.error_classes(frame).items())[:MOST_CLASSES]
    return f"<p>Errors by class</p>{tiles(dict(classes))}" if classes else ""


def changes(frame: pd.DataFrame) -> str:
    """Which models came, and when."""
    changed = [
        f"<p>New model: {html.escape(model)}, {moment(when)} UTC</p>"
        for when, model in figures.changes(frame).itertuples(index=False)
    ]
    return "".join(changed[-MOST_CHANGES:])


def drift(before: pd.DataFrame, now: pd.DataFrame) -> str:
    """How far the lengths have drifted, in a number each."""
    indices = {
        title: figures.drift(before[name], now[name]) for name, title in figures.LENGTHS.items()
    }
    return tiles(
        {f"stability index of {name}": figures.reading(index) for name, index in indices.items()}
    )


def moment(when: float) -> str:
    """A time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(when))


def thumb(rating: float | None) -> str:
    """A rating in a word."""
    return {1: "up", -1: "down"}.get(rating, "")


def rows(records: pd.DataFrame) -> list[list[str]]:
    """The table of `Records.table`, all of it as text."""
    table = figures.prepare(records, 1.0)
    table = table.assign(
        when=table.time.map(moment),
        thumb=table.rating.map(thumb),
        first=table["first"].round(2),
        total_seconds=table.total_seconds.round(2),
    )
    return table[list(TABLE.values())].fillna("").astype(str).values.tolist()


def media(paths: list[Path], images: int) -> str:
    """Pictures, which come first, and recordings.

    They are in the page itself: gradio gives a file to anybody who knows its address.
    """
    parts = []
    for number, path in enumerate(paths):
        try:
            if path.stat().st_size > LARGEST_MEDIUM:
                parts.append(f"<p>{html.escape(path.name)} is too big to be shown</p>")
            else:
                parts.append(_medium(path, number < images))
        except OSError as error:
            parts.append(f"<p>{html.escape(str(error))}</p>")
    return f"<div class='media'>{''.join(parts)}</div>"


def _medium(path: Path, is_image: bool) -> str:
    kind = mimetypes.guess_type(path.name)[0] or ("image/png" if is_image else "audio/wav")
    source = f"data:{html.escape(kind)};base64,{base64.b64encode(path.read_bytes()).decode()}"
    if is_image:
        return f"<img src='{source}' alt='the picture of the question'>"
    return f"<audio controls src='{source}' aria-label='the recording of the question'></audio>"
