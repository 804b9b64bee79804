"""Controls take the picture or the recording away, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from phi_mm.evaluation.controls import blank, shuffled, silence
from phi_mm.evaluation.tasks import load_items


@pytest.fixture(scope="module")
def processor(make_phi_mm: Callable):
    return make_phi_mm()[1]


def prompts(world: Path, task: str) -> list[list[dict]]:
    return [item.prompt for item in load_items(world / "test" / f"{task}.json", task)]


def media(asked: list[list[dict]], kind: str) -> list:
    parts = [part for messages in asked for part in messages[0]["content"]]
    return [part[kind] for part in parts if part["type"] == kind]


def test_blank_pictures_are_zeros_for_the_tower(world: Path, processor) -> None:
    asked = prompts(world, "image_qa")
    before = media(asked, "image")
    changed = blank(asked, processor)
    pixels = processor(images=media(changed, "image"), return_tensors="pt")["pixel_values"]
    assert pixels.shape[0] == 12
    assert pixels.abs().max() < 0.01
    assert media(changed, "text") == media(asked, "text")
    assert media(asked, "image") == before


def test_shuffled_pictures_are_other_rows_pictures(world: Path, processor) -> None:
    asked = prompts(world, "image_qa")
    own, other = media(asked, "image"), media(shuffled(asked, processor), "image")
    assert sorted(other) == sorted(own)
    assert all(a != b for a, b in zip(own, other, strict=True))


def test_shuffled_never_gives_back_a_picture_that_several_rows_show(world: Path, processor) -> None:
    asked = prompts(world, "image_qa")
    repeated = [asked[0]] * 7 + [asked[1]]
    own, other = media(repeated, "image"), media(shuffled(repeated, processor), "image")
    assert all(a != b for a, b in zip(own, other, strict=True))


def test_shuffled_needs_two_pictures(world: Path, processor) -> None:
    with pytest.raises(ValueError, match="two different"):
        shuffled(prompts(world, "image_qa")[:1], processor)


def test_silence_lasts_as_long_as_the_recording(world: Path, processor) -> None:
    changed = media(silence(prompts(world, "audio_qa"), processor), "audio")
    assert [len(samples) for samples in changed] == [2_000 + 1_500 * n for n in range(12)]
    assert not any(samples.any() for samples in changed)


def test_a_control_without_its_medium_is_refused(world: Path, processor) -> None:
    with pytest.raises(ValueError, match="without image"):
        blank(prompts(world, "text_qa"), processor)
