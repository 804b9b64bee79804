"""Checkpoints: which are whole, which is gone on from, which is the best.

pytest tests/training/test_checkpoints.py
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phi_mm.datasets import mixture
from phi_mm.training import begin_or_resume, by_modality
from phi_mm.training.checkpoints import find_tear, last_checkpoint, seal


def write_checkpoint(run_dir: Path, step: int) -> Path:
    """A sealed checkpoint of two small files."""
    folder = run_dir / f"checkpoint-{step}"
    (folder / "adapters").mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(bytes(range(256)))
    (folder / "adapters" / "weights").write_bytes(b"weights")
    seal(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path):
    whole = write_checkpoint(tmp_path, 2)
    last = write_checkpoint(tmp_path, 10)
    assert last_checkpoint(tmp_path) == last
    files = [path for path in last.rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        content = path.read_bytes()
        for torn in (None, b"", content[:-1], content[:-1] + b"\x00"):
            path.unlink()
            if torn is not None:
                path.write_bytes(torn)
            assert last_checkpoint(tmp_path) == whole, (path.name, torn)
            path.write_bytes(content)
    assert last_checkpoint(tmp_path) == last
    assert last_checkpoint(tmp_path / "nothing") is None


def test_what_is_wrong_is_said(tmp_path: Path, caplog):
    folder = write_checkpoint(tmp_path, 4)
    (folder / "optimizer.pt").write_bytes(b"")
    assert find_tear(folder) == "optimizer.pt is not as it was written"
    (folder / "optimizer.pt").unlink()
    assert find_tear(folder) == "optimizer.pt is missing"
    assert last_checkpoint(tmp_path) is None
    assert f"passing over {folder}: optimizer.pt is missing" in caplog.text
    (folder / "trainer_state.json").write_text('{"global_st')
    assert find_tear(folder) == "trainer_state.json is cut off"


def test_a_seal_that_was_cut_off_does_not_spoil_the_next(tmp_path: Path):
    folder = write_checkpoint(tmp_path, 4)
    (folder / "checksums.json.part").write_text("{")
    seal(folder)
    assert find_tear(folder) is None


def test_a_run_folder_is_not_mixed_up(recipe, tmp_path: Path):
    first = recipe()
    assert begin_or_resume(first) is None
    checkpoint = write_checkpoint(first.run_dir, 2)
    assert begin_or_resume(recipe("training.max_steps=9")) == checkpoint
    with pytest.raises(ValueError, match=r"another recipe \(lora.r: 4 -> 5\)"):
        begin_or_resume(recipe("lora.r=5"))
    with pytest.raises(ValueError, match=r"another recipe \(tune.vision_tower: 'frozen' -> 'full"):
        begin_or_resume(recipe("tune.vision_tower=full"))
    with pytest.raises(ValueError, match="holds checkpoint-2"):
        begin_or_resume(recipe("training.resume_from_checkpoint=null"))
    torn = write_checkpoint(tmp_path, 4)
    (torn / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint-4, in which optimizer.pt is missing"):
        begin_or_resume(recipe(f"training.resume_from_checkpoint={torn}"))


@pytest.mark.parametrize("tune", ["frozen", "lora", "full"])
def test_the_best_checkpoint_is_kept_and_taken(recipe, trainer, rows: Path, tune: str):
    """By the mean loss over all validation rows; the greatest, so that it is not the last."""
    words = ("eval_strategy=steps", "eval_steps=1", "save_steps=1", "greater_is_better=true")
    words += ("load_best_model_at_end=true", "save_total_limit=1", "learning_rate=0.01")
    made = recipe(*(f"training.{w}" for w in words), tune=tune)
    validation = mixture([{"path": str(rows), "limit": 10}], seed=1)
    runner = trainer(made, eval_dataset=by_modality(validation))
    runner.train()
    means = [log["eval_loss"] for log in runner.state.log_history if "eval_loss" in log]
    assert len(means) == 4
    best = means.index(max(means)) + 1
    assert best < 4
    assert runner.state.best_model_checkpoint == str(made.run_dir / f"checkpoint-{best}")
    assert {p.name for p in made.run_dir.glob("checkpoint-*")} == {f"checkpoint-{best}"}
    assert find_tear(made.run_dir / f"checkpoint-{best}") is None
    runner.save_model()
    for path in made.run_dir.glob("*.safetensors"):
        kept = load_file(made.run_dir / f"checkpoint-{best}" / path.name)
        assert all(torch.equal(value, kept[key]) for key, value in load_file(path).items())
    metrics = runner.evaluate()
    sizes = {kind: len(part) for kind, part in runner.eval_dataset.items()}
    total = sum(metrics[f"eval_{kind}_loss"] * size for kind, size in sizes.items())
    assert metrics["eval_loss"] == pytest.approx(total / 10) == pytest.approx(max(means))


def test_the_best_by_what_is_not_measured_is_refused(recipe, trainer, rows: Path):
    words = ("eval_strategy=steps", "save_strategy=steps", "load_best_model_at_end=true")
    made = recipe(
        *(f"training.{w}" for w in words), "training.metric_for_best_model=video_loss", tune="lora"
    )
    validation = mixture([{"path": str(rows), "limit": 10}], seed=1)
    with pytest.raises(ValueError, match="=video_loss, expected one of loss, "):
        trainer(made, eval_dataset=by_modality(validation))
