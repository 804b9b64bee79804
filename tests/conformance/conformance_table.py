"""docs/conformance.md, from what the tests of conformance found.

pytest tests/conformance --write-table docs/conformance.md
"""

import re
import tempfile
from pathlib import Path

import pytest

COLUMNS = tuple(
    f"{family} {parts}" for family in ("phi", "phi3") for parts in ("image", "audio", "both")
)
SECTIONS = ("Load", "Generate", "Adapt", "Push")  # others follow as they were found
HEAD = """# Conformance

Which ways of using an exported folder work, for each family of language model with each choice of
towers. `make conformance` runs them all on small random models and writes this page; it writes
nothing when one of them fails or is left out. A way is refused by an error that says what to do.
"""


class Table:
    """A plugin of pytest that collects the outcome of every way, and writes the page at the end."""

    def __init__(self, path: Path):
        self.path = path
        self.cells: dict[tuple[str, str], dict[str, list[str | None]]] = {}
        self.problems: list[str] = []

    def expect(self, section: str, way: str, column: str) -> None:
        """There is a test of this cell."""
        self.cells.setdefault((section, way), {}).setdefault(column, [])

    def note(self, section: str, way: str, column: str, refusal: str | None) -> None:
        """It works, or it is refused with these words."""
        self.expect(section, way, column)
        self.cells[section, way][column].append(refusal)

    def markdown(self) -> str:
        """The page.

        Raises:
            ValueError: naming every cell that is missing, failed, was skipped, or has tests that
                disagree.
        """
        problems = list(self.problems)
        for (section, way), row in self.cells.items():
            for column in COLUMNS:
                kinds = {refusal is None for refusal in row.get(column, [])}
                if len(kinds) != 1:
                    found = "no outcome" if not kinds else "both outcomes"
                    problems.append(f"{section}, {way}, {column}: {found}")
        if problems or not self.cells:
            raise ValueError("no table, for it would have holes:\n" + "\n".join(problems))
        found = list(dict.fromkeys(section for section, _ in self.cells))
        order = [s for s in SECTIONS if s in found] + [s for s in found if s not in SECTIONS]
        return HEAD + "".join(self._section(section) for section in order)

    def _section(self, section: str) -> str:
        """One table, and under it the words of every refusal once."""
        lines = ["", f"## {section}", "", f"| way | {' | '.join(COLUMNS)} |", "|---" * 7 + "|"]
        words: list[str] = []
        for (_, way), row in ((key, row) for key, row in self.cells.items() if key[0] == section):
            cells = []
            for refusal in (row[column][0] for column in COLUMNS):
                if refusal is not None and _shown(refusal) not in words:
                    words.append(_shown(refusal))
                number = "" if refusal is None else f" ({words.index(_shown(refusal)) + 1})"
                cells.append("works" if refusal is None else f"refused{number}")
            lines.append(f"| {way} | {' | '.join(cells)} |")
        if words:
            lines += ["", *(f"{number}. {text}" for number, text in enumerate(words, start=1))]
        return "\n".join(lines) + "\n"

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        marker = item.get_closest_marker("way")
        if marker is not None:
            cell = (*marker.args, " ".join(item.callspec.params["case"]))
            item.user_properties.append(("cell", cell))
            self.expect(*cell)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if "cell" not in properties:
            return
        if report.outcome != "passed":
            self.problems.append(f"{', '.join(properties['cell'])}: {report.outcome}")
        elif report.when == "call":
            self.note(*properties["cell"], properties.get("refused"))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        try:
            self.path.write_text(self.markdown(), encoding="utf-8")
        except ValueError as error:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            reporter.write_line(f"\n{error}")


def _shown(words: str) -> str:
    """Words on one line, without the places where the tests keep their artefacts."""
    path = rf"{re.escape(tempfile.gettempdir())}/[^\s'\"`,]*"
    return re.sub(path, "FOLDER", " ".join(words.split())).replace("|", r"\|")
