"""Two processes learn what one does, and what they save is whole.

pytest tests/training/test_processes.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phi_mm.recipes import Recipe, save_recipe

ROOT = Path(__file__).parents[2]
FSDP = Path(__file__).with_name("fsdp_train.py")


def train(script: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    """What two processes of `script` have trained and saved."""
    path = recipe.run_dir.with_suffix(".yaml")
    save_recipe(recipe, path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ran = subprocess.run(
        [sys.executable, *launcher, str(script), str(path)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout
    return trained(recipe.run_dir)


def trained(run_dir: Path) -> dict[str, torch.Tensor]:
    """The weights in a run folder that were trained."""
    names = ("projectors.safetensors", "adapter_model.safetensors", "model.safetensors")
    return load_file(next(run_dir / name for name in names if (run_dir / name).is_file()))


def assert_learnt_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("script", [ROOT / "train.py", FSDP], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("tune", ["lora"])
def test_two_processes_learn_as_one_that_accumulates(
    recipe, trainer, tmp_path: Path, script: Path, tune: str
):
    """Rows show pictures, recordings, both or nothing: in many batches a projector is idle."""
    steps = ["training.max_steps=3", "training.per_device_train_batch_size=1"]
    two = recipe(*steps, f"training.output_dir={tmp_path / 'two'}", tune=tune)
    one = recipe(
        *steps,
        "training.gradient_accumulation_steps=2",
        f"training.output_dir={tmp_path / 'one'}",
        tune=tune,
    )
    alone = trainer(one)
    alone.train()
    alone.save_model()
    assert_learnt_alike(trained(one.run_dir), train(script, two))
