"""Batches and losses that train the tiny CLIP: region phrases and captions."""

import math
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from phi_mm.tiny.drawing import CELLS, SIZE, draw_placed
from phi_mm.tiny.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    pairs_allowed,
    split_of,
)

# Shapes: B pictures, T things in them, N = 36 patches, D = 128 width, M = 4 * D merged width,
# C = 9 merged cells, which are the 9 places of a picture.

MEAN = (0.76, 0.75, 0.75)  # near those of drawn pictures; saved in preprocessor_config.json
STD = (0.2, 0.2, 0.2)
COLOUR_NAMES = tuple(COLOURS)
UNNAMED = -1  # colour label of a thing whose colour has no name
CAPTION_THINGS = 3  # a caption names at most so many things of its picture
PHRASES = (
    *(f"a {colour} shape" for colour in COLOUR_NAMES),
    *(f"a {shape}" for shape in SHAPES),
    *(f"a {size} shape" for size in SIZES),
    "a shape",
    "nothing",
)
PHRASE_GROUPS = (len(COLOUR_NAMES), len(SHAPES), len(SIZES), 2)


@dataclass(frozen=True)
class Mixture:
    """What a training batch is made of; see `make_batch`.

    `unnamed_share` is that of the pictures without a caption.
    """

    pictures: int = 64
    captions: int = 32
    max_things: int = 7
    unnamed_share: float = 0.5


@dataclass(frozen=True)
class Batch:
    """Pictures and what is known of each thing in them (index tensors of shape (T,))."""

    pixels: Tensor  # (B, 3, 48, 48), normalised
    picture: Tensor
    place: Tensor
    colour: Tensor  # UNNAMED where the colour has no name
    shape: Tensor
    size: Tensor
    offset: Tensor  # (T, 2) place of the centre in its cell, each in -1..1
    captions: list[str]  # of the first pictures of the batch


def to_pixels(images: list) -> Tensor:
    """PIL pictures of 48x48 to normalised floats (B, 3, 48, 48), as the saved processor does."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    scaled = stacked.permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (scaled - mean) / std


def sample_crowd(rng: Random, max_things: int) -> Scene:
    """A train-split scene of 1 to `max_things` (at most 9) things: more than any test scene has.

    The more things a picture holds, the more is learned from it.
    """
    pairs = sorted(pairs_allowed("train"))
    while True:
        places = sorted(rng.sample(range(len(PLACES)), rng.randint(1, max_things)))
        picked = ((*rng.choice(pairs), rng.choice(SIZES), place) for place in places)
        scene = Scene(tuple(Thing(shape, colour, size, p) for colour, shape, size, p in picked))
        if split_of(caption(scene)) == "train":
            return scene


def sample_caption(rng: Random, scene: Scene) -> str:
    """Train-split words for some of the scene's things, at most CAPTION_THINGS, in any order."""
    while True:
        count = rng.randint(1, min(len(scene.things), CAPTION_THINGS))
        text = caption(Scene(tuple(rng.sample(scene.things, count))))
        if split_of(text) == "train":
            return text


def make_batch(rng: Random, mixture: Mixture, freedom: float) -> Batch:
    """Fresh train-split pictures: crowded ones too; some have captions, some unnamed colours.

    `freedom` (0..1) says how far things leave the middles of their cells.
    """
    images, captions, rows, offsets = [], [], [], []
    for index in range(mixture.pictures):
        scene = sample_crowd(rng, mixture.max_things)
        told = index < mixture.captions
        unnamed = not told and rng.random() < mixture.unnamed_share
        drawing = draw_placed(scene, rng, unnamed, freedom=freedom)
        images.append(drawing.image)
        for thing, (x, y) in zip(scene.things, drawing.centres, strict=True):
            colour = UNNAMED if unnamed else COLOUR_NAMES.index(thing.colour)
            shape, size = SHAPES.index(thing.shape), SIZES.index(thing.size)
            rows.append((index, thing.place, colour, shape, size))
            row, column = divmod(thing.place, CELLS)
            offsets.append((_offset(x, column), _offset(y, row)))
        if told:
            captions.append(sample_caption(rng, scene))
    columns = torch.tensor(rows).T
    return Batch(to_pixels(images), *columns, torch.tensor(offsets), captions)


def _offset(coordinate: float, cell: int) -> float:
    """A pixel coordinate as -1..1 within its cell."""
    return 2 * (coordinate * CELLS / SIZE - cell) - 1


def merge(patches: Tensor) -> Tensor:
    """Each 2x2 of neighbouring patches side by side. (B, 36, D) -> (B, 9, 4 * D)"""
    batch, count, width = patches.shape
    side = math.isqrt(count)
    grid = patches.view(batch, side // 2, 2, side // 2, 2, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(batch, count // 4, 4 * width)


class RegionHeads(nn.Module):
    """What reads merged cells during training only; none of it is in the checkpoint."""

    def __init__(self, width: int, projection: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, projection)
        self.locate = nn.Linear(width, 2)
        self.log_scale = nn.Parameter(torch.tensor(math.log(12.0)))


def encode(model: CLIPModel, pixels: Tensor, whole: int) -> tuple[Tensor, Tensor]:
    """Layer -2 merged cells of all pictures, image embeddings of the first `whole`.

    The last layer, which phi-mm never runs, is only needed for the image embeddings.
    (B, 3, 48, 48) -> (B, 9, 4 * D), (whole, projection)
    """
    vision = model.vision_model
    hidden = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer in vision.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    last = vision.encoder.layers[-1](hidden[:whole], None)
    pooled = vision.post_layernorm(last[:, 0])
    return merge(hidden[:, 1:]), F.normalize(model.visual_projection(pooled), dim=-1)


def encode_text(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Unit-length text embeddings (len(texts), projection)."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    # No attention mask: the text tower is causal and pools at the first end of text,
    # so that padding behind it changes nothing.
    pooled = model.text_model(input_ids=tokens["input_ids"]).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


def region_loss(
    cells: Tensor, phrases: Tensor, batch: Batch, heads: RegionHeads, met: Tensor
) -> tuple[Tensor, Tensor]:
    """Each thing's cell against attribute phrases; every cell against "a shape" and "nothing".

    The mean of a cell's four patches is read, so that all four tell of the thing in the same
    directions and a reader of the merged cell finds it four times. Returns the weighted sum of
    all parts, and the shape part alone for the progress bar.

    met: (colours, shapes) bool, the pairs that training captions have named so far. A pair that
    no caption ever named is no evidence that the pair is impossible, so its phrase is not used as
    a negative: of a red thing nobody learns that it is not a heart, if red hearts were never met.
    """
    means = cells.unflatten(-1, (4, -1)).mean(2)
    embedded = F.normalize(heads.project(means), dim=-1)
    logits = heads.log_scale.exp() * embedded @ phrases.T
    by_colour, by_shape, by_size, by_presence = logits.split(PHRASE_GROUPS, dim=-1)
    at = (batch.picture, batch.place)
    named = batch.colour != UNNAMED
    may_be_colour = met.T[batch.shape[named]]
    may_be_shape = torch.where(named[:, None], met[batch.colour.clamp(min=0)], True)
    colour = F.cross_entropy(
        by_colour[at][named].masked_fill(~may_be_colour, -1e4), batch.colour[named]
    )
    shape = F.cross_entropy(by_shape[at].masked_fill(~may_be_shape, -1e4), batch.shape)
    size = F.cross_entropy(by_size[at], batch.size)
    empty = torch.ones(cells.shape[:2], dtype=torch.long)
    empty[at] = 0
    presence = F.cross_entropy(by_presence.flatten(0, 1), empty.flatten())
    offset = F.mse_loss(heads.locate(means[at]), batch.offset)
    return colour + 4 * shape + size + 0.5 * presence + 0.5 * offset, shape


def caption_loss(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """CLIP's symmetric contrast of pictures and their captions. (K, P), (K, P) -> scalar"""
    logits = log_scale.exp().clamp(max=100) * images @ texts.T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
