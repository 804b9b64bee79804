"""What packing saves: conversations that share a row against padded batches, plain and by length.

    python benchmarks/packing.py

Rows are as long as LLaVA-Instruct's, with and without rows of text alone among them. The share of
tokens that are no padding is counted over an epoch. Steps of a Phi of reduced size (LoRA and
projector learn, as in stage 2; pictures come as cached features) are timed on the CPU, each way of
making batches in a process of its own, turn about. A table comes on stdout, and one line of JSON
last.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import datasets
import numpy as np
import torch
from instruct_rows import INSTRUCT, Kind, make_rows, spare_words, word_processor
from measuring import Worker, peak_of, seconds_of
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, PhiConfig

from modeling_phi_mm import PhiMMConfig, PhiMMForConditionalGeneration
from phi_mm.assembly import LORA_TARGETS
from phi_mm.training.sampler import LengthGroupedSampler, PackingSampler, row_lengths
from processing import PhiMMCollator, PhiMMProcessor

# ShareGPT's 40,688 rows beside LLaVA's 157,712 in LLaVA-1.5's mixture (haotian-liu/LLaVA#702). How
# long they are is assumed: half a page an answer, one to eight answers.
TEXT_SHARE = 40_688 / (40_688 + 157_712)
TEXT = tuple(Kind(1, turns, (30, 15), (150, 40)) for turns in (1, 2, 4, 8))
MAX_LENGTH = 2048  # of a conversation
FEATURES = 64  # width of the cached features of a picture
CPU = torch.device("cpu")
WAYS = ("plain", "by length", "packed")
Batch = list[int] | list[list[int]]  # numbers of rows, or of rows that share one


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        rows: of an epoch.
        batch: conversations in a padded batch.
        packed_length: tokens of the one row of a packed batch: about as many.
        rounds: steps of each way that are timed.
    """

    width: int
    layers: int
    vocabulary: int
    rows: int
    batch: int
    packed_length: int
    rounds: int


# Phi-2 at a fifth of its width, and of its vocabulary.
FULL = Size(512, 2, 10_240, rows=10_000, batch=8, packed_length=6144, rounds=5)
QUICK = Size(64, 1, 512, rows=200, batch=4, packed_length=3072, rounds=1)


@dataclass(frozen=True)
class Measured:
    """What one way of making batches gave.

    Attributes:
        tokens: of a batch, without padding.
        share: of tokens that are no padding, over an epoch.
        seconds: of a step, forward and backward; as `tokens_per_second` a median.
        peak_mb: what a step takes with the largest batch of the epoch.
    """

    tokens: float
    share: float
    seconds: float
    tokens_per_second: float
    peak_mb: float


class Pictures:
    """In the place of the cache of tower outputs: all pictures are the same noise."""

    def __init__(self, patches: int):
        self.features = torch.randn(patches, FEATURES, generator=torch.Generator().manual_seed(0))

    def image(self, source: str) -> torch.Tensor:
        """(P, C), whatever the picture."""
        return self.features


class Trial:
    """A model of random weights with a data set."""

    def __init__(self, size: Size, processor: PhiMMProcessor, rows: datasets.Dataset):
        text = PhiConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=4 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.width // 64,
            bos_token_id=processor.tokenizer.eos_token_id,
            eos_token_id=processor.tokenizer.eos_token_id,
        )
        tower = {"hidden_size": FEATURES, "intermediate_size": FEATURES, "num_attention_heads": 1}
        vision = CLIPVisionConfig(num_hidden_layers=2, image_size=336, patch_size=14, **tower)
        torch.manual_seed(0)
        model = PhiMMForConditionalGeneration(
            PhiMMConfig(
                text_config=text, vision_config=vision, image_token_id=processor.image_token_id
            )
        )
        projector = ["multi_modal_projector"]
        lora = LoraConfig(r=16, target_modules=LORA_TARGETS["phi"], modules_to_save=projector)
        self.model = get_peft_model(model, lora).train()
        self.rows = rows
        pictures = Pictures(processor.num_image_tokens)
        self.collator = PhiMMCollator(processor, pictures, MAX_LENGTH, size.packed_length)

    def step(self, batch: Batch) -> float:
        """Seconds of a step."""
        inputs = self._inputs(batch)
        return seconds_of(lambda: self._step(inputs), CPU)

    def peak(self, batch: Batch) -> float:
        """Megabytes that a step takes."""
        inputs = self._inputs(batch)
        return peak_of(lambda: self._step(inputs), CPU)

    def differences(self, batch: list[list[int]]) -> dict[str, float]:
        """The same rows packed and not: relative differences of loss and gradients."""
        losses, gradients = [], []
        for given in (batch, [row for together in batch for row in together]):
            losses.append(self._step(self._inputs(given)))
            learning = [weight for weight in self.model.parameters() if weight.requires_grad]
            gradients.append(torch.cat([weight.grad.flatten() for weight in learning]))
        apart = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
        return {
            "loss_difference": abs(losses[0] - losses[1]) / losses[1],
            "gradient_difference": apart.item(),
        }

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        together = [self.rows.__getitems__(item) for item in batch if isinstance(item, list)]
        return self.collator(together or self.rows.__getitems__(batch))

    def _step(self, inputs: dict[str, torch.Tensor]) -> float:
        self.model.zero_grad()
        loss = self.model(**inputs).loss
        loss.backward()
        return loss.item()


def make_data(size: Size, text_share: float, seed: int) -> datasets.Dataset:
    """Rows of LLaVA-Instruct, a share of them replaced by text alone."""
    alone = round(text_share * size.rows)
    words = spare_words(size.vocabulary)
    rows = make_rows(INSTRUCT, ["picture"] * (size.rows - alone), words, seed)
    for row in make_rows(TEXT, ["none"] * alone, words, seed + 1):
        del row["messages"][0]["content"][0]
        rows.append(row)
    features = datasets.Features({"messages": datasets.Json()})
    written = [{"messages": json.dumps(row["messages"])} for row in rows]
    return datasets.Dataset.from_generator(lambda: iter(written), features=features)


def batches(way: str, lengths: Sequence[int], size: Size, seed: int) -> list[Batch]:
    """The batches of an epoch."""
    if way == "packed":
        return [[together] for together in PackingSampler(lengths, size.packed_length, seed)]
    rows = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    if way == "by length":
        rows = list(LengthGroupedSampler(lengths, size.batch, seed))
    return [rows[start : start + size.batch] for start in range(0, len(rows), size.batch)]


def tokens(batch: Batch, lengths: Sequence[int]) -> tuple[int, int]:
    """Tokens of a batch without padding, and with it."""
    rows = [item if isinstance(item, list) else [item] for item in batch]
    sums = [sum(lengths[row] for row in together) for together in rows]
    return sum(sums), len(sums) * max(sums)


def compare(name: str, text_share: float, size: Size, seed: int) -> dict:
    """All ways on one data set."""
    processor = word_processor(size.vocabulary, 336, 576)
    rows = make_data(size, text_share, seed)
    lengths = row_lengths(rows, processor, MAX_LENGTH)
    made = {way: batches(way, lengths, size, seed) for way in WAYS}
    workers = {way: Worker(Trial, size, processor, rows) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(size.rounds + 1):
        for way, worker in workers.items():
            _tell(f"{name}: {way}, step {number} of {size.rounds}")
            seconds[way].append(worker.call("step", made[way][number]))
    measured = {}
    for way, worker in workers.items():
        counts = [tokens(batch, lengths) for batch in made[way]]
        largest = max(made[way], key=lambda batch: tokens(batch, lengths)[1])
        timed = list(zip(counts, seconds[way], strict=False))[1:]  # the first step warms up
        measured[way] = Measured(
            tokens=statistics.mean(real for real, _ in counts),
            share=sum(real for real, _ in counts) / sum(padded for _, padded in counts),
            seconds=statistics.median(took for _, took in timed),
            tokens_per_second=statistics.median(real / took for (real, _), took in timed),
            peak_mb=worker.call("peak", largest),
        )
    differences = workers["packed"].call("differences", made["packed"][0])
    for worker in workers.values():
        worker.close()
    packed, plain, grouped = measured["packed"], measured["plain"], measured["by length"]
    return {
        "data": name,
        "mean_length": statistics.mean(lengths),
        "ways": {way: asdict(one) for way, one in measured.items()},
        "speed_ratio": packed.tokens_per_second / plain.tokens_per_second,
        "speed_ratio_by_length": packed.tokens_per_second / grouped.tokens_per_second,
        "memory_ratio": packed.peak_mb / plain.peak_mb,
        **differences,
    }


def table(compared: list[dict]) -> str:
    """The comparison for people."""
    lines = []
    for one in compared:
        lines += [
            f"\n{one['data']}: {one['mean_length']:.0f} tokens a row",
            f"{'batches':>10} {'tokens':>7} {'not padding':>12} {'step, s':>8} {'tokens/s':>9} "
            f"{'peak, MB':>9}",
        ]
        for name, way in one["ways"].items():
            lines.append(
                f"{name:>10} {way['tokens']:7.0f} {way['share']:12.3f} {way['seconds']:8.2f} "
                f"{way['tokens_per_second']:9.0f} {way['peak_mb']:9.0f}"
            )
        lines += [
            f"packed: {one['speed_ratio']:.2f}x the speed of plain batches, "
            f"{one['speed_ratio_by_length']:.2f}x of those by length; "
            f"{one['memory_ratio']:.2f}x the memory of the largest plain batch",
            f"the same rows: loss differs by {one['loss_difference']:.1e} of itself, gradients by "
            f"{one['gradient_difference']:.1e}",
        ]
    return "\n".join(lines)


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of rows and batches (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs")
    given = parser.parse_args()
    size = QUICK if given.quick else FULL
    mixtures = {"LLaVA-Instruct": 0.0, "LLaVA-Instruct and text alone": TEXT_SHARE}
    compared = [compare(name, share, size, given.seed) for name, share in mixtures.items()]
    print(table(compared))
    ratios = {name: compared[0][name] for name in ("speed_ratio", "memory_ratio")}
    print(json.dumps({"compared": compared, **ratios}))


if __name__ == "__main__":
    main()
