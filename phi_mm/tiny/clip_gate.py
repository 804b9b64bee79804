"""Measures the tiny CLIP on pictures of colour-shape pairs that it never met, writes the report."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from phi_mm.tiny.clip_training import COLOUR_NAMES, UNNAMED, merge
from phi_mm.tiny.drawing import draw_placed
from phi_mm.tiny.scenes import SEEN_PAIRS, SHAPES, SIZES, caption, sample_scene

FEATURE_LAYER = -2  # what phi-mm reads (vision_feature_layer)
BAR = 0.97
PROBE_PICTURES = 5000
UNNAMED_SHARE = 0.3
RETRIEVAL = 500
ATTRIBUTES = {"colour": len(COLOUR_NAMES), "shape": len(SHAPES), "size": len(SIZES)}


@dataclass(frozen=True)
class Reading:
    """Features and labels of things, one row a thing."""

    cells: Tensor  # (T, 512) merged cell that holds the thing's centre
    labels: dict[str, Tensor]  # by attribute, each (T,)
    offset: Tensor  # (T, 2) centre within its cell, 0..1
    held_out: Tensor  # (T,) bool: of a pair that no training picture shows
    empty_cells: Tensor  # (E, 512) cells that hold no centre

    def only(self, keep: Tensor) -> "Reading":
        """The things that `keep` (bool, (T,)) marks."""
        return Reading(
            self.cells[keep],
            {name: label[keep] for name, label in self.labels.items()},
            self.offset[keep],
            self.held_out[keep],
            self.empty_cells,
        )


@torch.no_grad()
def features(model: CLIPModel, processor: CLIPProcessor, images: list) -> Tensor:
    """Layer -2 patch features without the class token. (B, 36, 128)"""
    parts = []
    for start in range(0, len(images), 250):
        pixels = processor(images=images[start : start + 250], return_tensors="pt")["pixel_values"]
        states = model.vision_model(pixels, output_hidden_states=True).hidden_states
        parts.append(states[FEATURE_LAYER][:, 1:])
    return torch.cat(parts)


def read(
    model: CLIPModel,
    processor: CLIPProcessor,
    split: str,
    pictures: int,
    seed: int,
    unnamed_share: float = 0.0,
) -> Reading:
    """Draws pictures of a split (1 to 4 things each) and reads every thing in them."""
    rng = Random(f"tiny-clip gate {split} {seed} {unnamed_share}")
    images, rows, offsets = [], [], []
    for index in range(pictures):
        scene = sample_scene(rng, split)
        unnamed = rng.random() < unnamed_share
        drawing = draw_placed(scene, rng, unnamed)
        images.append(drawing.image)
        for thing, (x, y) in zip(scene.things, drawing.centres, strict=True):
            colour = UNNAMED if unnamed else COLOUR_NAMES.index(thing.colour)
            held_out = not unnamed and thing.pair not in SEEN_PAIRS
            shape, size = SHAPES.index(thing.shape), SIZES.index(thing.size)
            rows.append((index, thing.place, colour, shape, size, held_out))
            offsets.append((x % 16 / 16, y % 16 / 16))
    picture, place, colour, shape, size, held_out = torch.tensor(rows).T
    cells = merge(features(model, processor, images))
    empty = torch.ones(cells.shape[:2], dtype=torch.bool)
    empty[picture, place] = False
    return Reading(
        cells[picture, place],
        {"colour": colour, "shape": shape, "size": size},
        torch.tensor(offsets),
        held_out.bool(),
        cells[empty],
    )


@dataclass(frozen=True)
class Probe:
    """A linear softmax reader of standardised features."""

    mean: Tensor
    spread: Tensor
    linear: nn.Linear

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """Share of rows of x (T, K) whose label in y (T,) is read."""
        guess = self.linear((x - self.mean) / self.spread).argmax(1)
        return (guess == y).float().mean().item()


def fit_probe(x: Tensor, y: Tensor, classes: int, epochs: int = 30) -> Probe:
    """AdamW on mini-batches of 256 at rate 3e-3 falling to 0; rows labelled UNNAMED are skipped."""
    x, y = x[y != UNNAMED], y[y != UNNAMED]
    mean, spread = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / spread
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=3e-3, weight_decay=0.01)
    steps = epochs * (len(x) // 256 + 1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        pick = torch.randint(len(x), (256,), generator=generator)
        F.cross_entropy(linear(x[pick]), y[pick]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return Probe(mean, spread, linear)


def fit_probes(reading: Reading) -> dict[str, Probe]:
    """One probe an attribute."""
    return {
        name: fit_probe(reading.cells, reading.labels[name], n) for name, n in ATTRIBUTES.items()
    }


def position_error(train: Reading, held: Reading) -> float:
    """Mean distance (pixels) between true and linearly read centres within a 16-pixel cell."""
    x = torch.cat([train.cells, torch.ones(len(train.cells), 1)], 1)
    weights = torch.linalg.lstsq(x, train.offset).solution
    y = torch.cat([held.cells, torch.ones(len(held.cells), 1)], 1) @ weights
    return 16 * (y - held.offset).norm(dim=1).mean().item()


@torch.no_grad()
def retrieval(model: CLIPModel, processor: CLIPProcessor, split: str, seed: int) -> list[float]:
    """Share of pictures whose own caption comes first of RETRIEVAL, and the other way round."""
    rng = Random(f"tiny-clip retrieval {split} {seed}")
    scenes = [sample_scene(rng, split) for _ in range(RETRIEVAL)]
    images = [draw_placed(scene, rng).image for scene in scenes]
    texts = [caption(scene) for scene in scenes]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    scores = model(**inputs).logits_per_image
    target = torch.arange(RETRIEVAL)
    return [(scores.argmax(d) == target).float().mean().item() for d in (1, 0)]


def measure(checkpoint: Path, seed: int, things: int) -> dict[str, Any]:
    """The gate of a saved checkpoint: metric rows {name, value, n, split} and whether it passes.

    Linear probes are trained on frozen layer -2 features of train-split pictures, once on pictures
    in named colours only ("naive") and once with some in unnamed colours, and read at least
    `things` things of pairs that neither the checkpoint nor the probes have met.
    """
    model = CLIPModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(checkpoint)
    naive = read(model, processor, "train", PROBE_PICTURES, seed)
    mixed = read(model, processor, "train", PROBE_PICTURES, seed, UNNAMED_SHARE)
    probes = {
        "naive probe": fit_probes(naive),
        "probe with unnamed colours": fit_probes(mixed),
    }
    presence = _presence_probe(naive)
    rows, lowest = [], dict.fromkeys(probes, 1.0)
    for split in ("validation", "test"):
        every = read(model, processor, split, things, seed)
        unseen = every.only(every.held_out)
        for kind, part in (("unseen", unseen), ("seen", every.only(~every.held_out))):
            for title, by_attribute in probes.items():
                accuracies = accuracy_rows(by_attribute, part, f"{kind} pairs, {title}", split)
                rows += accuracies
                if kind == "unseen":
                    worst = min(row["value"] for row in accuracies)
                    lowest[title] = min(lowest[title], worst)
        x = torch.cat([unseen.cells, every.empty_cells])
        y = torch.arange(len(x)) < len(unseen.cells)
        rows.append(_row("thing or nothing", presence.accuracy(x, y.long()), len(x), split))
        error = position_error(naive, unseen)
        rows.append(_row("position error in pixels", error, len(unseen.cells), split))
        to_caption, to_picture = retrieval(model, processor, split, seed)
        rows.append(_row(f"caption of a picture, of {RETRIEVAL}", to_caption, RETRIEVAL, split))
        rows.append(_row(f"picture of a caption, of {RETRIEVAL}", to_picture, RETRIEVAL, split))
    passed = min(lowest.values()) >= BAR
    return {"bar": BAR, "passed": passed, "lowest": lowest, "metrics": rows}


def accuracy_rows(
    probes: dict[str, Probe], part: Reading, title: str, split: str
) -> list[dict[str, Any]]:
    """One metric row an attribute."""
    return [
        _row(
            f"{name}, {title}",
            probe.accuracy(part.cells, part.labels[name]),
            len(part.cells),
            split,
        )
        for name, probe in probes.items()
    ]


def _presence_probe(reading: Reading) -> Probe:
    nothing = reading.empty_cells[: len(reading.cells)]
    x = torch.cat([reading.cells, nothing])
    y = torch.arange(len(x)) < len(reading.cells)
    return fit_probe(x, y.long(), 2)


def _row(name: str, value: float, n: int, split: str) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "n": n, "split": split}


README = """# tiny-clip

A `CLIPModel` of {weights:,} weights, trained from scratch on drawn scenes of coloured shapes
(48x48 pixels, patches of 8). Built by `phi-mm tiny build-bases`, seed {seed}, {steps} steps.

It was trained so that layer -2 patch features say which shape, colour and size lies in which of
the 3x3 places: each place's features are contrasted with the text tower's phrases ("a red shape",
"a heart"), whole pictures with captions. Nine of the 48 colour-shape pairs were in no training
picture, caption or probe; "unseen pairs" below are only those.

Gate: colour, shape and size of unseen pairs read linearly from the frozen features at
{bar:.0%} or better by both probes: **{verdict}**. Lowest of all:
{lowest}.
The naive probe is a linear softmax trained on seen pairs in named colours; the other one also
met pictures in unnamed colours.

| measured | value | n | split |
|---|---|---|---|
{table}

It knows scenes of this kind only and is not meant for photographs.
"""


def write_report(out: Path, gate: dict[str, Any], seed: int, steps: int) -> None:
    """gate.json and README.md of the checkpoint."""
    (out / "gate.json").write_text(json.dumps(gate, indent=1) + "\n")
    table = [
        f"| {r['name']} | {r['value']:.4f} | {r['n']} | {r['split']} |" for r in gate["metrics"]
    ]
    weights = CLIPModel.from_pretrained(out).num_parameters()
    text = README.format(
        weights=weights,
        seed=seed,
        steps=steps,
        bar=gate["bar"],
        verdict="passed" if gate["passed"] else "not passed",
        lowest=", ".join(f"{value:.2%} by the {name}" for name, value in gate["lowest"].items()),
        table="\n".join(table),
    )
    (out / "README.md").write_text(text)
