"""What the cache of tower outputs saves in a training step, how quick its reader is, and what its
smaller forms change.

python benchmarks/feature_cache.py --run runs/demo/stage2

1. A training step in both stages with live and with cached inputs, turn about: towers of the real
   shapes with random weights before the first layers of a Phi-2 with random weights. Two numbers of
   layers give the time of one, and by it the step of the whole Phi-2.
2. The reader alone, checksums included, from an emptied and a filled page cache, against a raw
   sequential read of the same file from the disk.
3. With --run, the logits of a trained run on its validation rows with features as float16 and int8.

A table comes on stdout, and one line of JSON last.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from cache_models import SHAPES, TOY, Shape, build, write_rows
from cache_reader import STORED, checksums, reader, reader_table
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from phi_mm.assembly import load_run
from phi_mm.datasets import mixture
from phi_mm.features import fill_cache, open_cache
from phi_mm.features.storage import STORAGES
from phi_mm.recipes import load_recipe
from phi_mm.training import by_modality
from processing import PhiMMCollator, PhiMMProcessor

PHI_2_LAYERS = 32
BATCH = 16  # rows, where logits are compared
STAGES = ("1: projectors", "2: LoRA")


@dataclass(frozen=True)
class Step:
    """One stage of one tower; seconds are of a whole batch.

    Attributes:
        live_input: opening and preparing the files, and the tower.
        cached_input: the collator with the cache.
        live, cached: the whole training step with `layers` layers of a Phi-2.
        layer: one layer's part in it.
    """

    tower: str
    stage: str
    rows: int
    tokens: int
    layers: int
    live_input: float
    cached_input: float
    live: float
    cached: float
    layer: float

    def summary(self) -> dict:
        """The numbers and how often quicker the cached way is."""
        rest = (PHI_2_LAYERS - self.layers) * self.layer
        whole = (self.live + rest) / (self.cached + rest)
        ratios = {"speed_ratio": self.live / self.cached, "whole_phi_2_speed_ratio": whole}
        return asdict(self) | {"input_speed_ratio": self.live_input / self.cached_input} | ratios


def steps(shape: Shape, rows: int, rounds: int, folder: Path) -> list[dict]:
    """Both stages of one tower."""
    model, processor = build(shape)
    samples = write_rows(folder, shape, rows)
    cache = open_cache(folder / "features", model.model, processor)
    fill_cache(cache, model.model, processor, [samples])
    collators = {"live": PhiMMCollator(processor), "cached": PhiMMCollator(processor, cache)}
    measured = []
    for stage in STAGES:
        model = shape.adapt(model, lora=stage == STAGES[1])
        measured.append(_stage(model, shape, stage, collators, samples, rounds).summary())
    return measured


def _stage(
    model: PreTrainedModel | PeftModel,
    shape: Shape,
    stage: str,
    collators: dict[str, PhiMMCollator],
    samples: list[dict],
    rounds: int,
) -> Step:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    language = base.model.language_model
    layers = language.layers
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-5)
    model.train()

    def step(way: str, depth: int) -> None:
        language.layers = layers[:depth]
        model(**collators[way](samples)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ways = {
        "live_input": lambda: _features(base, collators["live"](samples)),
        "cached_input": lambda: collators["cached"](samples),
        "live": lambda: step("live", len(layers)),
        "cached": lambda: step("cached", len(layers)),
        "shallow": lambda: step("cached", len(layers) - 1),
    }
    took = turn_about(ways, rounds, f"{shape.name}, stage {stage}")
    language.layers = layers
    tokens = collators["cached"](samples)["input_ids"].numel()
    layer = max(took["cached"] - took.pop("shallow"), 0.0)
    return Step(shape.name, stage, len(samples), tokens, len(layers), **took, layer=layer)


@torch.no_grad()
def _features(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if "pixel_values" in batch:
        return model.model.get_vision_features(batch["pixel_values"])
    return model.model.get_audio_tower_features(batch["input_features"])


def turn_about(ways: dict[str, Callable[[], object]], rounds: int, what: str) -> dict[str, float]:
    """Median seconds of each way; the first round of each is not counted."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in tqdm(range(rounds + 1), what):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if number:
                took[name].append(time.perf_counter() - begun)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


# What smaller forms change


@torch.no_grad()
def logit_errors(
    model: PreTrainedModel | PeftModel,
    processor: PhiMMProcessor,
    rows: dict[str, Sequence[dict]],
    folder: Path,
) -> list[dict]:
    """Logits at the supervised positions with cached features, against those with live towers.

    Args:
        rows: {kind: data set}, as `by_modality` gives them; text alone is passed over.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    told = []
    for kind, some in rows.items():
        if kind == "text":
            continue
        samples = [some[i] for i in range(len(some))]
        live, live_loss = _answers(model, PhiMMCollator(processor), samples)
        for storage in STORAGES:
            cache = open_cache(folder / storage, base.model, processor, storage)
            fill_cache(cache, base.model, processor, [samples])
            cached, loss = _answers(model, PhiMMCollator(processor, cache), samples)
            difference = (cached - live).abs()
            told.append(
                {
                    "rows": kind,
                    "storage": storage,
                    "tokens": len(live),
                    "largest": difference.max().item(),
                    "mean": difference.mean().item(),
                    "deviation_of_logits": live.std().item(),
                    "same_token": (cached.argmax(-1) == live.argmax(-1)).float().mean().item(),
                    "loss": loss,
                    "live_loss": live_loss,
                }
            )
    return told


def _answers(
    model: PreTrainedModel, collator: PhiMMCollator, samples: list[dict]
) -> tuple[torch.Tensor, float]:
    """Logits at the supervised positions (positions, V), and the loss over all of them."""
    logits, losses = [], []
    for start in range(0, len(samples), BATCH):
        outputs = model(**collator(samples[start : start + BATCH]))
        logits.append(outputs.logits)
        losses.append(outputs.loss * len(outputs.logits))
    together = torch.cat(logits)
    return together, (sum(losses) / len(together)).item()


def errors_of_run(run: Path, limit: int, folder: Path) -> list[dict]:
    """`logit_errors` on the validation rows of a trained run."""
    model, processor = load_run(run)
    validation = mixture(load_recipe(run / "recipe.yaml").data.validation, seed=0)
    validation = validation.select(range(min(limit, len(validation))))
    return logit_errors(model, processor, by_modality(validation), folder)


def errors_of_toy(folder: Path) -> list[dict]:
    """`logit_errors` of random weights: shows that it runs."""
    model, processor = build(TOY)
    samples = write_rows(folder / "rows", TOY, 2)
    return logit_errors(model.eval(), processor, {"image": samples}, folder)


def table(told: dict) -> str:
    """The results for people."""
    lines = [
        f"{'tower':<14}{'stage':<15}{'rows':>5} | {'input of a batch, s':^24} | "
        f"{'step, s':^24} | {'whole Phi-2':>11}",
        f"{'':>34} | {'live':>7} {'cached':>7} {'ratio':>8} | "
        f"{'live':>7} {'cached':>7} {'ratio':>8} | {'ratio':>11}",
    ]
    for row in told["steps"]:
        lines.append(
            f"{row['tower']:<14}{row['stage']:<15}{row['rows']:>5} | {row['live_input']:7.3f} "
            f"{row['cached_input']:7.4f} {row['input_speed_ratio']:7.1f}x | {row['live']:7.2f} "
            f"{row['cached']:7.2f} {row['speed_ratio']:7.2f}x | "
            f"{row['whole_phi_2_speed_ratio']:10.3f}x"
        )
    lines += ["", *reader_table(told["reader"])]
    each = ", ".join(f"{name} {took:.2f} ms" for name, took in told["checksum_ms"].items())
    lines.append(f"checksum of 1.18 MB: {each}")
    if told["logits"]:
        lines.append(
            f"\n{'rows':<13}{'kept as':<9}{'tokens':>7} | {'logits differ, most':>19} "
            f"{'mean':>8} | {'their deviation':>15} | {'same first token':>16} | {'loss':>7} "
            f"{'live':>7}"
        )
    for row in told["logits"]:
        lines.append(
            f"{row['rows']:<13}{row['storage']:<9}{row['tokens']:>7,} | {row['largest']:19.2g} "
            f"{row['mean']:8.1g} | {row['deviation_of_logits']:15.2f} | "
            f"{row['same_token']:16.2%} | {row['loss']:7.4f} {row['live_loss']:7.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--run", type=Path, help="a trained run, for the errors of its logits")
    parser.add_argument("--limit", type=int, default=200, help="rows for that (%(default)s)")
    parser.add_argument("--rows", type=int, default=1, help="in a training step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median (%(default)s)")
    parser.add_argument("--size", type=int, default=512, help="MB for the reader (%(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (a temporary one)")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs")
    given = parser.parse_args()
    rounds, megabytes = (1, 8) if given.quick else (given.rounds, given.size)
    told: dict = {"checksum_ms": checksums(), "steps": [], "reader": [], "logits": []}
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        folder = Path(scratch)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the worker of a data loader
        for stored in STORED:
            told["reader"].append(reader(*stored, megabytes << 20, rounds, folder / "reader"))
        torch.set_num_threads(threads)
        for shape in (TOY,) if given.quick else SHAPES:
            told["steps"] += steps(shape, given.rows, rounds, folder / shape.name.replace("/", "-"))
        if given.run:
            told["logits"] = errors_of_run(given.run, given.limit, folder / "errors")
        elif given.quick:
            told["logits"] = errors_of_toy(folder / "errors")
    print(table(told))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
