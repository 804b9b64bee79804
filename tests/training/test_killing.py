"""A run that is killed again and again ends as the one that never was.

pytest tests/training/test_killing.py
"""

import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from victim import train

from phi_mm.recipes import save_recipe
from phi_mm.training.checkpoints import last_checkpoint

KILLS = 10
STEPS = 18
KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Function that trains in a process of its own, as `victim.train`, and gives its exit code."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server takes no other
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["victim"])  # imports take longer than a training

    def run(*arguments: object) -> int:
        process = context.Process(target=train, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    return run


def test_a_run_killed_ten_times_ends_as_a_straight_one(
    run: Callable, recipe: Callable, rows: Path, tmp_path: Path
):
    settings = ["training.save_steps=2", f"training.max_steps={STEPS}", "lora.lora_dropout=0.1"]
    settings += [f"data.validation={rows}", "training.neftune_noise_alpha=5"]
    made = recipe(*settings, "training.per_device_train_batch_size=2")
    save_recipe(made, tmp_path / "recipe.yaml")
    output = tmp_path / "output.txt"

    def run_to(name: str, moment: int = 0, room: int | None = None) -> int:
        words = [str(tmp_path / "recipe.yaml"), f"training.output_dir={tmp_path / name}"]
        return run(words, tmp_path / name, moment, room, output)

    assert run_to("straight") == 0, output.read_text()
    assert_whole_run(tmp_path / "straight", output.read_text())
    events = int(output.read_text().split()[-1])

    rng = random.Random(0)
    reached = []
    for number in range(KILLS):
        # At once, or in the middle of the first file that grows larger than some bytes.
        room = rng.choice([None, 2 ** rng.randint(4, 16)])
        assert run_to("killed", rng.randint(1, events // 4), room) in KILLED, number
        last = last_checkpoint(tmp_path / "killed")
        reached.append(int(last.name.rpartition("-")[2]) if last else 0)
    assert reached == sorted(reached) and len(set(reached)) > 4, reached

    assert run_to("killed") == 0, output.read_text()
    assert f"resuming from {tmp_path}/killed/checkpoint-{reached[-1]}" in output.read_text()
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "killed")
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_whole_run(run_dir: Path, output: str) -> None:
    """All that train.py leaves behind is there."""
    assert "language_model          qlora" in output and "4-bit" in output
    assert "computes in float32, attention sdpa" in output
    losses = json.loads((run_dir / "eval_results.json").read_text())
    assert losses["eval_image_loss"] > 0
    assert losses["eval_pretrained_text_loss"] != losses["eval_text_loss"]
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text())["model"]["dtype"] == "float32"
    names = {path.name for path in run_dir.iterdir()}
    assert {"adapter_model.safetensors", "processor_config.json", "chat_template.jinja"} <= names
    assert "model.safetensors" not in names
    checkpoints = {path.name for path in run_dir.glob("checkpoint-*")}
    assert checkpoints == {f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS}"}  # save_total_limit
