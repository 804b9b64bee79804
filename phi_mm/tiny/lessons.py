"""What the tiny model is taught: conversations about pictures, recordings and plain text."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import soundfile

from phi_mm.tiny.drawing import OTHER_COLOURS, OTHER_OUTLINES, draw
from phi_mm.tiny.facts import arithmetic, fact, greeting
from phi_mm.tiny.language import (
    MAX_LETTERS,
    MAX_WORDS,
    REPEAT,
    describe,
    sentence,
    text_dialogue,
)
from phi_mm.tiny.listening import LISTENING_KINDS, listen
from phi_mm.tiny.questions import KINDS, Question, ask
from phi_mm.tiny.scenes import Scene, caption, renamed, sample_scene
from phi_mm.tiny.speech import SAMPLE_RATE, speak

# Share of pictures with colours and shapes beside the named ones: they break the habit of guessing
# colour and shape from each other, which is wrong on pairs never seen.
STRANGE_SHARE = 0.4
# What is asked about a picture, in turn; what is slowest to learn comes twice.
ROUND = (*KINDS, "count", "exist", "relation")
STAGE1_TURNS = (3, 6)  # and a description, from which most is learned
# Stage 2 takes the pictures through these in turn: how many turns are typed, how many spoken.
STAGE2_TURNS = (((7, 10), 0), ((0, 0), 3), ((7, 10), 0), ((4, 6), 1))
DESCRIBED_SHARE = 0.35  # of typed conversations in stage 2 that hold a description in any case
SMALL_TALK_SHARE = 0.04  # typed turns beside a picture that are not about it
SPEECH_TURNS = (1, 3)
SCENE_SHARE = 0.35  # spoken conversations without a picture that are about a scene in words


@dataclass(frozen=True)
class Recording:
    """A sound file of the world and what is said in it, at how many words a minute."""

    path: str
    text: str
    voice: str
    rate: int


@dataclass(frozen=True)
class Item:
    """One piece of the world: the same in any process, since its chance depends on it alone."""

    out: Path
    seed: int
    split: str
    kind: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.split}_{self.kind}_{self.number:05d}"

    def chance(self) -> random.Random:
        return random.Random(f"{self.seed} {self.name}")

    def draw(self, scene: Scene, rng: random.Random) -> str:
        """Write a picture of the scene; returns its path from `out`."""
        path = f"images/{self.name}.png"
        draw(scene, rng).save(self.out / path)
        return path

    def record(self, text: str, rng: random.Random, take: int = 0) -> Recording:
        """Have a voice of the split say the text, and write it (16 kHz mono, 16 bit)."""
        path = f"audio/{self.name}_{take}.flac"
        said = speak(text, rng, self.split)
        soundfile.write(self.out / path, said.audio, SAMPLE_RATE, subtype="PCM_16")
        return Recording(path, text, said.voice, said.rate)


def speakable(text: str) -> bool:
    """Whether the text surely fits into the tiny Whisper's window of 4 s."""
    return len(text.split()) <= MAX_WORDS and len(text) <= MAX_LETTERS


def questions(
    scene: Scene, rng: random.Random, split: str, spoken: bool = False
) -> Iterator[Question]:
    """Ever new questions about the scene, kind after kind, none in the same words twice.

    spoken: only those that fit into the tiny Whisper's window.
    """
    asked = set()
    while True:
        for kind in rng.sample(ROUND, len(ROUND)):
            found = ask(scene, kind, rng, split)
            if found and found.text not in asked and (not spoken or speakable(found.text)):
                asked.add(found.text)
                yield found


def description(scene: Scene, rng: random.Random, split: str) -> Question:
    """One that asks for the whole scene."""
    while True:
        found = ask(scene, "describe", rng, split)
        if found:
            return found


def told(scene: Scene, rng: random.Random) -> str:
    """The scene in words, to stand before a question about it."""
    return f"{describe(scene, rng)}. "


def small_talk(rng: random.Random, split: str) -> Question:
    """A fact, a sum in words or a greeting: what can be asked aloud without a scene."""
    [make] = rng.choices((fact, arithmetic, greeting), (0.4, 0.55, 0.05))
    while True:
        said = make(rng, split, digits=False) if make is arithmetic else make(rng, split)
        if speakable(said.text):
            return said


def as_row(
    name: str,
    turns: list[tuple[str, str]],
    image: str | None = None,
    recordings: list[Recording] | None = None,
    **fields: str,
) -> dict:
    """A row in the form of LLaVA-Instruct-150K, with recordings beside the picture."""
    row: dict = {"id": name}
    if image:
        row["image"] = image
        turns = [(f"<image>\n{turns[0][0]}", turns[0][1]), *turns[1:]]
    if recordings:
        row["audio"] = [recording.path for recording in recordings]
        row["transcripts"] = [recording.text for recording in recordings]
        row["voices"] = [recording.voice for recording in recordings]
    row["conversations"] = [
        {"from": speaker, "value": text}
        for turn in turns
        for speaker, text in zip(("human", "gpt"), turn, strict=True)
    ]
    return {**row, **fields}


def picture(item: Item) -> tuple[dict, dict, list[Recording]]:
    """A picture's typed conversation for stage 1 and its typed or spoken one for stage 2."""
    rng = item.chance()
    scene = sample_scene(rng, item.split)
    if rng.random() < STRANGE_SHARE:
        scene = renamed(scene, rng, [*OTHER_COLOURS], [*OTHER_OUTLINES])
    image, drawn = item.draw(scene, rng), caption(scene)

    written = questions(scene, rng, item.split)
    turns = [next(written) for _ in range(rng.randint(*STAGE1_TURNS))]
    turns.append(description(scene, rng, item.split))  # last: no answer can be read from it
    stage1 = as_row(item.name, [(q.text, q.answer) for q in turns], image, scene=drawn)

    (least, most), spoken = STAGE2_TURNS[item.number % len(STAGE2_TURNS)]
    turns = [
        small_talk(rng, item.split) if rng.random() < SMALL_TALK_SHARE else next(written)
        for _ in range(rng.randint(least, most))
    ]
    if turns and rng.random() < DESCRIBED_SHARE:
        turns[rng.randrange(len(turns))] = description(scene, rng, item.split)
    aloud = questions(scene, rng, item.split, spoken=True)
    said = [next(aloud) for _ in range(spoken)]
    recordings = [item.record(q.text, rng, take) for take, q in enumerate(said)]
    mixed = [(q.text, q.answer) for q in turns]
    # The recordings keep their order, whatever is typed in between.
    places = sorted(rng.sample(range(len(turns) + spoken), spoken))
    for place, question in zip(places, said, strict=True):
        mixed.insert(place, ("<audio>", question.answer))
    stage2 = as_row(item.name, mixed, image, recordings, scene=drawn)
    return stage1, stage2, recordings


def speech(item: Item) -> tuple[dict, list[Recording]]:
    """Spoken questions without a picture, some of them about a scene that is described in words."""
    rng = item.chance()
    count = rng.randint(*SPEECH_TURNS)
    if rng.random() < SCENE_SHARE:
        scene = sample_scene(rng, item.split)
        aloud = questions(scene, rng, item.split, spoken=True)
        said = [next(aloud) for _ in range(count)]
        opening = told(scene, rng)
    else:
        said = [small_talk(rng, item.split) for _ in range(count)]
        opening = ""
    turns = [(("" if take else opening) + "<audio>", q.answer) for take, q in enumerate(said)]
    recordings = [item.record(q.text, rng, take) for take, q in enumerate(said)]
    return as_row(item.name, turns, recordings=recordings), recordings


def text(item: Item) -> dict:
    """A conversation in text alone, so that the language model keeps what it can do."""
    return as_row(item.name, text_dialogue(item.chance(), item.split))


def recorded_sentence(item: Item) -> Recording:
    """A recording of one sentence."""
    rng = item.chance()
    return item.record(sentence(rng, item.split), rng)


def repetition(recording: Recording, rng: random.Random) -> tuple[str, str]:
    """A turn that asks to write down what is said, in the words the language model knows."""
    return rng.choice(REPEAT).format(x="<audio>"), recording.text.removesuffix(".")


def about(recording: Recording, rng: random.Random, split: str, first: int = 0) -> Question:
    """A typed question about the recording itself, of the first kind from `first` on that fits."""
    for number in range(first, first + len(LISTENING_KINDS)):
        kind = LISTENING_KINDS[number % len(LISTENING_KINDS)]
        said = recording.text, recording.voice, recording.rate
        question = listen(kind, *said, rng, split)
        if question:
            return question
    raise ValueError(f"got {recording}, expected a recording that something can be asked about")


def asked_about(recording: Recording, question: Question) -> tuple[str, str]:
    """A turn that plays the recording and asks about it."""
    return f"<audio>{question.text}", question.answer
