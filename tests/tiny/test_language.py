"""Questions and answers of the tiny world, checked by a solver that reads the description alone."""

import random
import re
from collections import Counter, defaultdict

import pytest

from phi_mm.tiny.facts import FACTS, arithmetic, fact
from phi_mm.tiny.language import (
    KINDS,
    MAX_LETTERS,
    MAX_WORDS,
    ask,
    describe,
    repeat,
    scene_dialogue,
    sentence,
    text_dialogue,
)
from phi_mm.tiny.scenes import (
    COLOURS,
    HELD_PAIRS,
    SPLITS,
    TEST_PAIRS,
    VALIDATION_PAIRS,
    Scene,
    Thing,
    sample_scene,
    split_of,
)
from phi_mm.tiny.wordings import named_pairs, worded

# ---- The solver: knows nothing of the generator but the words of the language.

SHAPE = "circle|square|triangle|star|cross|heart"
COLOUR = "red|orange|yellow|green|blue|purple|pink|black"
PLACES = {
    "at the top left": (0, 0),
    "at the top": (0, 1),
    "at the top right": (0, 2),
    "on the left": (1, 0),
    "in the middle": (1, 1),
    "on the right": (1, 2),
    "at the bottom left": (2, 0),
    "at the bottom": (2, 1),
    "at the bottom right": (2, 2),
}
PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
LOOK = rf"(?:(?:small|large) )?(?:(?:{COLOUR}) )?(?:{SHAPE}|thing|shape)"
ONE = rf"the {LOOK}(?: (?:{PLACE}))?"
SIDE = "(?:to the )?(?:left|right) of|above|higher than|below|lower than"
NUMBERS = ["zero", "one", "two", "three", "four"]
START = re.compile(r"(?:please|now|so|and|ok|hey|well|then) ")
END = re.compile(r" (?:please|now|then|for me|my friend)$")


def read(description):
    """The things of a canonical description, as dicts."""
    found = re.findall(rf"a (small|large) (?:({COLOUR}) )?({SHAPE}) ({PLACE})", description)
    return [
        {"size": size, "colour": colour, "shape": shape, "place": place}
        for size, colour, shape, place in found
    ]


def fits(thing, words):
    return all(
        word in (thing["size"], thing["colour"], thing["shape"], "thing", "shape")
        for word in words.split()
    )


def find(things, reference):
    """The one thing that "the small star" or "the thing in the middle" means."""
    look, place = re.fullmatch(rf"the ({LOOK})(?: ({PLACE}))?", reference).groups()
    [thing] = [t for t in things if fits(t, look) and place in (None, t["place"])]
    return thing


def holds(one, side, other):
    row, column = PLACES[one["place"]]
    other_row, other_column = PLACES[other["place"]]
    if "left" in side:
        return column < other_column
    if "right" in side:
        return column > other_column
    return row < other_row if side in ("above", "higher than") else row > other_row


def named(thing, article=True):
    words = f"{thing['colour']} {thing['shape']}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}" if article else thing["shape"]


def singular(plural):
    return plural.removesuffix("es") if plural.endswith("crosses") else plural.removesuffix("s")


def solve_attribute(things, q):
    forms = (
        rf"(?:what|which) (colour|shape|size) (?:is|does) ({ONE})(?: have)?",
        rf"(?:what is|tell me|name) the (colour|shape|size) of ({ONE})",
    )
    for form in forms:
        if m := re.fullmatch(form, q):
            return find(things, m[2])[m[1]]
    if m := re.fullmatch(rf"({ONE}) has what (colour|shape)", q):
        return find(things, m[1])[m[2]]
    if m := re.fullmatch(
        rf"(?:is ({ONE}) (?:small or large|large or small)|how large is ({ONE}))", q
    ):
        return find(things, m[1] or m[2])["size"]
    forms = (
        rf"where (?:is|do you see|can i find) ({ONE})",
        rf"(?:what is|tell me) the place of ({ONE})",
        rf"in what place is ({ONE})",
        rf"tell me where ({ONE}) is",
    )
    for form in forms:
        if m := re.fullmatch(form, q):
            return find(things, m[1])["place"]
    return None


def solve_number(things, q):
    many = rf"((?:(?:small|large) )?(?:(?:{COLOUR}) )?[a-z]+s)"
    forms = (
        rf"how many {many} (?:are there(?: in all)?|do you see|can you see)",
        rf"count (?:all )?the {many}",
        rf"(?:what is|tell me) the number of {many}",
        rf"tell me how many {many} there are",
    )
    for form in forms:
        if m := re.fullmatch(form, q):
            return NUMBERS[sum(fits(t, singular(m[1])) for t in things)]
    forms = (
        rf"(?:is there|do you see|can you see|can you find|tell me if there is) an? ({LOOK})",
        rf"is an? ({LOOK}) there",
    )
    for form in forms:
        if m := re.fullmatch(form, q):
            return "yes" if any(fits(t, m[1]) for t in things) else "no"
    return None


def solve_relation(things, q):
    if m := re.fullmatch(rf"(?:is|tell me if|do you see) ({ONE})(?: is)? ({SIDE}) ({ONE})", q):
        return "yes" if holds(find(things, m[1]), m[2], find(things, m[3])) else "no"
    if m := re.fullmatch(rf"(?:what is|what do you see|tell me what is) ({PLACE})", q):
        found = [t for t in things if t["place"] == m[1]]
        return named(found[0]) if found else "nothing"
    what = r"(what is|what do you see|tell me what is|what shape is|what shape do you see)"
    if m := re.fullmatch(rf"{what} ({SIDE}) ({ONE})", q):
        found = [t for t in things if holds(t, m[2], find(things, m[3]))]
        assert len(found) < 2, "more than one thing answers"
        return named(found[0], "shape" not in m[1]) if found else "nothing"
    return None


def solve(description, question):
    """The answer to a question about the description; fails when it is not clear."""
    things = read(description)
    q = END.sub("", START.sub("", question[:-1], count=1))
    for solver in (solve_attribute, solve_number, solve_relation):
        answer = solver(things, q)
        if answer is not None:
            return answer
    if re.search(r"\bshapes\b", q):
        return " and ".join(f"a {t['size']} {t['shape']} {t['place']}" for t in things)
    assert re.match(r"describe|tell me about|list|name|what", q), question
    return description


# ---- Tests


def questions(split, count, coloured=True, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        scene = sample_scene(rng, split)
        for kind in KINDS:
            question = ask(scene, kind, rng, split, coloured)
            if question is not None:
                assert question.kind == kind
                yield scene, question


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("coloured", [True, False])
def test_an_independent_solver_agrees_with_every_answer(split, coloured):
    asked = 0
    for scene, question in questions(split, 300, coloured):
        assert solve(describe(scene), question.text) == question.answer, (scene, question)
        asked += 1
    assert asked > 1_800


@pytest.mark.parametrize("split", SPLITS)
def test_questions_belong_to_their_split_and_name_no_pair_held_out_from_it(split):
    foreign = (TEST_PAIRS | VALIDATION_PAIRS) - HELD_PAIRS[split]
    naming = 0
    for _, question in questions(split, 300, seed=1):
        assert split_of(question.text) == split
        assert not named_pairs(f"{question.text} {question.answer}") & foreign
        naming += bool(named_pairs(question.text) & HELD_PAIRS[split])
    assert (naming > 300) == (split != "train")


@pytest.mark.parametrize("split", SPLITS)
def test_every_kind_has_many_sentences_and_every_scene_nearly_every_kind(split):
    texts, misses = defaultdict(set), Counter()
    rng = random.Random(2)
    for _ in range(200):
        scene = sample_scene(rng, split)
        for kind in KINDS:
            found = [ask(scene, kind, rng, split) for _ in range(6)]
            misses[kind] += not any(found)
            texts[kind].update(q.text for q in found if q is not None)
    assert min(map(len, texts.values())) >= 20
    assert max(misses.values()) <= 8


def test_answers_are_balanced():
    answers = defaultdict(Counter)
    for _, question in questions("train", 1500, seed=4):
        answers[question.kind][question.answer] += 1
    exist = answers["exist"]
    assert exist["yes"] / exist.total() == pytest.approx(0.5, abs=0.04)
    count = answers["count"]
    assert count["zero"] / count.total() == pytest.approx(0.25, abs=0.04)
    assert count["two"] / count.total() > 0.15
    relation = answers["relation"]
    assert relation["yes"] / (relation["yes"] + relation["no"]) == pytest.approx(0.5, abs=0.06)
    assert relation["nothing"] / relation.total() < 0.25
    assert max(answers["colour"].values()) / answers["colour"].total() < 0.2


def test_absent_things_are_mostly_put_together_from_present_attributes():
    hard = absent = 0
    for scene, question in questions("train", 1500, seed=5):
        if question.kind == "exist" and question.answer == "no" and len(scene.things) > 1:
            words = re.findall(rf"\b({COLOUR}|{SHAPE}|small|large)\b", question.text)
            present = {a for t in scene.things for a in (t.size, t.colour, t.shape)}
            hard += set(words) <= present
            absent += 1
    assert absent > 300
    assert hard / absent > 0.5


def test_questions_without_colours_name_none():
    for _, question in questions("train", 200, coloured=False):
        words = re.findall(r"[a-z]+", f"{question.text} {question.answer}")
        assert not set(words) & {*COLOURS, "colour"}


def test_unclear_questions_are_not_asked():
    twins = Scene((Thing("star", "pink", "small", 0), Thing("star", "pink", "small", 8)))
    rng = random.Random(0)
    assert all(ask(twins, "where", rng, "train") is None for _ in range(200))
    colours = {ask(twins, "colour", rng, "train").text for _ in range(100)}
    assert all(re.search("top left|bottom right", text) for text in colours)


def test_unknown_kind():
    with pytest.raises(ValueError, match="got kind 'smell', expected one of"):
        ask(sample_scene(random.Random(0), "train"), "smell", random.Random(0), "train")


def test_descriptions_tell_the_whole_scene_in_many_ways():
    scene = Scene((Thing("star", "pink", "small", 0), Thing("circle", "blue", "large", 4)))
    rng = random.Random(0)
    told = {describe(scene, rng) for _ in range(400)}
    assert len(told) > 60
    for text in told:
        words = Counter(re.findall("[a-z]+", text))
        assert all(words[w] == 1 for w in "star circle pink blue small large middle".split())
        assert not text.endswith(".")
    assert (
        describe(scene) == "a small pink star at the top left and a large blue circle in the middle"
    )


@pytest.mark.parametrize("split", SPLITS)
def test_sentences_are_short_and_belong_to_their_split(split):
    rng = random.Random(6)
    foreign = (TEST_PAIRS | VALIDATION_PAIRS) - HELD_PAIRS[split]
    texts = [sentence(rng, split) for _ in range(1500)]
    assert len(set(texts)) > 800
    for text in texts:
        assert split_of(text) == split
        assert len(text.split()) <= MAX_WORDS and len(text) <= MAX_LETTERS
        assert re.fullmatch(r"[a-z]+( [a-z]+)*[.?]", text)
        assert not named_pairs(text) & foreign


@pytest.mark.parametrize("split", SPLITS)
def test_every_fact_can_be_asked_in_every_split(split):
    rng = random.Random(0)
    asked = [worded(rng, split, bodies) for _, bodies in FACTS]
    assert None not in asked
    assert all(split_of(text) == split for text in asked)
    question = fact(rng, split)
    assert split_of(question.text) == split


def test_arithmetic_in_words_and_digits():
    rng = random.Random(0)
    numbers = (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen"
    ).split()
    for _ in range(500):
        question = arithmetic(rng, "train")
        digits = re.findall(r"\d+", question.text)
        words = [str(numbers.index(w)) for w in re.findall("[a-z]+", question.text) if w in numbers]
        a, b = map(int, digits or words)
        if re.search(r"take", question.text):
            a, b = b, a
        minus = re.search(r"minus|take| - ", question.text)
        result = a - b if minus else a + b
        assert question.answer == (str(result) if digits else numbers[result])


def test_repetitions_give_the_sentence_back():
    rng = random.Random(0)
    for _ in range(300):
        question = repeat(rng, "validation")
        said = question.text.split(": ", 1)[1]
        assert said.removesuffix(".") == question.answer
        assert split_of(said) == "validation"


@pytest.mark.parametrize("split", SPLITS)
def test_dialogues(split):
    rng = random.Random(8)
    foreign = (TEST_PAIRS | VALIDATION_PAIRS) - HELD_PAIRS[split]
    lengths, told = Counter(), 0
    for _ in range(600):
        turns = text_dialogue(rng, split)
        lengths[len(turns)] += 1
        told += len(re.findall(PLACE, turns[0][0])) > 0
        for user, answer in turns:
            assert user == user.lower() and answer
            assert not answer.endswith(".")
            assert not named_pairs(f"{user} {answer}") & foreign
    assert lengths.keys() == {1, 2, 3, 4, 5, 6}
    assert told > 300
    assert all(len(text_dialogue(rng, split, max_turns=1)) == 1 for _ in range(50))
    with pytest.raises(ValueError, match="got max_turns=0"):
        text_dialogue(rng, split, max_turns=0)


def test_scene_dialogue_tells_the_scene_before_after_or_apart():
    rng = random.Random(0)
    scene = sample_scene(rng, "train")
    question = ask(scene, "total", rng, "train")
    forms = Counter()
    for _ in range(300):
        turns = scene_dialogue(scene, [question], rng)
        if len(turns) == 2:
            assert turns[0][1] == "ok" and turns[1] == (question.text, question.answer)
            forms["apart"] += 1
        else:
            [(text, answer)] = turns
            assert answer == question.answer
            forms["after" if text.endswith(question.text) else "before"] += 1
            assert text.endswith(question.text) or text.startswith(question.text)
    assert min(forms[form] for form in ("apart", "after", "before")) > 20


def test_same_seed_same_language():
    first, second = random.Random(9), random.Random(9)
    assert [text_dialogue(first, "train") for _ in range(30)] == [
        text_dialogue(second, "train") for _ in range(30)
    ]
