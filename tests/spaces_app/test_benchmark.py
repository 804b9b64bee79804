"""The benchmark of serving runs from beginning to end, and compares like with like."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_both_ways_are_asked_the_same(artefact: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "benchmarks/serving.py", str(artefact), "--quick"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    *table, last = ran.stdout.splitlines()
    told = json.loads(last)
    assert [model["artefact"] for model in told["models"]] == [artefact.name, "toy"]
    toy = told["models"][1]
    assert toy["precision"] == {"ours": "fp32", "plain": "bfloat16"}
    # Attention and MLP of two layers, and the head.
    assert toy["weights_read_gb"] * 1e9 / 4 == 2 * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 1024
    assert [(row["users"], row["turn"]) for row in toy["turns"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for row in toy["turns"]:
        ours, plain = row["ours"], row["plain"]
        if row["turn"] == 1:
            assert ours["prompt_tokens"] == plain["prompt_tokens"]
            assert ours["reused_tokens"] == 0
        else:  # all of the first turn but what the template writes after it
            assert ours["reused_tokens"] >= toy["turns"][0]["ours"]["prompt_tokens"]
        better = plain["first_token_seconds"] / ours["first_token_seconds"]
        assert row["first_token_times_better"] == better
    assert [taken["artefact"] for taken in told["memory"]] == [artefact.name, "toy"]
    assert all(taken["answered"] >= 2 for taken in told["memory"])
    assert any("a token reads" in line for line in table)


def test_a_folder_without_an_artefact_is_refused(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "benchmarks/serving.py", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2 and f"got {tmp_path}, expected the folder" in ran.stderr
