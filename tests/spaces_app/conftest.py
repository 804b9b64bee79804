"""Random artefacts as the Space loads them, and media files with known content."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from phi_mm.hub.export import save_artefact

# The Space is run with its own folder as the working directory, and imports from there.
sys.path.insert(0, str(Path(__file__).parents[2] / "spaces_app"))


@pytest.fixture(scope="session")
def artefact(make_phi_mm: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `phi-mm export` writes it, of a model that sees and hears."""
    folder = tmp_path_factory.mktemp("space") / "artefact"
    save_artefact(*make_phi_mm(), folder)
    return folder


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.png to 3.png, pictures of noise; 0.wav to 3.wav, of different length and pitch."""
    folder = tmp_path_factory.mktemp("media")
    for number in range(4):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        times = np.arange(3_000 + 5_000 * number) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * 300 * (number + 1) * times)
        soundfile.write(folder / f"{number}.wav", tone + random.normal(0, 0.01, len(times)), 16_000)
    return folder


def user(*parts: str) -> dict:
    """A turn of the user: paths that end in .png or .wav are media, anything else is text."""

    def part(given: str) -> dict:
        kind = {".png": "image", ".wav": "audio"}.get(Path(given).suffix, "text")
        return {"type": kind, kind: given}

    return {"role": "user", "content": [part(given) for given in parts]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def answer_lent(lent, request, emit: Callable, ending):
    """What a `LentGenerator` answers, from beginning to end."""
    loan = lent.begin(request, emit, ending)
    while loan.answer is None:
        lent.step([loan])
    return loan.answer


@pytest.fixture(scope="session")
def loaded(artefact: Path):
    """Model and processor in float32."""
    from engine.loading import load

    return load(str(artefact), None, "fp32")


def plainly(model, processor, messages: list[dict], max_new_tokens: int) -> list[int]:
    """Token ids of the answer by transformers alone, from raw media, without any memory."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture
def make_engine(loaded, tmp_path: Path) -> Iterator[Callable]:
    """Engine that has loaded its model, with a store in tmp_path; closed when the test ends."""
    from engine.generation import Generator
    from engine.service import Engine, Limits
    from records.journal import Journal
    from records.store import Store

    made = []

    def make(**limits) -> Engine:
        journal = Journal(Store(tmp_path / "store", 100))
        load = partial(Generator, *loaded, 1 << 30, 1 << 30, name="toy@0123abc")
        made.append(Engine(load, Limits(**limits), journal))
        made[-1].start()
        made[-1].wait_until_loaded()
        return made[-1]

    yield make
    for engine in made:
        engine.close()
