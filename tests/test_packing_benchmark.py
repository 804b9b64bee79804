"""The benchmark of packing runs from beginning to end, and compares like with like."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_packed_batches_are_full_and_lose_nothing() -> None:
    ran = subprocess.run(
        [sys.executable, "benchmarks/packing.py", "--quick"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    *table, last = ran.stdout.splitlines()
    told = json.loads(last)
    assert [one["data"] for one in told["compared"]] == [
        "LLaVA-Instruct",
        "LLaVA-Instruct and text alone",
    ]
    for one in told["compared"]:
        ways = one["ways"]
        assert ways["plain"]["share"] < ways["by length"]["share"] < ways["packed"]["share"] == 1
        assert all(way["peak_mb"] > 0 for way in ways.values())
        assert one["loss_difference"] < 1e-5 and one["gradient_difference"] < 1e-4
        faster = ways["packed"]["tokens_per_second"] / ways["plain"]["tokens_per_second"]
        assert one["speed_ratio"] == pytest.approx(faster)
    assert told["speed_ratio"] == told["compared"][0]["speed_ratio"]
    assert sum("not padding" in line for line in table) == 2
