"""Questions about a scene of the tiny world and their answers, in many wordings."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from phi_mm.tiny.scenes import (
    COLOURS,
    HELD_PAIRS,
    PAIRS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    pairs_allowed,
    where,
)
from phi_mm.tiny.wordings import (
    COLOUR,
    COUNT,
    DESCRIBE,
    DESCRIBE_SHAPES,
    EXIST,
    NUMBERS,
    RELATED,
    RELATIONS,
    SHAPE,
    SHAPE_RELATED,
    SIZE,
    TOTAL,
    WHAT_PLACED,
    WHAT_RELATED,
    WHERE,
    worded,
)

KINDS = ("colour", "shape", "size", "count", "total", "exist", "relation", "where", "describe")
PREFER_HELD = 0.75  # how often a held-out split asks about a pair of its own where it can
HARD_NEGATIVES = 0.7  # share of absent things put together from attributes of present ones
ZERO_CHANCE = 0.25  # share of "zero" among counts
NOTHING_CHANCE = 0.3  # share of "nothing" among "what is left of ...?"


@dataclass(frozen=True)
class Question:
    """A question of one of the KINDS (or of everyday talk) as a user says it, and its answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Look:
    """What a thing is told apart by; None where anything goes."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    def fits(self, thing: Thing) -> bool:
        return (
            self.size in (None, thing.size)
            and self.colour in (None, thing.colour)
            and self.shape in (None, thing.shape)
        )

    def words(self, noun: str) -> str:
        """ "small red star"; `noun` stands for a shape that is not told."""
        return " ".join(word for word in (self.size, self.colour, self.shape or noun) if word)

    def count(self, scene: Scene) -> int:
        return sum(map(self.fits, scene.things))


def _look(thing: Thing, attributes: tuple[str, ...]) -> Look:
    return Look(
        thing.size if "size" in attributes else None,
        thing.colour if "colour" in attributes else None,
        thing.shape if "shape" in attributes else None,
    )


HANDLES = (
    ("shape",),
    ("colour",),
    ("size",),
    ("colour", "shape"),
    ("size", "shape"),
    ("size", "colour"),
    ("place",),
)


@dataclass(frozen=True)
class _Asker:
    """What every question needs: the scene, the split to word it for, and chance."""

    scene: Scene
    rng: random.Random
    split: str
    coloured: bool

    def noun(self) -> str:
        return self.rng.choice(("thing", "shape"))

    def target(self) -> Thing:
        """A thing to ask about: in a held-out split mostly one of a held-out pair."""
        held = [t for t in self.scene.things if t.pair in HELD_PAIRS[self.split]]
        if held and self.rng.random() < PREFER_HELD:
            return self.rng.choice(held)
        return self.rng.choice(self.scene.things)

    def handle(self, thing: Thing, without: str, place: bool = True) -> str | None:
        """Words that fit this thing alone ("the red star") and do not tell `without`."""
        banned = {without}
        if not place:
            banned.add("place")
        if not self.coloured:
            banned.add("colour")
        forms = [form for form in HANDLES if not banned & set(form)]
        self.rng.shuffle(forms)
        pair = ("colour", "shape")
        if pair in forms and thing.pair in HELD_PAIRS[self.split]:
            if self.rng.random() < PREFER_HELD:
                forms.insert(0, pair)
        for form in forms:
            if form == ("place",):
                return f"the {self.noun()} {where(thing.place)}"
            look = _look(thing, form)
            if look.count(self.scene) == 1:
                return f"the {look.words(self.noun())}"
        return None

    def question(
        self, kind: str, bodies: tuple[str, ...], answer: str, **fillings: str
    ) -> Question | None:
        texts = tuple(body.format(**fillings) for body in bodies)
        text = worded(self.rng, self.split, texts)
        return None if text is None else Question(kind, text, answer)

    def looks(self) -> list[Look]:
        """Every look that the split may name, but those of a single thing with all attributes."""
        colours = dict.fromkeys((*COLOURS, *(thing.colour for thing in self.scene.things)))
        shapes = dict.fromkeys((*SHAPES, *(thing.shape for thing in self.scene.things)))
        if not self.coloured:
            colours.clear()
        held = PAIRS - pairs_allowed(self.split)
        looks = [Look(size=s) for s in SIZES] + [Look(shape=s) for s in shapes]
        looks += [Look(size=z, shape=s) for z, s in product(SIZES, shapes)]
        looks += [Look(colour=c) for c in colours]
        looks += [Look(size=z, colour=c) for z, c in product(SIZES, colours)]
        pairs = [pair for pair in product(colours, shapes) if pair not in held]
        return looks + [Look(colour=colour, shape=shape) for colour, shape in pairs]

    def choose_look(self, present: bool, counts: dict[Look, int]) -> Look | None:
        """A look that something (or nothing) in the scene has; hard negatives recombine."""
        looks = [look for look, count in counts.items() if (count > 0) == present]
        if not present and self.rng.random() < HARD_NEGATIVES:
            things = self.scene.things
            hard = [
                look
                for look in looks
                if look.size in (None, *(t.size for t in things))
                and look.colour in (None, *(t.colour for t in things))
                and look.shape in (None, *(t.shape for t in things))
            ]
            looks = hard or looks
        held = [k for k in looks if (k.colour, k.shape) in HELD_PAIRS[self.split]]
        if held and self.rng.random() < PREFER_HELD:
            looks = held
        # By form first: most looks have a colour and a shape.
        forms = sorted({(bool(k.size), bool(k.colour), bool(k.shape)) for k in looks})
        if not forms:
            return None
        form = self.rng.choice(forms)
        return self.rng.choice(
            [k for k in looks if (bool(k.size), bool(k.colour), bool(k.shape)) == form]
        )


def _colour(ask: _Asker) -> Question | None:
    thing = ask.target()
    handle = ask.handle(thing, without="colour")
    return handle and ask.question("colour", COLOUR, thing.colour, x=handle)


def _shape(ask: _Asker) -> Question | None:
    thing = ask.target()
    handle = ask.handle(thing, without="shape")
    return handle and ask.question("shape", SHAPE, thing.shape, x=handle)


def _size(ask: _Asker) -> Question | None:
    thing = ask.target()
    handle = ask.handle(thing, without="size")
    return handle and ask.question("size", SIZE, thing.size, x=handle)


def _where(ask: _Asker) -> Question | None:
    thing = ask.target()
    handle = ask.handle(thing, without="place")
    return handle and ask.question("where", WHERE, where(thing.place), x=handle)


def _total(ask: _Asker) -> Question | None:
    return ask.question("total", TOTAL, NUMBERS[len(ask.scene.things)])


def _count(ask: _Asker) -> Question | None:
    counts = {look: look.count(ask.scene) for look in ask.looks()}
    if ask.rng.random() < ZERO_CHANCE:
        look = ask.choose_look(False, counts)
    else:
        number = ask.rng.choice(sorted(set(counts.values()) - {0}))
        look = ask.choose_look(True, {k: n for k, n in counts.items() if n == number})
    if look is None:
        return None
    plural = look.words(ask.noun()) + ("es" if look.shape == "cross" else "s")
    return ask.question("count", COUNT, NUMBERS[counts[look]], k=plural)


def _exist(ask: _Asker) -> Question | None:
    counts = {look: look.count(ask.scene) for look in ask.looks()}
    present = ask.rng.random() < 0.5
    look = ask.choose_look(present, counts)
    if look is None:
        return None
    words = look.words(ask.noun())
    article = "an" if words[0] in "aeiou" else "a"
    return ask.question("exist", EXIST, "yes" if present else "no", a=f"{article} {words}")


def _holds(relation: str, one: Thing, other: Thing) -> bool:
    if relation == "left of":
        return one.column < other.column
    if relation == "right of":
        return one.column > other.column
    return one.row < other.row if relation == "above" else one.row > other.row


def _said(thing: Thing, coloured: bool) -> str:
    return f"{thing.colour} {thing.shape}" if coloured else thing.shape


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _related(ask: _Asker) -> Question | None:
    """ "is the red star left of the blue circle?" """
    things = ask.scene.things
    if len(things) < 2:
        return None
    one = ask.target()
    other = ask.rng.choice([t for t in things if t is not one])
    if ask.rng.random() < 0.5:
        one, other = other, one
    holds = ask.rng.random() < 0.5
    relation = ask.rng.choice([r for r in RELATIONS if _holds(r, one, other) == holds])
    x = ask.handle(one, without="place", place=False)
    y = ask.handle(other, without="place", place=False)
    if x is None or y is None:
        return None
    bodies = tuple(
        body.format(x="{x}", y="{y}", r=words) for body in RELATED for words in RELATIONS[relation]
    )
    return ask.question("relation", bodies, "yes" if holds else "no", x=x, y=y)


def _beside(ask: _Asker) -> Question | None:
    """ "what is left of the red star?", asked when one thing or none is."""
    nothing = ask.rng.random() < NOTHING_CHANCE
    cases = []
    for thing, relation in product(ask.scene.things, RELATIONS):
        found = [t for t in ask.scene.things if _holds(relation, t, thing)]
        if len(found) == (0 if nothing else 1):
            cases.append((thing, relation, found))
    if not cases:
        return None
    thing, relation, found = ask.rng.choice(cases)
    handle = ask.handle(thing, without="place", place=False)
    if handle is None:
        return None
    bodies = WHAT_RELATED if ask.coloured else SHAPE_RELATED
    bodies = tuple(b.format(r=words, x="{x}") for b in bodies for words in RELATIONS[relation])
    answer = "nothing" if nothing else _said(found[0], ask.coloured)
    if ask.coloured and not nothing:
        answer = _article(answer)
    return ask.question("relation", bodies, answer, x=handle)


def _at_place(ask: _Asker) -> Question | None:
    """ "what is in the middle?" """
    if ask.rng.random() < NOTHING_CHANCE:
        taken = {t.place for t in ask.scene.things}
        place = ask.rng.choice([p for p in range(len(PLACES)) if p not in taken])
        answer = "nothing"
    else:
        thing = ask.target()
        place, answer = thing.place, _article(_said(thing, coloured=True))
    return ask.question("relation", WHAT_PLACED, answer, p=where(place))


def _relation(ask: _Asker) -> Question | None:
    several = len(ask.scene.things) > 1
    if several and ask.rng.random() < 0.5:
        return _related(ask)
    if ask.coloured and (not several or ask.rng.random() < 0.35):
        return _at_place(ask)
    return _beside(ask) if several else None


def _describe(ask: _Asker) -> Question | None:
    bodies = DESCRIBE if ask.coloured else DESCRIBE_SHAPES
    return ask.question("describe", bodies, caption(ask.scene, ask.coloured))


_ASKERS: dict[str, Callable[[_Asker], Question | None]] = {
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "count": _count,
    "total": _total,
    "exist": _exist,
    "relation": _relation,
    "where": _where,
    "describe": _describe,
}


def ask(
    scene: Scene, kind: str, rng: random.Random, split: str, coloured: bool = True
) -> Question | None:
    """A question of the kind about the scene whose text belongs to the split.

    None when this draw of chance found no question that is clear and worded for the split; another
    call may. Questions of "train" never name a held-out pair; those of "validation" and "test"
    mostly ask about one of their own. Left, right, above and below compare columns and rows.

    coloured=False: for pictures in unnamed colours; question and answer name no colour, and there
    is no question of kind "colour". Raises ValueError for an unknown kind.
    """
    if kind not in _ASKERS:
        raise ValueError(f"got kind {kind!r}, expected one of {KINDS}")
    if kind == "colour" and not coloured:
        return None
    return _ASKERS[kind](_Asker(scene, rng, split, coloured))
