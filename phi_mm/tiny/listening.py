"""Typed questions about a recording: who speaks, how fast, how many words.

The first two are about what no transcript holds.
"""

import random

from phi_mm.tiny.questions import Question
from phi_mm.tiny.wordings import NUMBERS, worded

LISTENING_KINDS = ("speaker", "pace", "words")
# Variants of espeak-ng that everybody would call a woman's or a man's; of the others nobody asks.
WOMEN = ("f1", "f2", "f3", "f4", "f5", "linda", "steph", "Annie", "Alicia", "belinda")
MEN = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "Andy", "Denis", "Diogo")
SLOW, FAST = 170, 200  # words a minute: at most, and at least; between them nobody asks

SPEAKER = (
    "who speaks: a man or a woman?",
    "is it a man or a woman that speaks?",
    "who says this: a man or a woman?",
    "do you hear a man or a woman?",
    "tell me who speaks: a woman or a man.",
)
PACE = (
    "is this said fast or slow?",
    "is the talk fast or slow?",
    "how do they speak: fast or slow?",
    "tell me: is this said slow or fast?",
    "is it slow or fast?",
)
WORDS = (
    "how many words do you hear?",
    "how many words are said?",
    "what is the number of words?",
    "tell me how many words are said.",
    "how many words are there?",
)


def listen(
    kind: str, text: str, voice: str, rate: int, rng: random.Random, split: str
) -> Question | None:
    """A question of the kind in words of the split; None where its answer is not clear-cut.

    Args:
        text, voice, rate: what is said, by whom, in words a minute.
    """
    if kind == "speaker":
        answer, bodies = _speaker(voice), SPEAKER
    elif kind == "pace":
        answer, bodies = _pace(rate), PACE
    else:
        count = len(text.split())
        answer, bodies = NUMBERS[count] if count < len(NUMBERS) else None, WORDS
    asked = worded(rng, split, bodies) if answer else None
    return Question(kind, asked, answer) if asked else None


def _speaker(voice: str) -> str | None:
    variant = voice.rpartition("+")[2]
    if variant in WOMEN:
        return "a woman"
    return "a man" if variant in MEN else None


def _pace(rate: int) -> str | None:
    if rate <= SLOW:
        return "slow"
    return "fast" if rate >= FAST else None
