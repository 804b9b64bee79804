"""The benchmark of the cache runs from beginning to end, and compares like with like."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_and_tells_all_of_it(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "benchmarks/feature_cache.py", "--quick", "--folder", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    *table, last = ran.stdout.splitlines()
    told = json.loads(last)
    assert [step["stage"] for step in told["steps"]] == ["1: projectors", "2: LoRA"]
    for step in told["steps"]:
        assert step["speed_ratio"] == step["live"] / step["cached"]
    half, quarter = told["reader"][:2]
    assert half["bytes"] == half["count"] * 576 * 1024 * 2  # 1.18 MB each
    assert quarter["bytes"] == quarter["count"] * 576 * (1024 + 4)
    kept, half, whole = ({row["storage"]: row for row in told["logits"]}[name] for name in
                         ("tower", "float16", "int8"))  # fmt: skip
    assert kept["largest"] < 1e-4
    assert half["largest"] < whole["largest"]
    assert any("the disk's raw read" in line for line in table)
    assert set(told["checksum_ms"]) == {"xxh3", "crc32"}
    assert not list(tmp_path.iterdir())
