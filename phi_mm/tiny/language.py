"""Plain sentences of the tiny world: descriptions, conversations, things to say aloud."""

import random
from collections.abc import Callable

from phi_mm.tiny.facts import FACTS, arithmetic, fact, greeting
from phi_mm.tiny.questions import KINDS, Question, ask
from phi_mm.tiny.scenes import (
    COLOURS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    name,
    pairs_allowed,
    sample_scene,
    split_of,
    where,
)
from phi_mm.tiny.wordings import NUMBERS, named_pairs

__all__ = [
    "FACTS",
    "KINDS",
    "Question",
    "ask",
    "beside",
    "describe",
    "repeat",
    "scene_dialogue",
    "sentence",
    "small_talk",
    "text_dialogue",
    "told",
]

MAX_WORDS = 12  # of a spoken sentence
MAX_LETTERS = 62
MAX_TURNS = 6
REPEAT = (
    "say this again: {x}",
    "repeat this: {x}",
    "say: {x}",
    "repeat after me: {x}",
    "please say again: {x}",
    "say after me: {x}",
    "write this again: {x}",
    "please repeat: {x}",
)
INTRODUCTIONS = ("", "look: ", "here is a scene: ", "think of this: ", "listen: ")
_SALAD = (
    (*COLOURS, *SHAPES, *SIZES, *NUMBERS)
    + tuple("the a is and in at on of left right top bottom middle above below".split())
    + tuple("what where how many thing there you do see day night dog cat water".split())
)


def _sentence_about(thing: Thing, form: int, coloured: bool) -> str:
    """One thing in one of the wordings of `describe`, without a full stop."""
    words, place = name(thing, coloured), where(thing.place)
    size = f"{thing.size} and {thing.colour}" if coloured else thing.size
    return (
        f"a {words} {place}",
        f"there is a {words} {place}",
        f"{place} there is a {words}",
        f"{place} is a {words}",
        f"the {words} is {place}",
        f"the {thing.shape} {place} is {size}",
        f"i see a {words} {place}",
        f"{place}: a {words}",
    )[form]


def describe(scene: Scene, rng: random.Random | None = None, coloured: bool = True) -> str:
    """The scene in words, without a final full stop.

    rng None: the canonical description in reading order. Otherwise one of several wordings, half
    of them in another order, some mixing wordings. coloured=False names no colour.
    """
    if rng is None or rng.random() < 0.15:
        return caption(scene, coloured)
    things = list(scene.things)
    if rng.random() < 0.6:
        rng.shuffle(things)
    if rng.random() < 0.2:  # a list: "a small red star at the top and ..."
        return rng.choice((" and ", ", ")).join(_sentence_about(t, 0, coloured) for t in things)
    forms = [rng.randint(1, 7)] * len(things)
    if rng.random() < 0.25:
        forms = [rng.randint(1, 7) for _ in things]
    mark = rng.choice((". ", ". ", ", ", " and "))
    return mark.join(_sentence_about(t, f, coloured) for t, f in zip(things, forms, strict=True))


def _scene_question(rng: random.Random, split: str, scene: Scene, coloured: bool) -> Question:
    while True:
        found = ask(scene, rng.choice(KINDS), rng, split, coloured)
        if found is not None:
            return found


def _caption_sentence(rng: random.Random, split: str) -> str:
    """A short statement about one or two things: "there is a red star in the middle." """
    scene = sample_scene(rng, split, max_things=2)
    short = [f"{t.colour} {t.shape}" if rng.random() < 0.5 else name(t) for t in scene.things]
    things = [f"a {words} {where(t.place)}" for words, t in zip(short, scene.things, strict=True)]
    return f"{rng.choice(('there is ', 'i see ', 'look at ', ''))}{' and '.join(things)}."


def _question_sentence(rng: random.Random, split: str) -> str:
    coloured = rng.random() < 0.85
    return _scene_question(rng, split, sample_scene(rng, split), coloured).text


def _word_salad(rng: random.Random, split: str) -> str:
    """Known words in no order: only someone who listens can write them down."""
    while True:
        words = " ".join(rng.choice(_SALAD) for _ in range(rng.randint(2, 8)))
        if named_pairs(words) <= pairs_allowed(split):
            return f"{words}."


_SPOKEN: tuple[tuple[float, Callable[[random.Random, str], str]], ...] = (
    (0.5, _question_sentence),
    (0.18, _caption_sentence),
    (0.1, lambda rng, split: fact(rng, split).text),
    (0.08, lambda rng, split: arithmetic(rng, split, digits=False).text),
    (0.02, lambda rng, split: greeting(rng, split).text),
    (0.12, _word_salad),
)


def sentence(rng: random.Random, split: str) -> str:
    """One sentence to be spoken, of at most 12 words and 62 letters, so that it lasts under 4 s.

    A question about some scene, a short statement, a fact or sum asked for, a greeting, or known
    words in no order; no digits. It belongs to the split and names no pair held out from it.
    """
    weights = [weight for weight, _ in _SPOKEN]
    makers = [maker for _, maker in _SPOKEN]
    while True:
        [make] = rng.choices(makers, weights)
        text = make(rng, split)
        short = len(text.split()) <= MAX_WORDS and len(text) <= MAX_LETTERS
        if short and split_of(text) == split:
            return text


def repeat(rng: random.Random, split: str) -> Question:
    """A sentence to be said again; the sentence belongs to the split. Its full stop is dropped."""
    text = sentence(rng, split)
    return Question("repeat", rng.choice(REPEAT).format(x=text), text.removesuffix("."))


def small_talk(rng: random.Random, split: str) -> Question:
    """A fact, a sum, a repetition or a greeting."""
    [make] = rng.choices((fact, arithmetic, repeat, greeting), (0.35, 0.25, 0.35, 0.05))
    return make(rng, split)


def told(scene: Scene, rng: random.Random, coloured: bool = True) -> str:
    """The scene as a user tells it: "look: there is a small red star at the top." """
    return f"{rng.choice(INTRODUCTIONS)}{describe(scene, rng, coloured)}."


def beside(scene: str, questions: list[Question], rng: random.Random) -> list[tuple[str, str]]:
    """The questions asked one a turn, the first beside a scene told in words.

    The words stand before the first question, after it, or alone in a turn of their own that is
    answered by "ok".
    """
    turns = [(q.text, q.answer) for q in questions]
    chance = rng.random()
    if chance < 0.15:
        return [(scene, "ok"), *turns]
    first, answer = turns[0]
    text = f"{first} {scene}" if chance < 0.35 else f"{scene} {first}"
    return [(text, answer), *turns[1:]]


def scene_dialogue(
    scene: Scene, questions: list[Question], rng: random.Random, coloured: bool = True
) -> list[tuple[str, str]]:
    """`beside` for a scene that is told here, in one of the wordings of `told`."""
    return beside(told(scene, rng, coloured), questions, rng)


def text_dialogue(
    rng: random.Random, split: str, max_turns: int = MAX_TURNS
) -> list[tuple[str, str]]:
    """A conversation in text alone: (user, assistant) for each of 1 to `max_turns` turns.

    Two in three are about a scene described in words, some of these without colours, now and then
    with small talk between; the others are small talk. Raises ValueError when max_turns < 1.
    """
    if max_turns < 1:
        raise ValueError(f"got max_turns={max_turns}, expected at least 1")
    count = rng.randint(1, max_turns)
    if rng.random() < 0.33:
        return [(q.text, q.answer) for q in (small_talk(rng, split) for _ in range(count))]
    coloured = rng.random() < 0.85
    scene = sample_scene(rng, split)
    questions = [_scene_question(rng, split, scene, coloured)]
    for _ in range(count - 1):
        talk = rng.random() < 0.15
        questions.append(
            small_talk(rng, split) if talk else _scene_question(rng, split, scene, coloured)
        )
    return scene_dialogue(scene, questions, rng, coloured)[:max_turns]
