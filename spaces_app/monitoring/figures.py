"""From records to what is plotted: pure functions of a frame of `Records.between`."""

import numpy as np
import pandas as pd

FAILED = ("failed", "timeout")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
LENGTHS = {"prompt_tokens": "prompt tokens", "characters": "characters"}
STEADY, DRIFTING = 0.1, 0.25  # the usual reading of a population stability index


def prepare(records: pd.DataFrame, width: float) -> pd.DataFrame:
    """Adds what the plots share.

    Args:
        width: of the pieces of time, in seconds.

    Returns:
        The frame with `when` (start of the piece), `first` (seconds from question to first token)
        and `speed` (tokens per second after it), NaN for requests without a whole answer.
    """
    frame = records.copy()
    frame["when"] = pd.to_datetime(frame.time // width * width, unit="s")
    answered = frame.new_tokens > 0
    frame["first"] = (frame.waited_seconds + frame.first_token_seconds).where(answered)
    seconds = (frame.total_seconds - frame["first"]).where(frame.new_tokens > 1)
    frame["speed"] = (frame.new_tokens - 1) / seconds
    return frame


def summary(frame: pd.DataFrame) -> dict[str, str]:
    """A time in a few numbers, by their names."""
    asked, wrong = len(frame), int(frame.outcome.isin(FAILED).sum())
    refused = int((frame.outcome == "refused").sum())
    up, down = int((frame.rating == 1).sum()), int((frame.rating == -1).sum())
    seconds = frame["first"].dropna()
    return {
        "requests": f"{asked:,}",
        "errors": f"{wrong} ({100 * wrong / max(asked, 1):.1f}%)",
        "refused": f"{refused} ({100 * refused / max(asked, 1):.1f}%)",
        **{
            f"first token {name}": f"{seconds.quantile(at):.2f} s" if len(seconds) else "none"
            for name, at in QUANTILES.items()
        },
        "tokens per second": f"{frame.speed.median():.1f}" if frame.speed.any() else "none",
        "satisfied": f"{100 * up / (up + down):.0f}% of {up + down}" if up + down else "no thumbs",
    }


def outcomes(frame: pd.DataFrame) -> pd.DataFrame:
    """Requests by outcome and piece of time."""
    return _counts(frame, frame.outcome.rename("outcome"))


def errors(frame: pd.DataFrame) -> pd.DataFrame:
    """Requests that went wrong, by outcome and class of the error."""
    wrong = frame[frame.outcome.isin((*FAILED, "refused"))]
    kinds = (wrong.outcome + " " + wrong.error).str.strip()
    return _counts(wrong, kinds.rename("error"))


def modalities(frame: pd.DataFrame) -> pd.DataFrame:
    """Requests by what was given, and piece of time."""
    pictures, recordings = frame.images > 0, frame.recordings > 0
    kinds = np.select(
        [pictures & recordings, pictures, recordings],
        ["picture and recording", "picture", "recording"],
        "text alone",
    )
    return _counts(frame, pd.Series(kinds, frame.index, dtype=str, name="given"))


def ratings(frame: pd.DataFrame) -> pd.DataFrame:
    """Thumbs by piece of time."""
    rated = frame[frame.rating.isin([1, -1])]
    thumbs = rated.rating.map({1: "up", -1: "down"}).astype(str)
    return _counts(rated, thumbs.rename("thumb"))


def first_token(frame: pd.DataFrame) -> pd.DataFrame:
    """Quantiles of the time to the first token, by piece of time, and the changes of model."""
    pieces = frame.dropna(subset="first").groupby("when")["first"]
    table = pieces.quantile(list(QUANTILES.values())).rename("seconds").reset_index()
    named = {value: name for name, value in QUANTILES.items()}
    table["quantile"] = table.pop("level_1").map(named).astype(str)
    marks = changes(frame, table.seconds.max())
    return _joined(table, marks, "seconds", "quantile")


def speed(frame: pd.DataFrame) -> pd.DataFrame:
    """Median of tokens per second, by piece of time, and the changes of model."""
    table = frame.dropna(subset="speed").groupby("when").speed.median().reset_index()
    table["series"] = pd.Series("median", table.index, dtype=str)
    return _joined(table, changes(frame, table.speed.max()), "speed", "series")


def largest(frame: pd.DataFrame, column: str, scale: float = 1.0) -> pd.DataFrame:
    """The largest value of a column, by piece of time."""
    return (frame.groupby("when")[column].max() / scale).reset_index()


def changes(frame: pd.DataFrame, height: float) -> pd.DataFrame:
    """An upright line, two points, for each change of the model or its revision."""
    known = frame[frame.model != ""].sort_values("time")
    changed = known[known.model.ne(known.model.shift()) & known.model.shift().notna()]
    names = [f"{number}: {name}" for number, name in enumerate(changed.model, start=1)]
    when = pd.to_datetime(changed.time.to_numpy(), unit="s")
    return pd.DataFrame(
        {
            "when": when.repeat(2),
            "height": np.tile([0.0, height], len(names)),
            "name": pd.Series(np.repeat(names, 2), dtype=str),
        }
    )


def drift(before: pd.Series, now: pd.Series) -> float | None:
    """Population stability index over the tenths of `before`; None when either is empty."""
    if not len(before) or not len(now):
        return None
    edges = np.unique(np.quantile(before, np.linspace(0, 1, 11)[1:-1]))
    shares = []
    for values in (before, now):
        counts = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)
        shares.append((counts + 0.5) / (len(values) + 0.5 * len(counts)))  # none is 0
    old, new = shares
    return float(np.sum((new - old) * np.log(new / old)))


def reading(index: float | None) -> str:
    """What a population stability index says."""
    if index is None:
        return "nothing to compare with"
    if index < STEADY:
        return f"{index:.2f}, steady"
    return f"{index:.2f}, {'drifting' if index < DRIFTING else 'drifted: questions are others now'}"


def distribution(before: pd.Series, now: pd.Series) -> pd.DataFrame:
    """Share of requests that are at most so long, then and now."""
    percents = np.linspace(0, 100, 41)
    parts = [
        pd.DataFrame({"length": np.percentile(values, percents), "percent": percents, "part": part})
        for values, part in ((before, "before"), (now, "now"))
        if len(values)
    ]
    empty = pd.DataFrame({"length": [0.0], "percent": [0.0], "part": ["now"]})[:0]
    return pd.concat(parts) if parts else empty


def _counts(frame: pd.DataFrame, kinds: pd.Series) -> pd.DataFrame:
    return frame.groupby(["when", kinds]).size().rename("requests").reset_index()


def _joined(table: pd.DataFrame, marks: pd.DataFrame, y: str, series: str) -> pd.DataFrame:
    marks = marks.rename(columns={"height": y, "name": series})
    return pd.concat([part for part in (table, marks) if len(part)]) if len(table) else table
