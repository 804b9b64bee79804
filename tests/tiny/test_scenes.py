"""Scenes of the tiny world: splits, held-out pairs, places in words."""

import random
from collections import Counter

import pytest

from phi_mm.tiny.scenes import (
    COLOURS,
    HELD_PAIRS,
    MORE_COLOURS,
    MORE_SHAPES,
    PLACES,
    SEEN_PAIRS,
    SHAPES,
    SPLITS,
    TEST_PAIRS,
    VALIDATION_PAIRS,
    Scene,
    Thing,
    caption,
    renamed,
    sample_scene,
    split_of,
    where,
)

TWO = Scene((Thing("star", "pink", "small", 0), Thing("circle", "blue", "large", 4)))


def test_held_out_pairs_cover_every_shape_once_in_different_colours():
    assert sorted(shape for _, shape in TEST_PAIRS) == sorted(SHAPES)
    assert len({colour for colour, _ in TEST_PAIRS}) == 6
    assert len(VALIDATION_PAIRS - TEST_PAIRS) == 3
    assert len(SEEN_PAIRS) == 48 - 9
    # Every colour and every shape stays known from other pairs.
    assert {colour for colour, _ in SEEN_PAIRS} == set(COLOURS)
    assert {shape for _, shape in SEEN_PAIRS} == set(SHAPES)


def test_caption_in_reading_order():
    assert caption(TWO) == "a small pink star at the top left and a large blue circle in the middle"
    assert caption(TWO, coloured=False) == (
        "a small star at the top left and a large circle in the middle"
    )


def test_a_renamed_scene_keeps_what_is_alike_and_where_it_is():
    rng = random.Random(4)
    changed = Counter()
    for _ in range(300):
        scene = sample_scene(rng, "train")
        other = renamed(scene, rng)
        for before, after in zip(scene.things, other.things, strict=True):
            assert (before.size, before.place) == (after.size, after.place)
            assert after.colour in (before.colour, *MORE_COLOURS)
            assert after.shape in (before.shape, *MORE_SHAPES)
            changed[before.colour != after.colour, before.shape != after.shape] += 1
        for kind in ("colour", "shape"):
            before = [getattr(thing, kind) for thing in scene.things]
            after = [getattr(thing, kind) for thing in other.things]
            assert [before.index(word) for word in before] == [after.index(word) for word in after]
    assert min(changed.values()) > 0.1 * changed.total()
    assert not {*MORE_COLOURS, *MORE_SHAPES} & {*COLOURS, *SHAPES}


def test_places_in_words_are_distinct_and_row_major():
    words = [where(place) for place in range(9)]
    assert words[0] == "at the top left"
    assert words[3:6] == ["on the left", "in the middle", "on the right"]
    assert words[7] == "at the bottom"
    assert len(set(words)) == len(PLACES) == 9


def test_row_and_column():
    thing = Thing("star", "red", "small", 5)
    assert (thing.row, thing.column) == (1, 2)


def test_split_of_is_crc32_by_hundredths():
    # crc32("a") = 3904355907, crc32("hello world") = 222957957, crc32("14") = 2875939626 ...
    assert split_of("a") == "train"  # 7
    assert split_of("hello world") == "train"  # 57
    shares = Counter(split_of(f"sentence number {i}") for i in range(20_000))
    assert shares["train"] == pytest.approx(17_000, abs=300)
    assert shares["validation"] == pytest.approx(1_000, abs=150)
    assert shares["test"] == pytest.approx(2_000, abs=200)


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_belong_to_their_split_and_hold_their_pairs(split):
    rng = random.Random(3)
    other = (TEST_PAIRS | VALIDATION_PAIRS) - HELD_PAIRS[split]
    sizes = Counter()
    for _ in range(2_000):
        scene = sample_scene(rng, split)
        pairs = {thing.pair for thing in scene.things}
        places = [thing.place for thing in scene.things]
        assert split_of(caption(scene)) == split
        assert not pairs & other
        assert bool(pairs & HELD_PAIRS[split]) == (split != "train")
        assert places == sorted(set(places))
        sizes[len(scene.things)] += 1
    assert sizes.keys() == {1, 2, 3, 4}
    assert min(sizes.values()) > 200


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_of_one_thing_exist_in_every_split(split):
    rng = random.Random(0)
    for _ in range(50):
        assert len(sample_scene(rng, split, max_things=1).things) == 1


def test_same_seed_same_scenes():
    first, second = random.Random(7), random.Random(7)
    assert [sample_scene(first, "train") for _ in range(50)] == [
        sample_scene(second, "train") for _ in range(50)
    ]


def test_colours_and_shapes_repeat_now_and_then():
    rng = random.Random(1)
    scenes = [sample_scene(rng, "train") for _ in range(500)]
    shared = sum(len({t.colour for t in s.things}) < len(s.things) for s in scenes)
    assert 100 < shared < 350


@pytest.mark.parametrize("split, most", [("dev", 4), ("train", 0), ("train", 5)])
def test_bad_arguments(split, most):
    with pytest.raises(ValueError, match="got .*expected"):
        sample_scene(random.Random(0), split, most)
