"""A training step of phi-mm against LLaVA of transformers: time, memory, and the same gradients.

    python benchmarks/train_step.py

LLaVA trains as its own scripts do: live towers, right-padded batches, its own grouping by length,
logits over every position, activation checkpointing. Then each of our differences alone is put into
it, and phi-mm has all of them. All have the same weights, rows and labels; pictures are prepared
and cached features read before the clock runs. Every way has a process of its own, and they take
turns. On a GPU phi-2's own size is measured as well (QLoRA). A table comes on stdout, and one line
of JSON last.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from instruct_rows import (
    CAPTIONS,
    INSTRUCT,
    Kind,
    alike_batches,
    llava_batches,
    make_rows,
    spare_words,
    word_processor,
    write_pictures,
)
from measuring import MEGABYTE, Worker, peak_of, seconds_of
from safetensors import numpy as arrays
from safetensors.torch import load_file, save_file
from train_step_models import SIZES, Size, Way, build, forward_work, loss_of, step_work

from processing import PhiMMCollator

BATCH, TOGETHER = 2, 4  # rows that are run at once, and of an optimiser step
WARM = 4  # words
LLAVA = Way("LLaVA")
ALONE = (
    Way("+ head on supervised positions", head=True),
    Way("+ no layer past the selected", layers=True),
    Way("+ frozen tower without graph", no_grad=True),
    Way("+ cached features", cached=True),
    Way("+ like lengths together", alike=True),
    Way("+ packing, masked", packed=True),
)
OURS = (
    Way("phi-mm, LLaVA's batches", ours=True),
    Way("phi-mm, packing", ours=True, packed=True),
    Way("phi-mm, packing, cached features", ours=True, packed=True, cached=True),
)
POOLED = Way("the same, image_pool 2 (another model)", ours=True, cached=True, packed=True, pool=2)
# Dense bfloat16 of the data sheets, in TFLOP a second.
PEAKS = {"A100": 312, "H100": 989, "H200": 989, "L4": 121, "L40S": 362, "3090": 71, "4090": 165}


@dataclass(frozen=True)
class Setting:
    """What is trained, on what, and how often.

    Attributes:
        stage: 1 trains the projector, 2 LoRA on the language model beside it.
        batch: rows that are run together.
        together: rows of one optimiser step.
        rounds: turns that each way has; medians are told.
    """

    size: Size
    kinds: tuple[Kind, ...]
    stage: int
    batch: int
    together: int
    rounds: int
    four_bit: bool
    checkpointing: bool
    device: str


@dataclass(frozen=True)
class Step:
    """What one optimiser step reads.

    Attributes:
        batches: run one after another.
        tokens: of all rows, without padding.
    """

    batches: list[dict[str, torch.Tensor]]
    tokens: int

    @property
    def padded_tokens(self) -> int:
        return sum(batch["input_ids"].numel() for batch in self.batches)

    @property
    def supervised_tokens(self) -> int:
        return sum(int((batch["labels"] != -100).sum()) for batch in self.batches)


class StoredFeatures:
    """Outputs of the vision tower by path, as `PhiMMCollator` asks for them."""

    def __init__(self, folder: Path):
        self.tensors = load_file(folder / "features.safetensors")

    def image(self, source: str) -> torch.Tensor:
        return self.tensors[Path(source).name]


class Encoder:
    """Writes what `StoredFeatures` reads."""

    def __init__(self, setting: Setting, pictures: list[str], folder: Path):
        device = torch.device(setting.device)
        model = build(OURS[0], setting.size, 1, setting.four_bit, False, device)
        processor = word_processor(setting.size.vocabulary, setting.size.side, 1)
        tensors = {}
        with torch.no_grad():
            for path in pictures:
                pixels = processor(images=path, return_tensors="pt")["pixel_values"].to(device)
                tensors[Path(path).name] = model.model.get_vision_features(pixels)[0].cpu()
        save_file(tensors, folder / "features.safetensors")


class Trial:
    """One way to train, ready for its steps.

    Args:
        pictures: one for each row of all rounds.
        folder: of the cached features; the gradients of the first step are written there.
    """

    def __init__(self, way: Way, setting: Setting, pictures: list[str], folder: Path):
        self.way, self.setting, self.folder = way, setting, folder
        self.device, size = torch.device(setting.device), setting.size
        self.model = build(
            way, size, setting.stage, setting.four_bit, setting.checkpointing, self.device
        )
        self.learning = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.learning.values(), lr=1e-5)
        processor = word_processor(size.vocabulary, size.side, size.patches // way.pool**2)
        collate = PhiMMCollator(processor, StoredFeatures(folder) if way.cached else None)
        rows = make_rows(setting.kinds, pictures, spare_words(size.vocabulary), seed=0)
        count = setting.together
        groups = [rows[start : start + count] for start in range(0, len(rows), count)]
        self.steps = [self._step(group, collate) for group in groups]

    def check(self) -> dict:
        """Loss, gradients and memory of the first step; tokens of the others."""
        batch = self.steps[0].batches[0]
        words = {name: batch[name][:1, -WARM:] for name in ("input_ids", "labels")}
        self._loss(words, 1).backward()  # what comes first takes memory to keep
        self.optimizer.zero_grad()
        peak = peak_of(lambda: self.backward(0), self.device)
        name = f"{self.way.name}.safetensors"
        gradients = {n: p.grad.float().cpu().contiguous() for n, p in self.learning.items()}
        save_file(gradients, self.folder / name)
        self._update()
        timed = self.steps[1:]
        return {
            "loss": self.loss,
            "gradients": name,
            "peak_mb": peak,
            "model_mb": sum(p.nbytes for p in self.model.parameters()) / MEGABYTE,
            "tokens": statistics.mean(step.tokens for step in timed),
            "padded_tokens": statistics.mean(step.padded_tokens for step in timed),
            "supervised_tokens": statistics.mean(step.supervised_tokens for step in timed),
        }

    def step(self, number: int) -> float:
        """Seconds of an optimiser step."""

        def whole() -> None:
            self.backward(number)
            self._update()

        return seconds_of(whole, self.device)

    def backward(self, number: int) -> None:
        """Adds up the gradients of a step, and its loss in `self.loss`."""
        step, self.loss = self.steps[number], 0.0
        for batch in step.batches:
            loss = self._loss(batch, step.supervised_tokens)
            loss.backward()
            self.loss += loss.item()

    def _loss(self, batch: dict[str, torch.Tensor], items: int) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, self.setting.four_bit):
            return loss_of(self.model, self.way, batch, items)

    def _step(self, rows: list[dict], collate: PhiMMCollator) -> Step:
        lengths = [collate([row])["input_ids"].shape[1] for row in rows]
        share_out = alike_batches if self.way.alike else llava_batches
        batches = []
        for numbers in share_out(lengths, self.setting.batch):
            chosen = [rows[number] for number in numbers]
            collated = collate([chosen] if self.way.packed else chosen)
            batches.append({name: value.to(self.device) for name, value in collated.items()})
        return Step(batches, sum(lengths))

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def compare(setting: Setting, ways: tuple[Way, ...]) -> dict:
    """All ways, turn about."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        count = setting.together * (setting.rounds + 1)
        pictures = write_pictures(folder, count, setting.size.side)
        Worker(Encoder, setting, pictures, folder).close()
        workers, rows = [], []
        for way in ways:
            _tell(f"stage {setting.stage}: first step of {way.name}")
            workers.append(Worker(Trial, way, setting, pictures, folder))
            rows.append({"way": way.name, **workers[-1].call("check")})
        taken: list[list[float]] = [[] for _ in ways]
        for number in range(1, setting.rounds + 1):
            for turn in range(len(ways)):
                place = (number + turn) % len(ways)
                _tell(f"stage {setting.stage}: round {number}, {ways[place].name}")
                taken[place].append(workers[place].call("step", number))
        for worker in workers:
            worker.close()
        _add_differences(rows, folder)
    for way, row, seconds in zip(ways, rows, taken, strict=True):
        row["seconds"] = statistics.median(seconds)
        row["phi_2_work"] = step_work(
            way, SIZES["phi-2"], row, setting.together, setting.checkpointing
        )
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        row["speed_ratio"] = rows[0]["seconds"] / row["seconds"]
        row["memory_ratio"] = row["peak_mb"] / rows[0]["peak_mb"]
        row["phi_2_work_ratio"] = rows[0]["phi_2_work"] / row["phi_2_work"]
    return {
        "stage": setting.stage,
        "title": _title(setting),
        "together": setting.together,
        "rows": rows,
    }


def _title(setting: Setting) -> str:
    learning = {1: "the projector", 2: "QLoRA" if setting.four_bit else "LoRA"}[setting.stage]
    kept = "checkpointed" if setting.checkpointing else "kept"
    return f"{learning} learns, {setting.together} rows a step, activations {kept}"


def _add_differences(rows: list[dict], folder: Path) -> None:
    """How far loss and gradients are from those of the first way, each as a share of its size."""
    first = arrays.load_file(folder / rows[0]["gradients"])
    for row in rows:
        own = arrays.load_file(folder / row.pop("gradients"))
        row["loss_difference"] = abs(row["loss"] / rows[0]["loss"] - 1)
        if all(own[name].shape == one.shape for name, one in first.items()):
            row["gradient_difference"] = max(
                float(np.linalg.norm(own[name] - one) / np.linalg.norm(one))
                for name, one in first.items()
            )


def shares(size: Size, tokens: int) -> dict[str, float]:
    """What share each part has in the multiplications of a forward pass over one row."""
    work = forward_work(size, tokens)
    return {name: part / sum(work.values()) for name, part in work.items()}


def utilisation(size: Size, row: dict, rows: int, peak: float) -> float:
    """What the language model's layers take of the device's peak (MFU): the multiplications of the
    forward pass, and of the backward pass through frozen weights; nothing twice, no padding.

    Args:
        rows: of a step.
        peak: operations a second.
    """
    work = forward_work(size, round(row["tokens"] / rows))
    return 2 * rows * (2 * work["layers"] + 3 * work["attention"]) / row["seconds"] / peak


def on_gpu(rounds: int, quick: bool) -> dict | None:
    """QLoRA at phi-2's size; None without a GPU."""
    if not torch.cuda.device_count():
        print("no GPU: QLoRA at phi-2's size was not measured")
        return None
    size, together = SIZES["toy" if quick else "phi-2"], 16
    setting = Setting(size, INSTRUCT, 2, 4, together, rounds, True, True, "cuda:0")
    told = compare(setting, (LLAVA, *OURS, POOLED))
    told["device"] = Worker(Device).call("name")
    peak = next((peak for name, peak in PEAKS.items() if name in told["device"]), None)
    for row in told["rows"] if peak else ():
        row["mfu"] = utilisation(size, row, together, peak * 1e12)
    return told


class Device:
    """The GPU, seen from a process of its own."""

    def name(self) -> str:
        return torch.cuda.get_device_name()


def table(told: dict) -> str:
    """One stage for people."""
    lines = [
        f"\nstage {told['stage']}: {told['title']}",
        f"{'':<38} {'s/step':>7} {'tokens/s':>8} {'speed':>6} {'peak MB':>8} {'memory':>6} "
        f"{'padding':>7} {'phi-2':>6} {'loss':>8} {'gradient':>8}",
    ]
    for row in told["rows"]:
        padding = 1 - row["tokens"] / row["padded_tokens"]
        gradient = row.get("gradient_difference")
        same = f"{row['loss_difference']:8.0e} {gradient:8.0e}" if gradient is not None else ""
        lines.append(
            f"{row['way']:<38} {row['seconds']:7.2f} {row['tokens_per_second']:8.0f} "
            f"{row['speed_ratio']:5.2f}x {row['peak_mb']:8.0f} {row['memory_ratio']:5.2f}x "
            f"{padding:7.1%} {row['phi_2_work_ratio']:5.2f}x {same}"
            + (f" MFU {row['mfu']:.1%}" if "mfu" in row else "")
        )
    return "\n".join(lines)


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (%(default)s)")
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of activations, as LLaVA's scripts have it (%(default)s)",
    )
    parser.add_argument("--gpu-only", action="store_true", help="leaves out what the CPU measures")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs")
    given = parser.parse_args()
    if given.gpu_only and not torch.cuda.device_count():
        parser.error("got --gpu-only, expected a GPU: leave the option out on this machine")
    size = SIZES["toy" if given.quick else "small"]
    rounds = 1 if given.quick else given.rounds
    common = {"four_bit": False, "checkpointing": given.checkpointing, "device": "cpu"}
    instruct = Setting(size, INSTRUCT, 2, BATCH, TOGETHER, rounds, **common)
    captions = Setting(size, CAPTIONS, 1, BATCH, TOGETHER, rounds, **common)
    measured = {
        "stages": []
        if given.gpu_only
        else [
            compare(instruct, (LLAVA, *ALONE, *OURS, POOLED)),
            compare(captions, (LLAVA, OURS[-1], POOLED)),
        ],
        "gpu": on_gpu(rounds, given.quick),
    }
    first, *others = [*measured["stages"], *filter(None, [measured["gpu"]])]
    tokens = round(first["rows"][0]["tokens"] / first["together"])
    for name in (given.quick and "toy" or "small", "phi-2"):
        told = {part: f"{share:.1%}" for part, share in shares(SIZES[name], tokens).items()}
        print(f"work of a row of {tokens} tokens, {name}: {told}")
    for told in (first, *others):
        print(table(told))
    ours, pooled = first["rows"][-2:]
    result = {
        "speed_ratio": ours["speed_ratio"],
        "memory_ratio": ours["memory_ratio"],
        "speed_ratio_image_pool_2": pooled["speed_ratio"],
        "size": asdict(size),
        **measured,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
