"""The benchmark of growth runs from beginning to end, and measures what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_growth_is_told_for_every_dimension() -> None:
    ran = subprocess.run(
        [sys.executable, "benchmarks/growth.py", "--quick"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    *table, last = ran.stdout.splitlines()
    told = json.loads(last)
    assert [row["tokens"] for row in told["sequence_length"]] == [256, 512]
    # 36 tokens a picture beside 200 of text.
    pictures = [(row["pictures"], row["tokens"]) for row in told["pictures"]]
    assert pictures == [(0, 200), (1, 236), (2, 272)]
    assert [row["processes"] for row in told["processes"]] == [1, 2]
    assert [row["rows"] for row in told["rows"]] == [100, 1000]
    steps = told["sequence_length"] + told["pictures"] + told["processes"]
    assert all(row["seconds"] > 0 and row["peak_mb"] >= 0 for row in steps)
    for row in told["rows"]:
        assert min(row[part] for part in ("read", "again", "lengths", "packing", "first_batch")) > 0
    assert len(table) == 4 * 3 + 2 + 3 + 2 + 2
