"""Scenes of the tiny world: one to four coloured shapes in the places of a 3x3 grid."""

import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (220, 30, 35),
    "orange": (250, 140, 10),
    "yellow": (245, 220, 30),
    "green": (30, 150, 60),
    "blue": (35, 80, 215),
    "purple": (125, 40, 165),
    "pink": (255, 120, 190),
    "black": (25, 25, 25),
}
# Words that stand for a colour or a shape in training alone; `drawing` can draw a few of them.
MORE_COLOURS = (
    "white grey brown golden silver violet cyan lime navy olive beige maroon striped spotted "
    "shiny clear dark pale"
).split()
MORE_SHAPES = (
    "dog cat bird horse cow pig frog spider bee car bike banana lemon tomato carrot moon ring "
    "arrow cube drop cloud tree house boat key cup hat ball"
).split()
RENAMED = 0.6  # share of the colours and shapes that `renamed` gives another word
SIZES = ("small", "large")
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "middle",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
SPLITS = ("train", "validation", "test")

# Colour-shape pairs that no training scene, sentence or speech holds.
TEST_PAIRS = frozenset(
    {
        ("red", "star"),
        ("blue", "heart"),
        ("green", "circle"),
        ("yellow", "square"),
        ("purple", "triangle"),
        ("black", "cross"),
    }
)
VALIDATION_PAIRS = frozenset({("orange", "star"), ("pink", "circle"), ("blue", "square")})
PAIRS = frozenset((colour, shape) for colour in COLOURS for shape in SHAPES)
SEEN_PAIRS = PAIRS - TEST_PAIRS - VALIDATION_PAIRS
HELD_PAIRS = {"train": frozenset(), "validation": VALIDATION_PAIRS, "test": TEST_PAIRS}

COUNT_WEIGHTS = (0.15, 0.25, 0.3, 0.3)  # how often a scene has 1, 2, 3, 4 things
REPEAT_CHANCE = 0.35  # that a further thing takes an earlier one's colour or shape


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; `place` is 0..8, row-major in the 3x3 grid."""

    shape: str
    colour: str
    size: str
    place: int

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def row(self) -> int:
        return self.place // 3

    @property
    def column(self) -> int:
        return self.place % 3


@dataclass(frozen=True)
class Scene:
    """One to four things in distinct places, in reading order."""

    things: tuple[Thing, ...]


def where(place: int) -> str:
    """The place in words: "at the top left", "on the right", "in the middle"."""
    name = PLACES[place]
    preposition = {"left": "on", "right": "on", "middle": "in"}.get(name, "at")
    return f"{preposition} the {name}"


def name(thing: Thing, coloured: bool = True) -> str:
    """The thing without article or place: "small red star"."""
    colour = f" {thing.colour}" if coloured else ""
    return f"{thing.size}{colour} {thing.shape}"


def caption(scene: Scene, coloured: bool = True) -> str:
    """The canonical description: "a small red star at the top left and a ... in the middle"."""
    return " and ".join(f"a {name(t, coloured)} {where(t.place)}" for t in scene.things)


def split_of(text: str) -> str:
    """The split a text belongs to, by its crc32: about 85 % train, 5 % validation, 10 % test."""
    slot = zlib.crc32(text.encode()) % 100
    return "train" if slot < 85 else "validation" if slot < 90 else "test"


def pairs_allowed(split: str) -> frozenset[tuple[str, str]]:
    """The colour-shape pairs that texts of the split may name and its scenes may hold."""
    return SEEN_PAIRS | HELD_PAIRS[split]


def renamed(
    scene: Scene,
    rng: random.Random,
    colours: Sequence[str] = MORE_COLOURS,
    shapes: Sequence[str] = MORE_SHAPES,
) -> Scene:
    """The scene with other words for some of its colours and shapes: "a small golden dog".

    What a colour is bound to is learned as one rule for all words when there are many, and as a
    list of pairs when there are few: then a pair never met is misread. `colours` and `shapes` are
    at least as many as the scene's things.
    """
    words: dict[str, str] = {}
    for kind, others in (("colour", colours), ("shape", shapes)):
        used = sorted({getattr(thing, kind) for thing in scene.things})
        chosen = rng.sample(others, len(used))
        words |= {w: o for w, o in zip(used, chosen, strict=True) if rng.random() < RENAMED}
    return Scene(
        tuple(
            replace(t, colour=words.get(t.colour, t.colour), shape=words.get(t.shape, t.shape))
            for t in scene.things
        )
    )


def _sample_thing(
    rng: random.Random, earlier: list[Thing], pairs: Iterable[tuple[str, str]], place: int
) -> Thing:
    """A thing of one of the pairs (sorted, so that a seed always gives the same)."""
    choices = sorted(pairs)
    if earlier and rng.random() < REPEAT_CHANCE:
        model = rng.choice(earlier)
        alike = [p for p in choices if (p[0] == model.colour) != (p[1] == model.shape)]
        choices = alike or choices
    colour, shape = rng.choice(choices)
    return Thing(shape, colour, rng.choice(SIZES), place)


def sample_scene(rng: random.Random, split: str, max_things: int = 4) -> Scene:
    """A random scene of the split, by the hash of its caption.

    Scenes of "validation" and "test" hold at least one of their own held-out pairs and none of
    the other's; scenes of "train" hold neither. Raises ValueError for an unknown split or a
    `max_things` outside 1..4.
    """
    if split not in SPLITS:
        raise ValueError(f"got split {split!r}, expected one of {SPLITS}")
    if not 1 <= max_things <= len(COUNT_WEIGHTS):
        raise ValueError(f"got max_things={max_things}, expected 1 to {len(COUNT_WEIGHTS)}")
    held = HELD_PAIRS[split]
    while True:
        counts = range(1, max_things + 1)
        [count] = rng.choices(counts, COUNT_WEIGHTS[:max_things])
        places = rng.sample(range(len(PLACES)), count)
        things: list[Thing] = []
        for i, place in enumerate(places):
            pairs = held if held and i == 0 else pairs_allowed(split)
            things.append(_sample_thing(rng, things, pairs, place))
        scene = Scene(tuple(sorted(things, key=lambda t: t.place)))
        if split_of(caption(scene)) == split:
            return scene
