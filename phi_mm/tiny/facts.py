"""Everyday talk of the tiny world: facts, sums, greetings."""

import random

from phi_mm.tiny.questions import Question
from phi_mm.tiny.wordings import NUMBERS, worded

# Each line: one answer and some ways to ask for it.
FACTS: tuple[tuple[str, tuple[str, ...]], ...] = tuple(
    (answer, tuple(text.strip() for text in texts.split("|")))
    for answer, texts in (
        ("seven", "how many days are in a week?|how many days does a week have?"),
        ("twelve", "how many months are in a year?|how many months does a year have?"),
        ("four", "how many seasons are in a year?|how many seasons does a year have?"),
        ("ten", "how many fingers do you have?|how many fingers do two hands have?"),
        ("five", "how many fingers are on a hand?|how many fingers does a hand have?"),
        ("two", "how many eyes do you have?|how many eyes does a cat have?"),
        ("four", "how many legs does a dog have?|how many legs are on a dog?"),
        ("four", "how many legs does a horse have?|how many legs are on a horse?"),
        ("two", "how many legs does a bird have?|how many legs are on a bird?"),
        ("eight", "how many legs does a spider have?|how many legs are on a spider?"),
        ("six", "how many legs does a bee have?|how many legs are on a bee?"),
        ("four", "how many wheels does a car have?|how many wheels are on a car?"),
        ("two", "how many wheels does a bike have?|how many wheels are on a bike?"),
        ("three", "how many sides does a triangle have?|how many sides are on a triangle?"),
        ("four", "how many sides does a square have?|how many sides are on a square?"),
        ("zero", "how many corners does a circle have?|how many corners are on a circle?"),
        ("twelve", "how many eggs are in a dozen?|how many eggs make a dozen?"),
        ("green", "what colour is grass?|which colour does grass have?"),
        ("blue", "what colour is the sky?|which colour does the sky have?"),
        ("white", "what colour is snow?|which colour does snow have?"),
        ("white", "what colour is milk?|which colour does milk have?"),
        ("red", "what colour is blood?|which colour does blood have?"),
        ("red", "what colour is a tomato?|which colour does a tomato have?"),
        ("yellow", "what colour is a banana?|which colour does a banana have?"),
        ("yellow", "what colour is a lemon?|which colour does a lemon have?"),
        ("orange", "what colour is a carrot?|which colour does a carrot have?"),
        ("pink", "what colour is a pig?|which colour does a pig have?"),
        ("black", "what colour is coal?|which colour does coal have?"),
        ("green", "what colour is a frog?|which colour does a frog have?"),
        ("purple", "what do red and blue make?|what colour do red and blue make?"),
        ("green", "what do yellow and blue make?|what colour do yellow and blue make?"),
        ("milk", "what does a cow give?|what do cows give?"),
        ("honey", "what does a bee make?|what do bees make?"),
        ("wool", "what does a sheep give?|what do sheep give?"),
        ("eggs", "what does a hen lay?|what do hens lay?"),
        ("a dog", "what animal barks?|which animal barks?"),
        ("a cat", "what animal says meow?|which animal says meow?"),
        ("a cow", "what animal says moo?|which animal says moo?"),
        ("paris", "what is the capital of france?|which city is the capital of france?"),
        ("rome", "what is the capital of italy?|which city is the capital of italy?"),
        ("madrid", "what is the capital of spain?|which city is the capital of spain?"),
        ("berlin", "what is the capital of germany?|which city is the capital of germany?"),
        ("tokyo", "what is the capital of japan?|which city is the capital of japan?"),
        ("down", "what is the opposite of up?|tell me the opposite of up."),
        ("cold", "what is the opposite of hot?|tell me the opposite of hot."),
        ("night", "what is the opposite of day?|tell me the opposite of day."),
        ("large", "what is the opposite of small?|tell me the opposite of small."),
        ("right", "what is the opposite of left?|tell me the opposite of left."),
        ("slow", "what is the opposite of fast?|tell me the opposite of fast."),
        ("january", "what is the first month?|which month is first?"),
        ("december", "what is the last month?|which month is last?"),
        ("tuesday", "what day comes after monday?|which day is after monday?"),
        ("sunday", "what day comes after saturday?|which day is after saturday?"),
        ("ice", "what is frozen water?|what do you call frozen water?"),
        ("the sun", "what shines in the day?|what do you see shine in the day?"),
        ("the moon", "what shines at night?|what do you see shine at night?"),
        ("water", "what do fish live in?|what does a fish live in?"),
    )
)
SUMS = {
    "plus": (
        "what is {a} plus {b}?",
        "how much is {a} plus {b}?",
        "what do {a} and {b} make?",
        "add {a} and {b}.",
        "tell me {a} plus {b}.",
    ),
    "minus": (
        "what is {a} minus {b}?",
        "how much is {a} minus {b}?",
        "take {b} from {a}.",
        "tell me {a} minus {b}.",
    ),
}
DIGIT_SUMS = {
    "plus": ("what is {a} + {b}?", "how much is {a} + {b}?", "{a} + {b} = ?"),
    "minus": ("what is {a} - {b}?", "how much is {a} - {b}?", "{a} - {b} = ?"),
}
GREETINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("hello, what can i do for you?", ("hello.", "hi.", "hello there.", "good day.", "hi there.")),
    (
        "good morning, what can i do for you?",
        ("good morning.", "a good morning to you.", "i say good morning."),
    ),
    ("i am fine", ("how are you?", "are you fine?", "how do you do?", "are you well?")),
    ("i am a small model", ("who are you?", "what are you?", "tell me who you are.")),
    ("you are welcome", ("thank you.", "thanks.", "i thank you.", "many thanks.")),
    ("goodbye", ("goodbye.", "bye.", "i must go.", "see you.", "i say goodbye.")),
)


def fact(rng: random.Random, split: str) -> Question:
    """A fact of the world; every fact is in every split, each split in its own wordings."""
    while True:
        answer, bodies = rng.choice(FACTS)
        text = worded(rng, split, bodies)
        if text is not None:
            return Question("fact", text, answer)


def arithmetic(rng: random.Random, split: str, digits: bool | None = None) -> Question:
    """A sum or a difference within 0..20, in words or digits; the answer likewise."""
    while True:
        written = rng.random() < 0.35 if digits is None else digits
        sign = rng.choice(("plus", "minus"))
        b = rng.randint(0, 9)
        a = rng.randint(0, 9) if sign == "plus" else rng.randint(b, 10)
        result = a + b if sign == "plus" else a - b
        bodies = DIGIT_SUMS[sign] if written else SUMS[sign]
        word = str if written else NUMBERS.__getitem__
        text = worded(rng, split, tuple(body.format(a=word(a), b=word(b)) for body in bodies))
        if text is not None:
            return Question("arithmetic", text, word(result))


def greeting(rng: random.Random, split: str) -> Question:
    """A greeting, a thank-you, a goodbye."""
    while True:
        answer, bodies = rng.choice(GREETINGS)
        text = worded(rng, split, bodies)
        if text is not None:
            return Question("greeting", text, answer)
