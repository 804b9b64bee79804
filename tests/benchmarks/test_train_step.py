"""The benchmark of training steps runs from beginning to end, and compares what is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instruct_rows import INSTRUCT, alike_batches, llava_batches, write_pictures
from train_step import LLAVA, OURS, Encoder, Setting, Trial
from train_step_models import SIZES, forward_work

ROOT = Path(__file__).parents[2]


def run(script: str) -> tuple[list[str], dict]:
    """The table and the last line of a benchmark's quick run."""
    ran = subprocess.run(
        [sys.executable, f"benchmarks/{script}", "--quick"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    *table, last = ran.stdout.splitlines()
    return table, json.loads(last)


def test_all_ways_to_train_compute_the_same() -> None:
    table, told = run("train_step.py")
    instruct, captions = told["stages"]
    assert [row["way"] for row in captions["rows"]] == [
        instruct["rows"][place]["way"] for place in (0, -2, -1)
    ]
    for stage in (instruct, captions):
        first, *others, pooled = stage["rows"]
        for row in others:
            assert row["loss_difference"] < 1e-5 and row["gradient_difference"] < 1e-3, row["way"]
            assert row["tokens"] == first["tokens"]
            assert row["supervised_tokens"] == first["supervised_tokens"]
            assert row["tokens"] <= row["padded_tokens"] <= first["padded_tokens"]
        # 36 patches a picture become 9, in each of the four rows of a step.
        assert pooled["tokens"] == first["tokens"] - 4 * 27
        assert pooled["supervised_tokens"] == first["supervised_tokens"]
        assert "gradient_difference" not in pooled
    ours, pooled = instruct["rows"][-2:]
    assert told["speed_ratio"] == instruct["rows"][0]["seconds"] / ours["seconds"]
    assert told["memory_ratio"] == ours["peak_mb"] / instruct["rows"][0]["peak_mb"]
    assert told["speed_ratio_image_pool_2"] == instruct["rows"][0]["seconds"] / pooled["seconds"]
    assert sum(row["way"] in line for row in instruct["rows"] for line in table) >= 9


def test_the_small_model_has_the_proportions_of_phi_2() -> None:
    shares = {}
    for name in ("phi-2", "small"):
        work = forward_work(SIZES[name], 800)
        shares[name] = work["head"] / (work["head"] + work["layers"])
    assert shares["phi-2"] == 51200 / (51200 + 12 * 32 * 2560)
    assert shares["small"] == pytest.approx(shares["phi-2"])


def test_llava_gives_every_batch_as_many_tokens_and_we_give_it_rows_of_like_length() -> None:
    lengths = [700, 610, 930, 640, 800, 620]
    # 930 | 800; 930 | 1500; 1570 | 1500; 1570 | 2120; 2180 and full
    assert llava_batches(lengths, 3) == [[2, 3, 1], [4, 0, 5]]
    assert alike_batches(lengths, 3) == [[1, 5, 3], [0, 4, 2]]


def test_what_a_gpu_would_measure_computes_the_same(tmp_path: Path) -> None:
    """QLoRA in bfloat16, with the toy's shape and without the GPU."""
    setting = Setting(SIZES["toy"], INSTRUCT, 2, 2, 4, 0, True, True, "cpu")
    pictures = write_pictures(tmp_path, 4, SIZES["toy"].side)
    Encoder(setting, pictures, tmp_path)
    llava, ours = (Trial(way, setting, pictures, tmp_path) for way in (LLAVA, OURS[-1]))
    for trial in (llava, ours):
        kinds = {type(m).__name__ for m in trial.model.modules() if isinstance(m, torch.nn.Linear)}
        assert "Linear4bit" in kinds
        trial.backward(0)
    assert ours.loss == pytest.approx(llava.loss, rel=1e-3)
    for name, weight in llava.learning.items():
        difference = (ours.learning[name].grad - weight.grad).norm()
        assert difference < 0.05 * weight.grad.norm(), name
