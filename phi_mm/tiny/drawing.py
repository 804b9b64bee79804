"""Draws scenes of the tiny world as small pictures: free placement, turned, antialiased, noisy."""

import math
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from phi_mm.tiny.scenes import COLOURS, Scene, Thing

SIZE = 48  # pixels a side; lengths below are in pixels of a picture of this size
SUPERSAMPLE = 4
CELLS = 3  # a picture is a 3x3 grid of labelled places
CELL_MARGIN = 1.0  # a centre keeps this far from its cell's border: its place is never in doubt
RADII = {"small": (3.8, 4.4), "large": (5.8, 6.3)}
MAX_TURN = math.radians(15)
COLOUR_JITTER = 10  # a named colour moves at most this far in each of R, G, B
UNNAMED_DISTANCE = 60.0  # RGB distance that an unnamed colour keeps from every named one
CONTRAST = 80.0  # least RGB distance between a thing and the background
LIGHT = 10.0  # strongest brightening or darkening by uneven light, at the edges of a picture
NOISE = 6.0  # standard deviation of the strongest per-pixel noise
PLACEMENT_TRIES = 30
SPACING = 0.95  # least distance of two centres, in sums of the circles around the things


@dataclass(frozen=True)
class Drawing:
    """A picture and, for each thing of its scene in order, where it was put.

    `centres` are (x, y) in pixels, `radii` the circles (pixels) that hold the things.
    """

    image: Image.Image
    centres: tuple[tuple[float, float], ...]
    radii: tuple[float, ...]


def _regular(corners: int, radius: float, inner: float | None = None) -> list[tuple[float, float]]:
    """Corner points of a regular polygon pointing up; with `inner`, of a star."""
    points = []
    count = corners if inner is None else 2 * corners
    for i in range(count):
        reach = radius if inner is None or i % 2 == 0 else inner
        angle = 2 * math.pi * i / count - math.pi / 2
        points.append((reach * math.cos(angle), reach * math.sin(angle)))
    return points


def _square(half: float) -> list[tuple[float, float]]:
    return [(-half, -half), (half, -half), (half, half), (-half, half)]


def _cross(reach: float, arm: float) -> list[tuple[float, float]]:
    quarter = [(arm, -arm), (reach, -arm), (reach, arm)]
    points = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return points


def _heart(scale: float) -> list[tuple[float, float]]:
    """The heart curve (16 sin^3 t, 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t), centred."""
    points = []
    for i in range(28):
        t = 2 * math.pi * i / 28
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((scale * x / 16, -scale * (y + 2.5) / 16))
    return points


def _arc(
    x: float, y: float, radius: float, start: float, end: float, points: int = 16
) -> list[tuple[float, float]]:
    """Points of a circle from one angle to another, in degrees."""
    angles = np.radians(np.linspace(start, end, points + 1)).tolist()
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


# Outlines for radius 1, scaled so that all shapes of one size look equally big.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(32, 1.0),
    "square": _square(0.92),
    "triangle": _regular(3, 1.25),
    "star": _regular(5, 1.25, inner=0.5),
    "cross": _cross(1.15, 0.38),
    "heart": _heart(1.12),
}
# Colours and shapes of training pictures alone. The more of them there are beside the named ones,
# the more a reader takes colour and shape for two things, and not for a list of pairs.
OTHER_COLOURS = {
    "brown": (125, 75, 35),
    "maroon": (120, 5, 50),
    "cyan": (0, 195, 215),
    "lime": (160, 235, 10),
    "violet": (150, 95, 240),
}
OTHER_OUTLINES = {
    "moon": _arc(0.1, 0.0, 1.2, 60, 300) + _arc(0.55, 0.0, 1.0, 275, 85),
    "arrow": [
        (0.0, -1.25), (1.05, -0.1), (0.4, -0.1), (0.4, 1.15), (-0.4, 1.15), (-0.4, -0.1),
        (-1.05, -0.1),
    ],
    "boat": [(-1.25, -0.2), (1.25, -0.2), (0.75, 0.7), (-0.75, 0.7)],
    "key": [
        (-0.4, -1.1), (0.4, -1.1), (0.4, -0.45), (0.2, -0.45), (0.2, 0.3), (0.65, 0.3),
        (0.65, 1.1), (-0.2, 1.1), (-0.2, -0.45), (-0.4, -0.45),
    ],
}  # fmt: skip
ALL_COLOURS = COLOURS | OTHER_COLOURS
ALL_OUTLINES = OUTLINES | OTHER_OUTLINES
REACH = {shape: max(math.hypot(x, y) for x, y in points) for shape, points in ALL_OUTLINES.items()}


def _named_colour(name: str, rng: Random) -> tuple[float, ...]:
    return tuple(
        min(255.0, max(0.0, c + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER)))
        for c in ALL_COLOURS[name]
    )


def _paper(rng: Random) -> tuple[float, ...]:
    """A light, muted background colour that stands off from every named colour."""
    while True:
        grey = rng.uniform(165, 245)
        paper = tuple(min(250.0, grey + rng.uniform(-14, 14)) for _ in range(3))
        if all(math.dist(paper, named) >= CONTRAST for named in COLOURS.values()):
            return paper


def _unnamed_colour(paper: tuple[float, ...], rng: Random) -> tuple[float, ...]:
    """A colour far from every named one that stands off from the background."""
    while True:
        colour = tuple(rng.uniform(0, 255) for _ in range(3))
        far = all(math.dist(colour, named) >= UNNAMED_DISTANCE for named in COLOURS.values())
        if far and math.dist(colour, paper) >= CONTRAST:
            return colour


def _place(
    things: tuple[Thing, ...], radii: list[float], rng: Random, freedom: float
) -> list[tuple[float, float]]:
    """Centres inside their cells, things inside the picture, none hiding another.

    Placements that collide are drawn again; each further try keeps closer to the cells' middles,
    where things are always apart, so that the search ends.
    """
    cell = SIZE / CELLS
    for attempt in range(PLACEMENT_TRIES + 1):
        room = freedom * (cell / 2 - CELL_MARGIN) * (1 - attempt / PLACEMENT_TRIES)
        centres = []
        for thing, radius in zip(things, radii, strict=True):
            row, column = divmod(thing.place, CELLS)
            centre = []
            for index in (column, row):
                middle = min(max((index + 0.5) * cell, radius), SIZE - radius)
                low = max((index + 0.5) * cell - room, radius)
                high = min((index + 0.5) * cell + room, SIZE - radius)
                centre.append(rng.uniform(low, high) if low < high else middle)
            centres.append((centre[0], centre[1]))
        apart = all(
            math.dist(centres[i], centres[j]) >= SPACING * (radii[i] + radii[j])
            for i in range(len(centres))
            for j in range(i)
        )
        if apart:
            return centres
    raise ValueError(
        f"got things {things} that overlap at their cells' middles, expected one a place"
    )


def _shade(pixels: np.ndarray, rng: Random) -> np.ndarray:
    """Uneven light on half of the pictures, then noise. (H, W, 3) uint8 -> (H, W, 3) uint8"""
    height, width, _ = pixels.shape
    noise = np.random.Generator(np.random.SFC64(rng.getrandbits(64)))
    shaded = noise.standard_normal(pixels.shape, dtype=np.float32)
    shaded *= rng.uniform(0.5, NOISE)
    shaded += pixels
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * math.pi)
        strength = rng.uniform(0, LIGHT)
        across = np.linspace(-1, 1, width, dtype=np.float32) * (strength * math.cos(angle))
        down = np.linspace(-1, 1, height, dtype=np.float32) * (strength * math.sin(angle))
        shaded += (down[:, None] + across[None, :])[:, :, None]
    return np.clip(shaded, 0, 255).astype(np.uint8)


def draw_placed(
    scene: Scene,
    rng: Random,
    unnamed_colours: bool = False,
    size: int = SIZE,
    freedom: float = 1.0,
) -> Drawing:
    """`draw`, telling where the things lie; `freedom` 0 puts them in the middles of their cells.

    unnamed_colours: each thing gets a random colour far from all named ones instead of its own,
    so that shape, size and place can be learned where no colour has a name. size: of the picture,
    pixels a side.

    Raises ValueError when two things of the scene share a place.
    """
    paper = _paper(rng)
    colours = [
        _unnamed_colour(paper, rng) if unnamed_colours else _named_colour(thing.colour, rng)
        for thing in scene.things
    ]
    scales = [rng.uniform(*RADII[thing.size]) for thing in scene.things]
    radii = [s * REACH[thing.shape] for s, thing in zip(scales, scene.things, strict=True)]
    centres = _place(scene.things, radii, rng, freedom)
    zoom = size * SUPERSAMPLE / SIZE
    ground = tuple(round(c) for c in paper)
    canvas = Image.new("RGB", (size * SUPERSAMPLE, size * SUPERSAMPLE), ground)
    pen = ImageDraw.Draw(canvas)
    for thing, colour, scale, (x, y) in zip(scene.things, colours, scales, centres, strict=True):
        turn = rng.uniform(-MAX_TURN, MAX_TURN)
        cos, sin = scale * math.cos(turn), scale * math.sin(turn)
        outline = [
            (zoom * (x + cos * u - sin * v) - 0.5, zoom * (y + sin * u + cos * v) - 0.5)
            for u, v in ALL_OUTLINES[thing.shape]
        ]
        pen.polygon(outline, fill=tuple(round(c) for c in colour))
    image = Image.fromarray(_shade(np.asarray(canvas.reduce(SUPERSAMPLE)), rng))
    grow = size / SIZE
    return Drawing(
        image,
        tuple((x * grow, y * grow) for x, y in centres),
        tuple(radius * grow for radius in radii),
    )


def draw(scene: Scene, rng: Random) -> Image.Image:
    """A picture (RGB, SIZE x SIZE) of the scene; the same scene never looks the same twice.

    Each thing's centre lies in the cell of the 3x3 grid that its place names, anywhere in it; the
    thing lies inside the picture and hides no other. It is turned by up to 15 degrees and drawn in
    its named colour, slightly varied, on a light background with uneven light and noise.
    """
    return draw_placed(scene, rng).image
