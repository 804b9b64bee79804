"""A random run with questions about pictures, recordings and text, for the evaluation tests."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

COLOURS = ("red", "green", "blue", "yellow")
ENTRIES = [
    {"task": "image_qa", "metric": "exact_match"},
    {"task": "image_qa", "metric": "exact_match", "control": "blank"},
    {"task": "image_qa", "metric": "exact_match", "control": "shuffled"},
    {"task": "audio_qa", "metric": "exact_match", "control": "silence"},
    {"task": "asr", "metric": "wer"},
    {"task": "text_qa", "metric": "exact_match"},
]


def save_rows(folder: Path) -> None:
    """Twelve pictures and recordings, each asked about in one row of each task."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {"image_qa": [], "audio_qa": [], "asr": [], "text_qa": []}
    for number in range(12):
        colour = COLOURS[number % 4]
        Image.new("RGB", (9 + number, 8), colour).save(folder / f"{number}.png")
        sound = rng.normal(0, 0.1, 2_000 + 1_500 * number).astype(np.float32)
        soundfile.write(folder / f"{number}.flac", sound, 16_000)
        words = " ".join(["say"] * (number + 1))
        shown, heard = {"image": f"../{number}.png"}, {"audio": f"../{number}.flac"}
        for task, question, answer, kind, media in (
            ("image_qa", f"<image>\nwhat colour? {words}", colour, "colour", shown),
            ("audio_qa", "<audio>", "yes" if number < 8 else "no", "exist", heard),
            ("asr", f"<audio> {words}", f"the {colour} star", None, heard),
            ("text_qa", f"{words}?", f"{number % 2}", "fact" if number < 9 else "sum", {}),
        ):
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            row = {"id": f"{task}-{number}", "conversations": turns, "answer": answer, **media}
            rows[task].append(row | ({"kind": kind} if kind else {}))
            if media is heard:
                rows[task][-1]["transcript"] = f"said {number}"
    for split in ("test", "val"):
        (folder / split).mkdir()
        for task, listed in rows.items():
            text = json.dumps(listed if split == "test" else listed[:5])
            (folder / split / f"{task}.json").write_text(text)


def recipe(world: Path, run: Path, entries: list[dict]) -> dict:
    """The recipe of a run whose weights all stand in its folder."""
    return {
        "model": {"text": "unused", "vision": "unused", "audio": "unused"},
        "data": {"train": str(world / "test" / "text_qa.json")},
        "tune": {"language_model": "full"},
        "training": {"output_dir": str(run)},
        "evaluation": [
            {"data": str(world / "test" / f"{entry['task']}.json"), **entry} for entry in entries
        ],
    }


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with test/ and val/ and the media."""
    folder = tmp_path_factory.mktemp("world")
    save_rows(folder)
    return folder


@pytest.fixture(scope="session")
def run(world: Path, make_phi_mm: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, as full fine-tuning leaves it, of a random model."""
    folder = tmp_path_factory.mktemp("runs") / "stage2"
    model, processor = make_phi_mm()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(world, folder, ENTRIES)))
    return folder
