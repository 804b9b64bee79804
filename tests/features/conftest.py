"""Rows with pictures and recordings in files, for a random model."""

import numpy as np
import pytest
import soundfile
from PIL import Image


def image_row(source: object) -> dict:
    return row({"type": "image", "image": source})


def row(*media: dict) -> dict:
    asked = {"role": "user", "content": [*media, {"type": "text", "text": "what is it ?"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "a red star"}]}
    return {"messages": [asked, said]}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """12 rows with five different pictures and six recordings of 0.1 to 2.5 seconds."""
    folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    pictures, recordings = [], []
    for number in range(5):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
        pictures.append({"type": "image", "image": str(path)})
    for number, seconds in enumerate((0.1, 0.5, 0.99, 1.0, 1.01, 2.5)):
        path = folder / f"{number}.wav"
        soundfile.write(path, rng.normal(0, 0.1, int(16_000 * seconds)), 16_000)
        recordings.append({"type": "audio", "audio": str(path)})
    made = [row(pictures[n % 5], recordings[n % 6]) for n in range(10)]
    return [*made, row(pictures[0]), row()]


@pytest.fixture
def one_picture() -> callable:
    """Function that makes a row of a picture."""
    return image_row
