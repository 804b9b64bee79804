"""What can be wrong with a row, and what a recipe wants done about it."""

import logging
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import datasets

logger = logging.getLogger(__name__)

SHARE = 0.01  # of a source's rows that `skip` leaves out where the recipe gives no limit
EXAMPLES = 3


class Kind(StrEnum):
    """Kinds of faults, in the words of a report."""

    FORM = "rows that cannot be read"
    PLACEHOLDERS = "rows whose placeholders do not match their media"
    MISSING = "missing media"
    CORRUPT = "corrupt media"
    UNLEARNABLE = "rows with no supervised token"
    UNFIT = "rows with media that the model has no tower for"
    TOO_LONG = "rows too long to be cut"
    # Training takes the rows below.
    MISLABELLED = "mislabelled media"
    CUT = "rows too long, which lose the end of their text"
    DUPLICATE = "duplicates"
    EVALUATED = "rows that also stand in an evaluation set"
    SHARED_MEDIA = "rows whose media also stand in an evaluation set, asked otherwise"


class Fault(NamedTuple):
    """One thing that is wrong, in a sentence."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class BadRows:
    """The policy of a source: `error` at any row that training cannot take, or `skip` them.

    Args:
        on_bad_row: error or skip.
        skip_at_most: how many rows may be skipped: a count, or a share of the source's rows (a
            float); more is an error.
    """

    on_bad_row: str = "error"
    skip_at_most: float | None = None

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("error", "skip"):
            raise ValueError(f"got on_bad_row={self.on_bad_row!r}, expected 'error' or 'skip'")
        if self.skip_at_most is None:
            return
        if self.on_bad_row == "error":
            raise ValueError("got skip_at_most without on_bad_row: skip, expected both")
        share = isinstance(self.skip_at_most, float)
        if type(self.skip_at_most) not in (int, float) or not 0 <= self.skip_at_most <= (
            1 if share else float("inf")
        ):
            raise ValueError(
                f"got skip_at_most={self.skip_at_most!r}, expected a count of rows, or a share "
                "from 0.0 to 1.0"
            )

    def leave_out(
        self, rows: datasets.Dataset, faults: list[Fault | None], source: str
    ) -> datasets.Dataset:
        """The rows without a fault.

        Raises:
            ValueError: more faults than the policy allows, with counts and examples.
        """
        found = [fault for fault in faults if fault is not None]
        if not found:
            return rows
        self.check(found, len(rows), source)
        return rows.select([index for index, fault in enumerate(faults) if fault is None])

    def check(self, found: list[Fault], rows: int, source: str) -> None:
        """Logs what is skipped, or raises ValueError where it is too much of `rows` rows."""
        allowed = self.allowed(rows)
        what = f"{len(found)} bad rows of {rows} in {source}: {_summary(found)}"
        if len(found) <= allowed:
            logger.warning("skipped %s", what)
        elif self.on_bad_row == "error":
            raise ValueError(
                f"got {what}\nexpected none: `on_bad_row: skip` with `skip_at_most` leaves them out"
            )
        else:
            raise ValueError(f"got {what}\nexpected at most {allowed}: see skip_at_most")

    def allowed(self, rows: int) -> int:
        """How many of `rows` rows may be bad."""
        if self.on_bad_row == "error":
            return 0
        limit = SHARE if self.skip_at_most is None else self.skip_at_most
        return int(limit * rows) if isinstance(limit, float) else limit


def _summary(found: list[Fault]) -> str:
    counts = Counter(fault.kind for fault in found)
    lines = [", ".join(f"{count} {kind}" for kind, count in counts.most_common())]
    lines += [f"  {fault.text}" for fault in found[:EXAMPLES]]
    if len(found) > EXAMPLES:
        lines.append(f"  ... and {len(found) - EXAMPLES} more (`phi-mm data check` shows them)")
    return "\n".join(lines)
