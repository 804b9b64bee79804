"""Augmentation: exact numbers, the same again from the same seed, evaluation untouched."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from phi_mm.datasets import mixture
from phi_mm.datasets.augmentation import (
    AugmentationSection,
    add_noise,
    augment,
    change_gain,
    change_speed,
    drop_ends,
    mask_mel,
    reverberate,
)

RATE = 16_000
ALL = {
    "gain_db": [-6, 6],
    "snr_db": [5, 20],
    "speed": [0.9, 1.1],
    "reverb_seconds": [0.1, 0.4],
    "drop_seconds": 0.1,
    "time_masks": 2,
    "frequency_masks": 1,
    "frequency_mask_bands": 4,
}


def tone(frequency: float = 440, seconds: float = 2) -> np.ndarray:
    times = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * frequency * times)).astype(np.float32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def power(samples: np.ndarray) -> float:
    return float(np.mean(np.square(samples, dtype=np.float64)))


@pytest.mark.parametrize("snr", [-5, 0, 10, 30])
def test_noise_is_as_loud_as_asked(snr):
    noise = add_noise(tone(), snr, rng()) - tone()
    assert 10 * np.log10(power(tone()) / power(noise)) == pytest.approx(snr, abs=0.01)
    silence = np.zeros(RATE, np.float32)
    assert np.array_equal(add_noise(silence, snr, rng()), silence)


@pytest.mark.parametrize(("factor", "length"), [(0.9, 35_556), (1.0, 32_000), (1.25, 25_600)])
def test_speed_changes_length_and_pitch(factor, length):
    faster = change_speed(tone(), RATE, factor)
    assert len(faster) == length and faster.dtype == np.float32
    peak = np.abs(np.fft.rfft(faster[:25_600])).argmax() * RATE / 25_600
    assert peak == pytest.approx(440 * factor, abs=RATE / 25_600)


def test_gain_is_exact_and_clips_at_full_scale():
    louder = change_gain(tone(), 6)
    assert power(louder) / power(tone()) == pytest.approx(10**0.6, rel=1e-4)
    assert np.abs(change_gain(tone(), 40)).max() == 1.0


def test_an_echo_falls_by_sixty_decibels_in_its_time():
    click = np.zeros(RATE, np.float32)
    click[0] = 0.5
    wet = reverberate(click, RATE, 0.5, rng())
    assert len(wet) == RATE and power(wet) == pytest.approx(power(click), rel=1e-4)
    assert power(wet[1:]) / power(wet[:1]) * (RATE - 1) == pytest.approx(0.5, rel=1e-3)
    early, late = power(wet[1:801]), power(wet[4_001:4_801])  # a quarter of a second apart
    assert 10 * np.log10(early / late) == pytest.approx(30, abs=1.5)


def test_ends_are_dropped_and_half_stays():
    samples = np.arange(100, dtype=np.float32)
    assert np.array_equal(drop_ends(samples, 3, 10), samples[3:90])
    assert np.array_equal(drop_ends(samples, 80, 80), samples[25:75])


def test_masks_hide_sounding_frames_and_leave_padding():
    chosen = AugmentationSection(time_masks=1, time_mask_seconds=0.1, frequency_masks=1)
    mel = torch.randn(80, 300, generator=torch.Generator().manual_seed(0))
    widths = set()
    for seed in range(20):
        changed = mask_mel(mel, 200, 100, chosen, rng(seed)) != mel
        assert not changed[:, 200:].any()
        times = changed[:, :200].all(dim=0).sum().item()
        bands = changed[:, :200].all(dim=1).sum().item()
        assert times <= 10 and bands <= 12
        assert changed.sum() == times * 80 + bands * 200 - times * bands
        widths.add((times, bands))
    assert len(widths) > 10


def test_the_same_generator_gives_the_same_samples():
    chosen = AugmentationSection(**ALL)
    first = augment(tone(), RATE, chosen, rng())
    assert first.dtype == np.float32 and np.array_equal(first, augment(tone(), RATE, chosen, rng()))
    assert not np.array_equal(first, augment(tone(), RATE, chosen, rng(1)))
    for length in (1, 2, 159):
        few = augment(tone()[:length], RATE, chosen, rng())
        assert len(few) and np.isfinite(few).all()


def test_an_effect_comes_as_often_as_asked():
    chosen = AugmentationSection(gain_db=[-6, -6], probability=0.25)
    draws = [augment(tone()[:9], RATE, chosen, rng(seed)) for seed in range(400)]
    assert sum(draw[1] != tone()[1] for draw in draws) == pytest.approx(100, abs=25)


def augmented(recipe, *overrides: str):
    chosen = f"data.augmentation={json.dumps(ALL)}"
    return recipe("data.packed_length=null", chosen, *overrides)


def batches(trainer, epoch: int) -> list[dict]:
    """An epoch's training batches as the loop takes them, without training."""
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    trainer._augmenting.set_epoch(epoch)
    return list(islice(loader, 3))


def spoken_rows(trainer, count: int) -> list[dict]:
    """Rows that hold a recording and no picture."""

    def kinds(row: dict) -> set[str]:
        parts = [part for message in row["messages"] for part in message["content"]]
        return {part["type"] for part in parts if isinstance(part, dict)}

    rows = (trainer.train_dataset[i] for i in range(len(trainer.train_dataset)))
    return list(
        islice((row for row in rows if "audio" in kinds(row) and "image" not in kinds(row)), count)
    )


def test_a_row_sounds_otherwise_in_every_epoch_and_the_same_again(recipe, trainer):
    made = augmented(recipe)
    one, other = trainer(made), trainer(made)
    for before, after in zip(batches(one, 0), batches(other, 0), strict=True):
        assert before.keys() == after.keys() and before["ids"] == after["ids"]
        for name in before.keys() & {"input_ids", "input_features"}:
            assert torch.equal(before[name], after[name])
    row = spoken_rows(one, 1)[0]
    heard = []
    for epoch in (0, 1, 0):
        one._augmenting.set_epoch(epoch)
        heard.append(one._augmenting([row])["input_features"])
    assert torch.equal(heard[0], heard[2])
    assert heard[0].shape != heard[1].shape or not torch.equal(heard[0], heard[1])


def test_a_recording_is_drawn_for_by_its_row_and_not_by_its_batch(recipe, trainer):
    made = trainer(augmented(recipe))
    collator, spoken = made._augmenting, spoken_rows(made, 3)
    together = collator(spoken)["input_features"]
    alone = torch.cat([collator([row])["input_features"] for row in reversed(spoken)][::-1])
    assert torch.equal(together, alone)
    shared = collator([spoken])["input_features"]  # in one row
    assert torch.equal(shared, alone)


def test_evaluation_hears_recordings_as_they_are(recipe, trainer, rows):
    plain, changed = trainer(recipe()), trainer(augmented(recipe))
    validation = mixture([{"path": str(rows)}], 0)
    for expected, found in zip(
        plain.get_eval_dataloader(validation), changed.get_eval_dataloader(validation), strict=True
    ):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_row_that_would_not_fit_slowed_down_keeps_its_speed(recipe, trainer):
    slow = f"data.augmentation={json.dumps({'speed': [0.5, 0.5]})}"
    row = spoken_rows(trainer(recipe()), 1)[0]
    fitting = trainer(recipe()).data_collator([row])
    free = trainer(recipe(slow))._augmenting([row])
    assert free["input_ids"].shape[1] > fitting["input_ids"].shape[1]
    for expected in (fitting, free):
        length = expected["input_ids"].shape[1]
        kept = trainer(recipe(slow, f"data.max_length={length}"))._augmenting([row])
        assert torch.equal(kept["input_ids"], expected["input_ids"])


def test_a_run_learns_with_it(recipe, trainer):
    made = trainer(augmented(recipe, "training.dataloader_num_workers=1"))
    made.train()
    assert np.isfinite(made.state.log_history[-1]["train_loss"])


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["data.augmentation.gain=3"], "'gain' in section data.augmentation; the nearest is 'gain"),
        (["data.augmentation.speed=[0.1, 1]"], r"speed=\[0.1, 1\], expected \[from, to\] between"),
        (["data.augmentation.snr_db=[20, 5]"], r"snr_db=\[20, 5\]"),
        (["data.augmentation.snr_db=5"], "snr_db"),
        (
            ["data.augmentation.time_masks=1", "data.augmentation.probability=0"],
            "probability=0.0, expected more than 0",
        ),
        (["data.augmentation.drop_seconds=-1"], "drop_seconds=-1.0, expected 0 or more"),
        (["data.augmentation.probability=1"], "got nothing to do"),
        (["data.augmentation.time_masks=1", "features=cached"], "computed once.*features: live"),
        (["data.augmentation.time_masks=1", "model.audio=null"], "the model hears nothing"),
    ],
)
def test_what_would_have_no_effect_is_refused(recipe, overrides: list[str], complaint: str):
    with pytest.raises(ValueError, match=f"(?s){complaint}"):
        recipe(*overrides)


def test_a_recipe_is_read_back_equal(recipe, tmp_path: Path):
    from phi_mm.recipes import load_recipe, save_recipe

    made = augmented(recipe)
    save_recipe(made, tmp_path / "again.yaml")
    assert load_recipe(tmp_path / "again.yaml") == made
    assert made.data.augmentation == AugmentationSection(**ALL)
