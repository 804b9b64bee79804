"""The benchmark of the estimate runs from beginning to end, and the estimate is near."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_prediction_and_measurement_stand_side_by_side() -> None:
    ran = subprocess.run(
        [sys.executable, "benchmarks/estimate.py", "--quick"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    *table, last = ran.stdout.splitlines()
    (case,) = json.loads(last)["cases"]
    assert case["name"] == "LoRA"
    assert case["error"] == case["predicted_mib"] / case["measured_mib"] - 1
    assert abs(case["error"]) < 0.25  # of 119 MiB, to which libraries add some of their own
    assert len(table) == 2
