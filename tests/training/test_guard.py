"""A gradient that is not to be learnt from stops the run and names its rows.

pytest tests/training/test_guard.py
"""

import math
from pathlib import Path

import pytest
import torch

from phi_mm.training.guard import NamingCollator, row_losses
from processing import PhiMMCollator


class Poisoned:
    """A collator whose every batch with this row gives NaN in the row's own positions."""

    def __init__(self, collator: PhiMMCollator, name: str):
        self.collator, self.name = collator, name
        self.packed_length = collator.packed_length

    def __call__(self, samples: list[dict]) -> dict:
        batch = self.collator(samples)
        for number, sample in enumerate(samples):
            if sample["id"] == self.name:
                batch["input_ids"][number, 0] = NAN_TOKEN
        return batch


NAN_TOKEN = 319  # a spare row of the vocabulary


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_row_that_gives_nan_stops_the_run_by_name(recipe, trainer, accumulate: int):
    words = (f"training.gradient_accumulation_steps={accumulate}", "training.save_steps=1")
    runner = trainer(recipe(*words, "training.max_steps=6", tune="lora"))
    embeddings = runner.model.get_input_embeddings().weight
    embeddings.data[NAN_TOKEN] = math.nan
    runner.data_collator = Poisoned(runner.data_collator, "row-5")
    with pytest.raises(ValueError, match="'row-5' ") as stopped:
        runner.train()
    message = str(stopped.value)
    assert "got a gradient norm of nan in step" in message
    assert "of the largest loss first: 'row-5' (loss nan), 'row-" in message
    assert message.count("(loss ") == 4 * accumulate
    assert all(p.isfinite().all() for p in runner.model.parameters() if p.requires_grad)
    step = runner.state.global_step
    last = f"{Path(runner.args.output_dir) / f'checkpoint-{step}'} is whole"
    assert (last if step else "there is no checkpoint yet") in message


def test_a_gradient_beyond_the_limit_stops_the_run(recipe, trainer):
    runner = trainer(recipe("tune.gradient_norm_limit=1e-6", "training.save_strategy=no"))
    start = {n: p.detach().clone() for n, p in runner.model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="in step 1, expected at most 1e-06; its rows"):
        runner.train()
    for name, value in runner.model.named_parameters():
        assert name not in start or torch.equal(value, start[name])


def test_a_gradient_within_the_limit_does_not(recipe, trainer):
    runner = trainer(recipe("tune.gradient_norm_limit=1e6", "training.max_grad_norm=0"))
    runner.train()
    assert runner.state.global_step == 4


@pytest.mark.parametrize("packed", [False, True])
def test_rows_have_the_losses_that_they_have_alone(recipe, trainer, packed: bool):
    runner = trainer(recipe())
    samples = [runner.train_dataset[i] for i in range(5)]
    given = [samples[:3], samples[3:]] if packed else samples
    batch = NamingCollator(runner.data_collator)(given)
    ids = batch.pop("ids")
    assert ids == [sample["id"] for sample in samples]
    found = row_losses(runner.model, ids, batch)
    for (name, loss), sample in zip(found, samples, strict=True):
        with torch.no_grad():
            alone = runner.model.eval()(**runner.data_collator([sample])).loss.item()
        assert (name, loss) == (sample["id"], pytest.approx(alone, abs=1e-5))
