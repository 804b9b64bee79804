"""Drawn scenes: what is in a picture, where it lies and in which colour."""

import math
from collections import Counter
from random import Random

import numpy as np
import pytest

from phi_mm.tiny.clip_training import sample_crowd
from phi_mm.tiny.drawing import (
    ALL_COLOURS,
    ALL_OUTLINES,
    CONTRAST,
    OTHER_COLOURS,
    OTHER_OUTLINES,
    SIZE,
    draw,
    draw_placed,
)
from phi_mm.tiny.scenes import (
    COLOURS,
    MORE_COLOURS,
    MORE_SHAPES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    sample_scene,
)


def one(shape="circle", colour="red", size="large", place=4):
    return Scene((Thing(shape, colour, size, place),))


def nearest_name(rgb):
    return min(ALL_COLOURS, key=lambda name: math.dist(rgb, ALL_COLOURS[name]))


def differs_from_paper(image):
    """Mask of pixels far from the picture's border colour (things in the middle only)."""
    pixels = np.asarray(image).astype(float)
    paper = np.median(pixels[0], axis=0)
    return np.linalg.norm(pixels - paper, axis=2) > CONTRAST / 2


def test_same_seed_same_picture_and_another_seed_another():
    scene = sample_scene(Random(1), "train")
    first, again, other = (np.asarray(draw(scene, Random(seed))) for seed in (5, 5, 6))
    assert first.shape == (SIZE, SIZE, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_size_argument_scales_picture_and_centres():
    scene = one()
    small, large = draw_placed(scene, Random(2)), draw_placed(scene, Random(2), size=96)
    assert large.image.size == (96, 96)
    assert large.centres[0] == pytest.approx([2 * c for c in small.centres[0]])
    assert large.radii[0] == pytest.approx(2 * small.radii[0])


def test_centres_lie_in_their_cells_inside_the_picture_and_apart():
    rng = Random(3)
    corners = Counter()
    for _ in range(400):
        scene = sample_crowd(rng, 7)
        drawing = draw_placed(scene, rng)
        spots = list(zip(drawing.centres, drawing.radii, strict=True))
        for thing, ((x, y), radius) in zip(scene.things, spots, strict=True):
            assert int(y // 16) * 3 + int(x // 16) == thing.place
            assert radius <= x <= SIZE - radius and radius <= y <= SIZE - radius
            corners[x % 16 < 8, y % 16 < 8] += 1
        for i, (a, r) in enumerate(spots):
            for b, s in spots[:i]:
                assert math.dist(a, b) >= 0.95 * (r + s)
    assert min(corners.values()) > 0.15 * corners.total()


def test_freedom_zero_puts_things_in_the_middles_of_their_cells():
    things = tuple(Thing("circle", "blue", "small", place) for place in range(9))
    drawing = draw_placed(Scene(things), Random(4), freedom=0.0)
    assert drawing.centres == tuple((8 + 16 * (p % 3), 8 + 16 * (p // 3)) for p in range(9))


@pytest.mark.parametrize("shape", ALL_OUTLINES)
def test_nine_large_things_fit(shape):
    things = tuple(Thing(shape, "blue", "large", place) for place in range(9))
    for seed in range(20):
        assert len(draw_placed(Scene(things), Random(seed)).centres) == 9


def test_two_things_in_one_place_are_refused():
    things = (Thing("star", "blue", "large", 3), Thing("heart", "red", "large", 3))
    with pytest.raises(ValueError, match="overlap"):
        draw(Scene(things), Random(6))


def test_other_colours_and_shapes_are_words_of_the_world():
    assert set(OTHER_COLOURS) <= set(MORE_COLOURS)
    assert set(OTHER_OUTLINES) <= set(MORE_SHAPES)


@pytest.mark.parametrize("colour", ALL_COLOURS)
def test_a_named_colour_stays_nearest_to_its_name(colour):
    rng = Random(7)
    for _ in range(60):
        drawing = draw_placed(one(colour=colour), rng)
        x, y = (int(c) for c in drawing.centres[0])
        middle = np.asarray(drawing.image)[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(0)
        assert nearest_name(middle) == colour


def test_unnamed_colours_stay_45_away_from_every_name():
    rng = Random(8)
    for _ in range(300):
        drawing = draw_placed(one(), rng, unnamed_colours=True)
        x, y = (int(c) for c in drawing.centres[0])
        middle = np.asarray(drawing.image)[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(0)
        assert min(math.dist(middle, named) for named in COLOURS.values()) >= 45


@pytest.mark.parametrize("shape", SHAPES)
def test_large_is_clearly_larger_than_small(shape):
    rng = Random(9)
    area = {
        size: [differs_from_paper(draw(one(shape, "black", size), rng)).sum() for _ in range(40)]
        for size in SIZES
    }
    assert min(area["large"]) > 1.4 * max(area["small"])


def test_every_thing_stands_off_from_the_background():
    rng = Random(10)
    for colour in ALL_COLOURS:
        for _ in range(20):
            mask = differs_from_paper(draw(one("square", colour, "large"), rng))
            assert 90 < mask.sum() < 180  # the square (side 10.2 to 11.4 pixels) and nothing else
