"""Many ways to say one thing, of which each split of the tiny world owns some."""

import random
import re
from collections.abc import Sequence

from phi_mm.tiny.scenes import COLOURS, PAIRS, SHAPES, pairs_allowed, split_of

OPENERS = ("please", "now", "so", "and", "ok", "hey", "well", "then")
CLOSERS = ("please", "now", "then", "for me", "my friend")
OPENER_CHANCE = 0.5
CLOSER_CHANCE = 0.4
TRIES = 1500  # of one wording; validation owns 1 text in 20
_PAIR = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?\b")

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()

# Wordings; {x}, {y} are things ("the red star"), {p} a place, {k} several ("red stars").
COLOUR = (
    "what colour is {x}?",
    "which colour is {x}?",
    "what is the colour of {x}?",
    "what colour does {x} have?",
    "tell me the colour of {x}.",
    "name the colour of {x}.",
    "{x} has what colour?",
)
SHAPE = (
    "what shape is {x}?",
    "which shape is {x}?",
    "what is the shape of {x}?",
    "what shape does {x} have?",
    "tell me the shape of {x}.",
    "name the shape of {x}.",
    "{x} has what shape?",
)
SIZE = (
    "what size is {x}?",
    "which size is {x}?",
    "what is the size of {x}?",
    "is {x} small or large?",
    "is {x} large or small?",
    "tell me the size of {x}.",
    "how large is {x}?",
)
WHERE = (
    "where is {x}?",
    "where do you see {x}?",
    "in what place is {x}?",
    "what is the place of {x}?",
    "tell me where {x} is.",
    "tell me the place of {x}.",
    "where can i find {x}?",
)
COUNT = (
    "how many {k} are there?",
    "how many {k} do you see?",
    "how many {k} can you see?",
    "count the {k}.",
    "tell me how many {k} there are.",
    "what is the number of {k}?",
    "tell me the number of {k}.",
)
TOTAL = tuple(
    body.format(k=noun)
    for noun in ("things", "shapes")
    for body in (*COUNT, "how many {k} are there in all?", "count all the {k}.")
)
EXIST = (
    "is there {a}?",
    "do you see {a}?",
    "can you see {a}?",
    "is {a} there?",
    "tell me if there is {a}.",
    "can you find {a}?",
)
RELATIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
}
RELATED = ("is {x} {r} {y}?", "tell me if {x} is {r} {y}.", "do you see {x} {r} {y}?")
WHAT_RELATED = ("what is {r} {x}?", "what do you see {r} {x}?", "tell me what is {r} {x}.")
WHAT_PLACED = ("what is {p}?", "what do you see {p}?", "tell me what is {p}.")
SHAPE_RELATED = ("what shape is {r} {x}?", "what shape do you see {r} {x}?")
_SAY = ("describe", "tell me about", "list", "name")
_ALL = ("everything", "all things", "all the things", "the scene", "what you see")
DESCRIBE = tuple(f"{say} {all_}." for say in _SAY for all_ in _ALL) + (
    "what do you see?",
    "what can you see?",
    "what is there?",
    "what things are there?",
)
_SHAPES = ("the shapes", "all shapes", "all the shapes", "only the shapes")
DESCRIBE_SHAPES = tuple(f"{say} {all_}." for say in _SAY for all_ in _SHAPES) + (
    "what shapes do you see?",
    "what shapes can you see?",
    "what shapes are there?",
)


def named_pairs(text: str) -> frozenset[tuple[str, str]]:
    """The colour-shape pairs that a text names ("red star", "red stars")."""
    return frozenset(_PAIR.findall(text)) & PAIRS


def worded(rng: random.Random, split: str, bodies: Sequence[str]) -> str | None:
    """One of the bodies, with or without an opener and a closer, that belongs to the split.

    A body ends with "?" or "."; a closer goes in front of that. None when no wording of the split
    was found or one would name a pair that is held out from it.
    """
    allowed = pairs_allowed(split)
    for _ in range(TRIES):
        text = rng.choice(bodies)
        if rng.random() < OPENER_CHANCE:
            text = f"{rng.choice(OPENERS)} {text}"
        if rng.random() < CLOSER_CHANCE:
            text = f"{text[:-1]} {rng.choice(CLOSERS)}{text[-1]}"
        if split_of(text) == split and named_pairs(text) <= allowed:
            return text
    return None
