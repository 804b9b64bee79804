"""The table, the files and the page of a report, from outcomes made by hand."""

import json
import re
from pathlib import Path

import pytest

from phi_mm.evaluation.report import table, write_report
from phi_mm.evaluation.tasks import Outcome, Row, Task, load_items


@pytest.fixture
def tasks(world: Path) -> list[Task]:
    """Two tasks: pictures with a control, 9 of 12 right; speech, half of it right."""
    seen = Task("image_qa", "exact_match", load_items(world / "test" / "image_qa.json", "image_qa"))
    said = [item.reference for item in seen.items[:9]] + ["<b>odd</b>"] * 3
    seen.outcomes = [
        Outcome(Row("image_qa", "exact_match", 0.75, 12, 0.468, 0.911, 0.25, None), said,
                [1.0] * 9 + [0.0] * 3),
        Outcome(Row("image_qa", "exact_match", 0.25, 12, 0.089, 0.532, 0.25, "blank"),
                ["red"] * 12, [1.0, 0.0, 0.0, 0.0] * 3),
    ]  # fmt: skip
    heard = Task("asr", "wer", load_items(world / "test" / "asr.json", "asr", 2))
    heard.outcomes = [
        Outcome(Row("asr", "wer", 1 / 6, 2, 0.0, 1 / 3, 1.0, None),
                ["the red star", "a green star"], [0.0, 1 / 3]),
    ]  # fmt: skip
    return [seen, heard]


def test_table(tasks: list[Task]) -> None:
    rows = [outcome.row for task in tasks for outcome in task.outcomes]
    assert table(rows).splitlines() == [
        "task      metric            score              95 %  majority   blank   n",
        "image_qa  exact match      75.0 %  46.8 % to 91.1 %    25.0 %  25.0 %  12",
        "asr       word error rate  16.7 %   0.0 % to 33.3 %   100.0 %           2",
        "word error rate: lower is better",
    ]


def test_files(tasks: list[Task], tmp_path: Path) -> None:
    write_report(tasks, tmp_path, "a run")
    rows = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["value"] for row in rows] == [0.75, 0.25, 1 / 6]
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 12 + 12 + 2
    assert lines[0]["asked"] == "[image] what colour? say"
    assert lines[0]["media"][0].endswith("0.png")
    assert (lines[11]["answer"], lines[11]["right"]) == ("<b>odd</b>", False)
    assert (lines[24]["said"], lines[24]["right"], lines[25]["right"]) == ("said 0", True, False)


def test_page_holds_everything_and_asks_nobody(tasks: list[Task], tmp_path: Path) -> None:
    write_report(tasks, tmp_path, "a run")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "://" not in page.replace("data:image/png", "")
    assert page.count('src="data:image/png;base64,') == 12
    assert page.count('src="data:audio/mpeg;base64,') == 2
    assert page.count('class="card right"') == 10
    assert page.count('class="card wrong"') == 4
    assert "said aloud: said 1" in page
    assert "blank picture: red" in page
    assert "&lt;b&gt;odd&lt;/b&gt;" in page and "<b>odd" not in page
    assert '<rect class="value" x="0" y="5" width="75.00%"' in page
    assert 'class="base" x1="25.00%"' in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert '<option value="asr">' in page
