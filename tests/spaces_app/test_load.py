"""The load benchmark, on a small scale: what it counts is what happened."""

import json
import subprocess
import sys
from pathlib import Path

from .serving import ROOT

LOAD = ROOT / "benchmarks" / "load.py"


def test_every_answer_is_counted_and_compared(artefact: Path, tmp_path: Path) -> None:
    words = [str(artefact), "--users", "1", "3", "--minutes", "0.03", "--length", "16"]
    done = subprocess.run(
        [sys.executable, str(LOAD), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *table, last = done.stdout.splitlines()
    rows = json.loads(last)
    assert [row["users"] for row in rows] == [1, 3]
    for row in rows:
        assert row["answers"] >= row["users"] and row["refused"] == row["errors"] == 0
        assert row["wrong"] == 0 and row["first_word_p50"] <= row["answer_p50"]
    assert table[0].split() == ["users", "1", "3"]


def test_an_artefact_or_an_address() -> None:
    done = subprocess.run([sys.executable, str(LOAD)], capture_output=True, text=True)
    assert done.returncode == 2 and "expected an artefact or --url" in done.stderr
