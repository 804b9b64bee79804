"""What a mixture holds and what is wrong with it: `phi-mm data check`."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from phi_mm.datasets.examination import Examined, examine
from phi_mm.datasets.faults import Kind
from phi_mm.datasets.media import kind_of
from phi_mm.datasets.mixture import Drawn, draw, policy
from processing import PhiMMProcessor

logger = logging.getLogger(__name__)

SHOWN = 10  # findings of a kind that are listed by name
BINS = 8
TRAIN, VALIDATION, EVALUATION = "train", "validation", "evaluation"
NOTES = (Kind.SHARED_MEDIA,)  # worth knowing, and no fault
Signature = tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One source of the mixture, examined.

    Args:
        role: train, validation or evaluation.
        name: its path as the recipe gives it.
        drawn: its rows.
        examined: what was found about them.
    """

    role: str
    name: str
    drawn: Drawn
    examined: Examined

    @cached_property
    def ids(self) -> list[str]:
        """Of the rows; they may repeat."""
        return self.examined.rows["id"][:]

    @cached_property
    def digests(self) -> dict[str, str]:
        """What each file holds, or its path where there is no such file."""
        files = self.examined.files
        pairs = zip(files["path"][:], files["digest"][:], strict=True)
        return {path: digest or path for path, digest in pairs}

    @cached_property
    def uses(self) -> Counter:
        """How often the rows show each file."""
        return Counter(path for paths in self.examined.verdicts["media"][:] for path in paths)

    @cached_property
    def tokens(self) -> list[int]:
        """Lengths of the rows whose tokens were counted, before any is cut."""
        return [n for n in self.examined.verdicts["tokens"][:] if n is not None]

    @property
    def rows(self) -> int:
        return len(self.examined.rows)

    @property
    def bad_rows(self) -> int:
        """Rows that training cannot take."""
        return sum(fault is not None for fault in self.examined.faults)

    @property
    def answers(self) -> int:
        return sum(self.examined.verdicts["answers"][:])

    @property
    def seconds(self) -> float:
        """Length of all recordings, over all uses."""
        files = self.examined.files
        pairs = zip(files["path"][:], files["seconds"][:], strict=True)
        return sum(self.uses[path] * seconds for path, seconds in pairs)

    def count(self, kind: str) -> int:
        """Uses of pictures (`image`) or recordings (`audio`)."""
        files = self.examined.files
        pairs = zip(files["path"][:], files["kind"][:], strict=True)
        return sum(self.uses[path] for path, own in pairs if own == kind)

    def signatures(self, column: str) -> list[Signature]:
        """Of each row, `asked` or `said` with what its media hold: equal for equal rows."""
        verdicts = self.examined.verdicts
        return [
            (words, *(self.digests[path] for path in paths))
            for words, paths in zip(verdicts[column][:], verdicts["media"][:], strict=True)
        ]


@dataclass(frozen=True)
class Finding:
    """One fault: of a row of a part, or of a file that some of its rows show."""

    kind: Kind
    part: Part
    row: int  # its number in the part; of a file, of the first row that shows it
    text: str


@dataclass
class Report:
    """Counts over all parts, and every finding by name."""

    parts: list[Part]
    findings: list[Finding] = field(default_factory=list)

    @cached_property
    def by_kind(self) -> dict[Kind, list[Finding]]:
        found = defaultdict(list)
        for finding in self.findings:
            found[finding.kind].append(finding)
        return {kind: found[kind] for kind in Kind}

    @property
    def faults(self) -> int:
        """Number of findings that are no mere notes."""
        return sum(finding.kind not in NOTES for finding in self.findings)

    def __str__(self) -> str:
        lines = [line for part in self.parts for line in _lines(part)]
        for kind, found in self.by_kind.items():
            lines.append(f"{kind}: {len(found)}")
            lines += [f"  {finding.text}" for finding in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"  ... and {len(found) - SHOWN} more")
        return "\n".join(lines)


def check(
    train: list[dict],
    validation: list[dict] = (),
    evaluation: list[str] = (),
    seed: int = 0,
    processor: PhiMMProcessor | None = None,
    max_length: int | None = None,
) -> Report:
    """Examine what a recipe trains on and measures by, bad rows included.

    Args:
        train, validation: sources as `mixture` takes them; those that are streamed are left out.
        evaluation: files of held-out rows.
        seed: as training has it, so that the same rows are drawn.
        processor: counts tokens as training does; without it only the rows' form and their media
            are looked at.
        max_length: in tokens; longer rows are reported.

    Raises:
        ValueError: for a source that cannot be read at all.
    """
    for source in (source for source in train if source.get("streaming")):
        logger.warning("%s is streamed: training checks its rows as they come", source["path"])
    kept = [source for source in train if not source.get("streaming")]
    held_out = [{"path": path} for path in dict.fromkeys(evaluation)]
    parts = []
    for role, sources in ((TRAIN, kept), (VALIDATION, validation), (EVALUATION, held_out)):
        longest = None if role == EVALUATION else max_length
        for found in draw(list(sources), seed) if sources else []:
            examined = examine(found.rows, processor, longest)
            parts.append(Part(role, str(found.source["path"]), found, examined))
    report = Report(parts)
    for part in parts:
        report.findings += [*_bad_rows(part), *_bad_files(part)]
        if part.role != EVALUATION:
            report.findings += _cut_rows(part, max_length)
    report.findings += [*_duplicates(parts), *_held_out(parts)]
    return report


def policy_line(part: Part) -> str:
    """What training will do about the part's bad rows, in a sentence."""
    if part.role == EVALUATION or not part.bad_rows:
        return ""
    allowed = policy(part.drawn.source).allowed(part.rows)
    if part.bad_rows <= allowed:
        return f"training skips {part.bad_rows} rows (at most {allowed} allowed)"
    return f"training refuses {part.bad_rows} rows (at most {allowed} allowed)"


def histogram(lengths: list[int]) -> list[tuple[int, int, int]]:
    """(rows, from, below) of each bin; nothing for no lengths."""
    if not lengths:
        return []
    counts, edges = np.histogram(lengths, bins=min(BINS, max(lengths) - min(lengths) + 1))
    return [
        (int(count), round(low), round(high))
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def _bad_rows(part: Part) -> Iterator[Finding]:
    """Rows that training cannot take, but for those with bad files, which are named once."""
    for index, fault in enumerate(part.examined.faults):
        if fault and fault.kind not in (Kind.MISSING, Kind.CORRUPT):
            yield Finding(fault.kind, part, index, fault.text)


def _bad_files(part: Part) -> Iterator[Finding]:
    files = part.examined.files
    bad = {path: f for path, f in zip(files["path"][:], files["fault"][:], strict=True) if f}
    rows, first = Counter(), {}
    for index, paths in enumerate(part.examined.verdicts["media"][:] if bad else []):
        for path in bad.keys() & set(paths):
            rows[path] += 1
            first.setdefault(path, index)
    for path, fault in bad.items():
        where = f"{rows[path]} row{'s' if rows[path] > 1 else ''}"
        name = part.ids[first[path]]
        text = f"{path}: {fault} ({where}, the first is {name} of {part.name})"
        yield Finding(kind_of(fault), part, first[path], text)


def _cut_rows(part: Part, max_length: int | None) -> Iterator[Finding]:
    if max_length is None:
        return
    verdicts = part.examined.verdicts
    pairs = zip(verdicts["tokens"][:], part.examined.faults, strict=True)
    for index, (tokens, fault) in enumerate(pairs):
        if tokens is not None and tokens > max_length and fault is None:
            text = f"{_row(part, index)}: {tokens} tokens, of which {max_length} are kept"
            yield Finding(Kind.CUT, part, index, text)


def _duplicates(parts: list[Part]) -> Iterator[Finding]:
    """Training rows that say the same about the same media as an earlier one."""
    first: dict[Signature, tuple[Part, int]] = {}
    for part, index, signature in _signed(parts, (TRAIN,), "said"):
        if signature in first:
            text = f"{_row(part, index)} says what {_row(*first[signature])} says"
            yield Finding(Kind.DUPLICATE, part, index, text)
        first.setdefault(signature, (part, index))


def _held_out(parts: list[Part]) -> Iterator[Finding]:
    """Training rows that ask what a held-out row asks, or show what one shows."""
    held_out: dict[Signature, tuple[Part, int]] = {}
    shown: dict[str, tuple[Part, int]] = {}
    for part, index, signature in _signed(parts, (VALIDATION, EVALUATION), "asked"):
        held_out.setdefault(signature, (part, index))
        for digest in signature[1:]:
            shown.setdefault(digest, (part, index))
    for part, index, signature in _signed(parts, (TRAIN,), "asked"):
        other = next((shown[digest] for digest in signature[1:] if digest in shown), None)
        if signature in held_out:
            text = f"{_row(part, index)} asks what {_row(*held_out[signature])} asks"
            yield Finding(Kind.EVALUATED, part, index, text)
        elif other:
            text = f"{_row(part, index)} shows what {_row(*other)} shows"
            yield Finding(Kind.SHARED_MEDIA, part, index, text)


def _signed(
    parts: list[Part], roles: tuple[str, ...], column: str
) -> Iterator[tuple[Part, int, Signature]]:
    """The rows of parts with these roles that could be read, with their signatures."""
    for part in (part for part in parts if part.role in roles):
        pairs = zip(part.signatures(column), part.examined.verdicts["answers"][:], strict=True)
        for index, (signature, answers) in enumerate(pairs):
            if answers:
                yield part, index, signature


def _row(part: Part, index: int) -> str:
    return f"row {part.ids[index]} of {part.name}"


def _lines(part: Part) -> list[str]:
    lines = [
        f"{part.role}: {part.name}",
        f"  rows        {part.rows}",
        f"  answers     {part.answers}",
        f"  images      {part.count('image')}",
        f"  recordings  {part.count('audio')} ({part.seconds:.1f} s)",
        f"  media files {len(part.examined.files)}",
    ]
    if part.tokens:
        median, p95 = np.percentile(part.tokens, (50, 95))
        lines.append(
            f"  tokens      median {median:.0f}, 95 % {p95:.0f}, longest {max(part.tokens)}"
        )
    bins = histogram(part.tokens)
    most = max((count for count, _, _ in bins), default=0)
    for count, low, high in bins:
        lines.append(f"    {low:6d} to {high:6d}  {count:7d}  {'#' * round(40 * count / most)}")
    if said := policy_line(part):
        lines.append(f"  {said}")
    return lines
