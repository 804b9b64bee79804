"""Which rows make a batch: shared rows, batches of one kind, and what a run learns from them.

pytest tests/training/test_packing.py
"""

import json
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import text_beside_pictures
import torch
from safetensors.torch import load_file

from phi_mm.assembly import assemble
from phi_mm.datasets import load_rows, mixture
from phi_mm.recipes import save_recipe
from phi_mm.training import sampler
from phi_mm.training.sampler import (
    LengthGroupedSampler,
    PackingSampler,
    best_fit,
    row_kinds,
    row_lengths,
)
from processing import PhiMMCollator

ROOT = Path(__file__).parents[2]
PLAIN = ["training.optim=sgd", "training.max_grad_norm=0", "training.logging_steps=1"]
PACKED = ["data.packed_length=300", "data.max_length=300"]


def test_the_bin_with_the_least_room_that_is_enough_is_taken():
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([10, 10, 1], 10) == [[0], [1], [2]]
    assert best_fit([], 10) == []
    with pytest.raises(ValueError, match="got a length of 11, expected at most 10"):
        best_fit([11], 10)


def test_every_epoch_packs_every_row_once_into_as_many_full_rows():
    rng = random.Random(0)
    lengths = [rng.choice((rng.randint(20, 200), rng.randint(600, 900))) for _ in range(2003)]
    sampler = PackingSampler(lengths, packed_length=8192, seed=3)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        bins = list(sampler)
        assert bins == list(sampler)
        assert len(bins) == len(sampler)
        assert sorted(row for rows in bins for row in rows) == list(range(2003))
        assert max(sum(lengths[row] for row in rows) for rows in bins) <= 8192
        epochs.append(bins)
    assert sum(lengths) > 0.98 * 8192 * len(sampler)
    assert len({frozenset(map(frozenset, bins)) for bins in epochs}) == 3  # other neighbours
    assert list(PackingSampler(lengths, packed_length=8192, seed=4)) not in epochs


def test_batches_are_of_one_kind_but_for_what_remains():
    rng = random.Random(0)
    kinds = rng.choices(("text", "image", "audio", "image_audio"), (4, 5, 2, 1), k=1003)
    lengths = [rng.randint(1, 100) for _ in kinds]
    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=3, kinds=kinds)
    rows = list(sampler)
    assert sorted(rows) == list(range(1003)) and rows == list(sampler)
    assert rows != list(LengthGroupedSampler(lengths, batch_size=8, seed=4, kinds=kinds))
    whole = sum(count // 8 for count in Counter(kinds).values())
    batches = [rows[i : i + 8] for i in range(0, 8 * whole, 8)]
    assert all(len({kinds[row] for row in batch}) == 1 for batch in batches)
    firsts = [kinds[batch[0]] for batch in batches]
    assert len([1 for one, other in zip(firsts, firsts[1:], strict=False) if one != other]) > 50
    longest = sum(8 * max(lengths[row] for row in batch) for batch in batches)
    assert longest < 1.3 * sum(lengths)


@pytest.mark.parametrize("text", ["phi", "phi3"])
def test_lengths_are_those_that_the_collator_makes(recipe, text: str):
    made = recipe(text=text, tune="frozen")
    _, processor = assemble(made)
    rows = mixture(made.data.train, 0)
    collator = PhiMMCollator(processor)
    exact = [collator([rows[i]])["input_ids"].shape[1] for i in range(len(rows))]
    assert row_lengths(rows, processor) == exact
    cut = sorted(exact)[len(exact) // 2]
    assert row_lengths(rows, processor, max_length=cut) == [min(length, cut) for length in exact]
    assert Counter(row_kinds(rows)) == dict.fromkeys(("image", "audio", "image_audio", "text"), 6)


def test_many_rows_are_counted_by_several_processes(recipe, monkeypatch: pytest.MonkeyPatch):
    made = recipe(tune="frozen")
    _, processor = assemble(made)
    alone = row_lengths(mixture(made.data.train, 1), processor)
    monkeypatch.setattr(sampler, "MANY", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    # The order differs, so that nothing comes from the cache of `datasets`.
    shared = row_lengths(mixture(made.data.train, 2), processor)
    assert sorted(shared) == sorted(alone) and shared != alone


def test_a_recording_of_another_rate_is_counted(recipe, tmp_path: Path):
    made = recipe(tune="frozen")
    _, processor = assemble(made)
    noise = np.random.default_rng(0).normal(0, 0.1, 30_001).astype(np.float32)
    soundfile.write(tmp_path / "other.wav", noise, 22_050)
    rows = load_rows(write_row(tmp_path / "rows.json", "other.wav"))
    made = PhiMMCollator(processor)([rows[0]])["input_ids"]
    assert (made == processor.audio_token_id).sum() == 18  # 1.36 s
    assert row_lengths(rows, processor) == [made.shape[1]]
    (tmp_path / "broken.wav").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken.wav', expected a recording"):
        row_lengths(load_rows(write_row(tmp_path / "broken.json", "broken.wav")), processor)


def write_row(path: Path, audio: str) -> Path:
    turns = [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": "yes"}]
    path.write_text(json.dumps([{"audio": audio, "conversations": turns}]))
    return path


def test_a_packed_run_learns_as_the_unpacked_one(trainer, recipe):
    """All rows in one step: packed, packed and accumulated, and each in a row of its own."""
    ends = []
    for batch in (
        ["training.per_device_train_batch_size=24", "data.max_length=300"],
        ["training.per_device_train_batch_size=24", *PACKED],
        [
            "training.per_device_train_batch_size=2",
            "training.gradient_accumulation_steps=12",
            *PACKED,
        ],
    ):
        run = trainer(recipe(*PLAIN, *batch, "training.num_train_epochs=1", tune="frozen"))
        run.args.max_steps = -1
        run.train()
        assert run.state.global_step == 1
        losses = [log["loss"] for log in run.state.log_history if "loss" in log]
        ends.append((losses, run.model.model.audio_projector.linear_1.weight.detach()))
    assert len(run.get_train_dataloader()) < 12
    for losses, weight in ends[1:]:
        assert losses == pytest.approx(ends[0][0], abs=1e-4)
        torch.testing.assert_close(weight, ends[0][1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "batches",
    [
        [*PACKED, "training.per_device_train_batch_size=2"],
        ["data.group_by_modality=true", "training.train_sampling_strategy=group_by_length"],
    ],
    ids=["packing", "group_by_modality"],
)
def test_resuming_in_a_later_epoch_sees_the_same_batches(trainer, recipe, tmp_path, batches):
    made = recipe(*batches, "training.save_steps=8", "training.max_steps=12", tune="frozen")
    straight = trainer(made)
    straight.train()
    assert 1 < straight.state.epoch and len(straight.get_train_dataloader()) < 8
    straight.save_model(tmp_path / "straight")
    torch.manual_seed(99)
    resumed = trainer(made)
    resumed.train(resume_from_checkpoint=str(made.run_dir / "checkpoint-8"))
    resumed.save_model(tmp_path / "resumed")
    ends = [load_file(tmp_path / end / "projectors.safetensors") for end in ("straight", "resumed")]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_validation_is_not_packed(trainer, recipe):
    losses = []
    for batches in (PACKED, PACKED[1:]):
        run = trainer(recipe(*batches, tune="frozen"))
        losses.append(run.evaluate(run.train_dataset)["eval_loss"])
    assert losses[0] == losses[1]


def test_what_cannot_be_meant_is_refused(recipe):
    for length in ("null", "301"):
        with pytest.raises(ValueError, match="expected a conversation to fit the row"):
            recipe("data.packed_length=300", f"data.max_length={length}")
    grouped = "training.train_sampling_strategy=group_by_length"
    with pytest.raises(ValueError, match="which makes batches of its own: remove one"):
        recipe(*PACKED, grouped)
    with pytest.raises(ValueError, match="got data.group_by_modality and .*=random"):
        recipe("data.group_by_modality=true")
    with pytest.raises(ValueError, match="and no data.packed_length"):
        recipe(*PACKED, "data.group_by_modality=true")


def test_text_on_one_process_and_pictures_on_the_other(recipe, tmp_path: Path):
    """The steps of two processes, of which one never sees a picture, are those of one process.

    Rows stand in order, text and picture in turn: process 0 has the text, process 1 the pictures.
    """
    settings = [*PLAIN, "training.max_steps=3", "training.per_device_train_batch_size=1"]
    settings += ["training.train_sampling_strategy=sequential", "training.learning_rate=0.1"]
    alone = recipe(
        *settings,
        "training.gradient_accumulation_steps=2",
        f"training.output_dir={tmp_path / 'alone'}",
        tune="lora",
    )
    text_beside_pictures.train(alone)
    both = recipe(*settings, f"training.output_dir={tmp_path / 'both'}", tune="lora")
    save_recipe(both, tmp_path / "both.yaml")
    run_processes(2, Path(text_beside_pictures.__file__), tmp_path / "both.yaml")
    ends = [load_file(run.run_dir / "adapter_model.safetensors") for run in (alone, both)]
    assert any("multi_modal_projector" in name for name in ends[0])
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def run_processes(count: int, script: Path, *arguments: Path) -> None:
    """The script as `count` processes of one gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"PYTHONPATH": ROOT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "OMP_NUM_THREADS": 1}
    processes = []
    for rank in range(count):
        own = shared | {"RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in own.items()}
        command = [sys.executable, str(script), *map(str, arguments)]
        processes.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
