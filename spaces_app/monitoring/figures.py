"""From records to what is plotted: pure functions of a frame of `Records.between`.

All kinds are always in a plot, also those that are not met: gradio 6.31 gives them their colours
once, and new data no new ones.
"""

import numpy as np
import pandas as pd

from .alerts import FAILED

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
OUTCOMES = ("finished", "length", "stopped", "timeout", "refused", "failed")
GIVEN = ("text alone", "picture", "recording", "picture and recording")
NEW_MODEL = "new model"
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


def pieces(since: float, until: float, width: float) -> pd.DatetimeIndex:
    """All pieces of a time, as `prepare` names them: those without requests are shown too."""
    starts = np.arange(since // width, until // width + 1) * width
    return pd.to_datetime(starts, unit="s")


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


def outcomes(frame: pd.DataFrame, when: pd.DatetimeIndex) -> pd.DataFrame:
    """Requests by outcome."""
    return _counts(frame, frame.outcome, OUTCOMES, when, "outcome")


def errors(frame: pd.DataFrame, when: pd.DatetimeIndex) -> pd.DataFrame:
    """Requests that went wrong, by outcome."""
    return _counts(frame, frame.outcome, ("refused", *FAILED), when, "outcome")


def error_classes(frame: pd.DataFrame) -> dict[str, int]:
    """Requests that went wrong, by outcome and class of the error, the most first."""
    wrong = frame[frame.outcome.isin(("refused", *FAILED))]
    return (wrong.outcome + " " + wrong.error).str.strip().value_counts().to_dict()


def modalities(frame: pd.DataFrame, when: pd.DatetimeIndex) -> pd.DataFrame:
    """Requests by what was given."""
    kinds = (frame.images > 0) + 2 * (frame.recordings > 0)
    return _counts(frame, kinds.map(dict(enumerate(GIVEN))), GIVEN, when, "given")


def ratings(frame: pd.DataFrame, when: pd.DatetimeIndex) -> pd.DataFrame:
    """Answers by thumb."""
    thumbs = frame.rating.map({1: "up", -1: "down"})
    return _counts(frame, thumbs, ("up", "down"), when, "thumb")


def first_token(frame: pd.DataFrame, when: pd.DatetimeIndex) -> pd.DataFrame:
    """Quantiles of the time to the first token, and the changes of model."""
    table = frame.groupby("when")["first"].quantile(list(QUANTILES.values())).unstack()
    table = table.reindex(columns=list(QUANTILES.values())).set_axis(list(QUANTILES), axis=1)
    return _marked(table, frame, when, "seconds")


def speed(frame: pd.DataFrame, when: pd.DatetimeIndex) -> pd.DataFrame:
    """Median of tokens per second, and the changes of model."""
    table = frame.groupby("when").speed.median().to_frame("median")
    return _marked(table, frame, when, "tokens per second")


def queue(frame: pd.DataFrame, when: pd.DatetimeIndex) -> pd.DataFrame:
    """Most that waited when somebody asked."""
    longest = frame.groupby("when").waiting.max().reindex(when, fill_value=0)
    return longest.rename_axis("when").reset_index()


def memory(frame: pd.DataFrame, when: pd.DatetimeIndex) -> pd.DataFrame:
    """The most memory, in GB."""
    most = (frame.groupby("when").resident_bytes.max() / 1e9).to_frame("process")
    return _lines(most, when, "GB")


def changes(frame: pd.DataFrame) -> pd.DataFrame:
    """When the model or its revision changed, and to which one: `time` and `model`."""
    known = frame.loc[frame.model != "", ["time", "model"]].sort_values("time")
    before = known.model.shift()
    return known[before.notna() & (known.model != before)]


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
    parts = {
        part: np.percentile(values, percents) if len(values) else np.full(41, np.nan)
        for part, values in (("before", before), ("now", now))
    }
    table = pd.DataFrame(parts | {"percent": percents})
    return table.melt("percent", var_name="part", value_name="length").astype({"part": str})


def _counts(
    frame: pd.DataFrame, kinds: pd.Series, names: tuple, when: pd.DatetimeIndex, kind: str
) -> pd.DataFrame:
    table = pd.crosstab(frame.when, kinds).reindex(index=when, columns=names, fill_value=0)
    return _long(table, kind, "requests")


def _marked(
    table: pd.DataFrame, frame: pd.DataFrame, when: pd.DatetimeIndex, y: str
) -> pd.DataFrame:
    """With an upright line for each change of the model: two points, and a gap after them."""
    lines = _lines(table.assign(**{NEW_MODEL: np.nan}), when, y)
    times = pd.to_datetime(changes(frame).time.to_numpy(), unit="s")
    heights = np.tile([0.0, lines[y].max(), np.nan], len(times))
    marks = pd.DataFrame({"when": times.repeat(3), "series": NEW_MODEL, y: heights})
    return pd.concat([lines, marks]) if len(marks) else lines


def _lines(table: pd.DataFrame, when: pd.DatetimeIndex, y: str) -> pd.DataFrame:
    """Without the pieces that are empty, or a point alone would be no line; but with the ends."""
    long = _long(table.reindex(when), "series", y)
    return long[long[y].notna() | long.when.isin(when[[0, -1]])]


def _long(table: pd.DataFrame, kind: str, y: str) -> pd.DataFrame:
    long = table.rename_axis("when").reset_index().melt("when", var_name=kind, value_name=y)
    return long.astype({kind: str, y: float})
