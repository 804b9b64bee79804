"""What a recipe needs, as tables for people."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from modeling_phi_mm import PhiMMConfig
from phi_mm.estimate.memory import Estimate, Rehearsal
from phi_mm.estimate.step import Row
from phi_mm.recipes import Recipe

GIB = 2**30
FRAMES_PER_SECOND = 50  # of Whisper's encoder
USABLE = 0.9  # of a device: CUDA's context and gaps between tensors take the rest


@dataclass(frozen=True)
class Question:
    """What is asked about a recipe.

    Args:
        memory: GiB of one device.
        length: tokens of a row; None for the recipe's `data.max_length`.
        supervised: tokens of a row with a label; None for all that are no media.
        seconds: of sound in a row of a model that hears; None for a whole window.
        rows: of an epoch.
        speed: TFLOP that a device computes in a second.
        processes: that train together, each with a device and the whole model.
    """

    memory: float = 24.0
    length: int | None = None
    supervised: int | None = None
    seconds: float | None = None
    rows: int = 100_000
    speed: float = 125.0
    processes: int = 1


def describe(recipe: Recipe, asked: Question) -> Iterator[str]:
    """Memory by what it holds; largest batch, work and hours with activation checkpointing and
    without it. Line by line, as they are known.

    Raises:
        ValueError: rows too short for their media, or anything `Rehearsal` refuses.
    """
    rehearsals = {on: Rehearsal(recipe, on, asked.processes) for on in (True, False)}
    own = rehearsals[bool(recipe.training.get("activation_checkpointing"))]
    row = choose_row(own, asked)
    size = int(recipe.training.get("per_device_train_batch_size", 8))
    yield (
        f"one process of {asked.processes}: {size} rows of {row.length:,} tokens "
        f"({row.supervised:,} supervised, {row.images} images, {row.windows} audio windows)"
    )
    yield from _memory_lines(own.take(size, row), own)
    yield (
        f"\n{'activation checkpointing':<26}{'GiB a row':>12}{f'rows in {asked.memory:g} GiB':>18}"
        f"{'TFLOP a row':>14}{'hours':>10}"
    )
    for on, rehearsal in rehearsals.items():
        yield _choice_line("on" if on else "off", rehearsal, row, asked)
    yield (
        f"hours: {asked.rows:,} such rows at {asked.speed:g} TFLOP/s a process; "
        f"a tenth of the {asked.memory:g} GiB is left to the driver and to gaps"
    )


def choose_row(rehearsal: Rehearsal, asked: Question) -> Row:
    """A row as asked for, with one picture and one window for each projector of the model."""
    config, recipe = rehearsal.config, rehearsal.recipe
    images = int("multi_modal_projector" in recipe.modules)
    windows = int("audio_projector" in recipe.modules)
    sound = _audio_tokens(config, asked.seconds) if windows else 0
    length = asked.length or recipe.data.max_length
    if length is None:
        raise ValueError("got a recipe without data.max_length: give --length, tokens of a row")
    media = (config.num_image_tokens if images else 0) + sound
    supervised = length - media if asked.supervised is None else asked.supervised
    if not 0 < supervised <= length - media:
        raise ValueError(
            f"got rows of {length} tokens, {media} of them media and {asked.supervised} "
            f"supervised, expected more than {media}, and no more supervised than are left"
        )
    return Row(length, supervised, images, windows, sound)


def _audio_tokens(config: PhiMMConfig, seconds: float | None) -> int:
    frames = config.audio_config.max_source_positions
    if seconds is not None:
        if not 0 < seconds * FRAMES_PER_SECOND <= frames:
            raise ValueError(
                f"got {seconds:g} seconds of sound, expected more than 0 and at most "
                f"{frames / FRAMES_PER_SECOND:g}, a window of the audio tower"
            )
        frames = math.ceil(seconds * FRAMES_PER_SECOND)
    return math.ceil(frames / config.audio_stack)


def largest_batch(rehearsal: Rehearsal, row: Row, room: float) -> int:
    """How many such rows fit into `room` bytes; 0 where none does."""

    def total(size: int) -> float:
        return rehearsal.take(size, row).total if size else 0

    likely = max(int((room - total(1)) // (total(2) - total(1))) + 1, 0)
    if total(likely) <= room < total(likely + 1):
        return likely
    above = likely + 1
    while total(above) <= room:
        above *= 2
    return bisect_right(range(above), room, key=total) - 1


def _memory_lines(estimate: Estimate, rehearsal: Rehearsal) -> list[str]:
    step = estimate.step
    names = {
        **{f"weights, {kind}": held for kind, held in estimate.weights.items()},
        f"optimiser states ({rehearsal.optimiser})": estimate.optimiser,
        "gradients being exchanged": estimate.exchange,
        "one 4-bit matrix unpacked": estimate.scratch,
        "gradients": step.gradients,
        "logits and their gradients": step.logits,
        "activations": step.activations,
    }
    lines = [f"{name:<44}{held / GIB:>8.2f} GiB" for name, held in names.items() if held]
    lines.append(f"{'together':<44}{estimate.total / GIB:>8.2f} GiB")
    if not step.logits:
        lines.append(f"{'logits, at a moment less full':<44}{step.largest_logits / GIB:>8.2f} GiB")
    return lines


def _choice_line(name: str, rehearsal: Rehearsal, row: Row, asked: Question) -> str:
    one, two = rehearsal.take(1, row), rehearsal.take(2, row)
    each = (two.total - one.total) / GIB
    size = largest_batch(rehearsal, row, USABLE * asked.memory * GIB)
    work = one.step.flops / 1e12
    hours = work * asked.rows / (asked.speed * asked.processes) / 3600
    return f"{name:<26}{each:>12.2f}{size:>18}{work:>14.1f}{hours:>10.1f}"
