"""Held-out questions, one a row, of a task and a kind: to choose by (val), to judge by (test)."""

import random

from phi_mm.tiny.facts import arithmetic, fact
from phi_mm.tiny.lessons import (
    Item,
    Recording,
    about,
    as_row,
    asked_about,
    description,
    recorded_sentence,
    repetition,
    speakable,
    told,
)
from phi_mm.tiny.questions import KINDS, Question, ask
from phi_mm.tiny.scenes import Scene, caption, sample_scene

TASKS = ("image_qa", "image_qa_spoken", "describe", "audio_qa", "asr", "listening", "text_qa")
PICTURE_KINDS = tuple(kind for kind in KINDS if kind != "describe")
TALK_KINDS = ("fact", "arithmetic", *PICTURE_KINDS)


def _scene_question(rng: random.Random, split: str, kind: str) -> tuple[Scene, Question]:
    """A question of the kind about some scene, short enough to be said aloud."""
    while True:
        scene = sample_scene(rng, split)
        question = ask(scene, kind, rng, split)
        if question and speakable(question.text):
            return scene, question


def _exam(
    item: Item,
    task: str,
    question: Question,
    user: str,
    image: str | None = None,
    recording: Recording | None = None,
    **fields: str,
) -> dict:
    """One question as a row, with its answer also in a field of its own."""
    row = as_row(f"{item.name}_{task}", [(user, question.answer)], image, **fields)
    row |= {"task": task, "kind": question.kind, "answer": question.answer}
    if recording:
        row |= {"audio": recording.path, "transcript": recording.text, "voice": recording.voice}
    return row


def picture(item: Item) -> list[dict]:
    """A picture asked about in writing, the same question asked aloud, and its description."""
    rng = item.chance()
    kind = PICTURE_KINDS[item.number % len(PICTURE_KINDS)]
    scene, question = _scene_question(rng, item.split, kind)
    described = description(scene, rng, item.split)
    image, recording = item.draw(scene, rng), item.record(question.text, rng)
    drawn = caption(scene)
    return [
        _exam(item, "image_qa", question, question.text, image, scene=drawn),
        _exam(item, "image_qa_spoken", question, "<audio>", image, recording, scene=drawn),
        _exam(item, "describe", described, described.text, image, scene=drawn),
    ]


def talk(item: Item) -> list[dict]:
    """A question without a picture, in writing and aloud; what it is about is told in words."""
    rng = item.chance()
    kind = TALK_KINDS[item.number % len(TALK_KINDS)]
    if kind in ("fact", "arithmetic"):
        make = fact if kind == "fact" else arithmetic
        question = make(rng, item.split)
        while not speakable(question.text) or any(letter.isdigit() for letter in question.text):
            question = make(rng, item.split)
        opening = ""
    else:
        scene, question = _scene_question(rng, item.split, kind)
        opening = told(scene, rng)
    recording = item.record(question.text, rng)
    return [
        _exam(item, "text_qa", question, opening + question.text),
        _exam(item, "audio_qa", question, f"{opening}<audio>", recording=recording),
    ]


def sentence(item: Item) -> list[dict]:
    """A sentence to be written down, and a typed question about how it sounds."""
    recording = recorded_sentence(item)
    rng = random.Random(item.name)
    user, answer = repetition(recording, rng)
    question = about(recording, rng, item.split, item.number)
    asked, _ = asked_about(recording, question)
    return [
        _exam(item, "asr", Question("asr", "", answer), user, recording=recording),
        _exam(item, "listening", question, asked, recording=recording),
    ]
