"""The written world: what it holds, that nothing held out leaks into training, that it repeats."""

import json
import random
import re
from collections import Counter

import datasets
import pytest
import soundfile
from PIL import Image

from phi_mm.datasets import check, load_rows
from phi_mm.datasets.faults import Kind
from phi_mm.tiny.drawing import OTHER_COLOURS, OTHER_OUTLINES
from phi_mm.tiny.exams import PICTURE_KINDS, TALK_KINDS, TASKS
from phi_mm.tiny.language import REPEAT
from phi_mm.tiny.listening import LISTENING_KINDS, MEN, WOMEN, listen
from phi_mm.tiny.rows import write_world
from phi_mm.tiny.scenes import HELD_PAIRS, TEST_PAIRS, VALIDATION_PAIRS, split_of
from phi_mm.tiny.speech import TEST_VOICES, TRAIN_VOICES, VALIDATION_VOICES
from phi_mm.tiny.wordings import NUMBERS, named_pairs

AMOUNTS = {
    "images": 120,
    "speeches": 20,
    "sentences": 10,
    "texts": 400,
    "validation": 4,
    "test": 40,
}
FEW = {"images": 4, "speeches": 2, "sentences": 2, "texts": 2, "validation": 1, "test": 2}
VOICES = {"val": VALIDATION_VOICES, "test": TEST_VOICES}
SPLITS = {"val": "validation", "test": "test"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    write_world(out, seed=0, **AMOUNTS)
    return out


def rows_of(world, name):
    return json.loads((world / name).read_text())


def said(row, speaker):
    return [turn["value"] for turn in row["conversations"] if turn["from"] == speaker]


def content_of(out):
    """Every file of the world; the manifest too."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_nothing_held_out_is_in_a_training_row(world):
    held = TEST_PAIRS | VALIDATION_PAIRS
    seen = Counter()
    files = ("stage1.json", "stage2.json", "listening.json")
    for row in (row for name in files for row in rows_of(world, name)):
        spoken = row.get("transcripts", [])
        texts = [*said(row, "human"), *said(row, "gpt"), *spoken, row.get("scene", "")]
        assert not named_pairs(" | ".join(texts)) & held, row
        assert all(split_of(sentence) == "train" for sentence in spoken), row
        assert set(row.get("voices", [])) <= set(TRAIN_VOICES), row
        media = [row.get("image", "images/train_"), *row.get("audio", [])]
        assert all("/train_" in path for path in media), row
        if "image" in row:
            # A scene with other words is none that could be held out.
            strange = set(row["scene"].split()) & {*OTHER_COLOURS, *OTHER_OUTLINES}
            assert strange or split_of(row["scene"]) == "train", row
            for text in said(row, "human"):
                question = text.removeprefix("<image>\n")
                assert question == "<audio>" or split_of(question) == "train", row
        seen["rows"] += 1
        seen["turns"] += len(texts)
    assert seen["rows"] > 700 and seen["turns"] > 5000


@pytest.mark.parametrize("folder", ["val", "test"])
def test_held_out_rows_are_held_out_in_every_way(world, folder):
    pairs, others = HELD_PAIRS[SPLITS[folder]], TEST_PAIRS | VALIDATION_PAIRS
    for task in TASKS:
        for row in rows_of(world, f"{folder}/{task}.json"):
            if "scene" in row:
                assert named_pairs(row["scene"]) & pairs
                assert not named_pairs(row["scene"]) & (others - pairs)
            if "transcript" in row:
                assert split_of(row["transcript"]) == SPLITS[folder]
                assert row["voice"] in VOICES[folder]
            elif task in ("image_qa", "describe"):
                assert split_of(said(row, "human")[0].removeprefix("<image>\n")) == SPLITS[folder]


def test_every_task_asks_one_question_a_row_balanced_over_kinds(world):
    for task in TASKS:
        rows = rows_of(world, f"test/{task}.json")
        assert len(rows) == 40
        assert all(row["task"] == task and len(row["conversations"]) == 2 for row in rows)
        assert all(said(row, "gpt") == [row["answer"]] for row in rows)
        assert all(("image" in row) == (task in TASKS[:3]) for row in rows)
        assert all(
            ("audio" in row) == (task in ("image_qa_spoken", "audio_qa", "asr", "listening"))
            for row in rows
        )
    kinds = {
        task: Counter(row["kind"] for row in rows_of(world, f"test/{task}.json")) for task in TASKS
    }
    assert kinds["image_qa"] == kinds["image_qa_spoken"] == dict.fromkeys(PICTURE_KINDS, 5)
    assert kinds["audio_qa"] == kinds["text_qa"] == dict.fromkeys(TALK_KINDS, 4)


def test_spoken_tasks_ask_what_the_written_ones_ask(world):
    for written, spoken in (("image_qa", "image_qa_spoken"), ("text_qa", "audio_qa")):
        pairs = zip(
            rows_of(world, f"test/{written}.json"),
            rows_of(world, f"test/{spoken}.json"),
            strict=True,
        )
        for one, other in pairs:
            heard = said(other, "human")[0].replace("<audio>", other["transcript"])
            assert heard == said(one, "human")[0]
            assert one["answer"] == other["answer"]
            assert one.get("image") == other.get("image")


def test_typed_questions_about_recordings_are_true_of_them(world):
    found = Counter()
    for row in rows_of(world, "test/listening.json"):
        assert said(row, "human")[0].startswith("<audio>")
        assert row["audio"].startswith("../audio/test_sentence_")
        kind, variant = row["kind"], row["voice"].rpartition("+")[2]
        if kind == "words":
            assert NUMBERS.index(row["answer"]) == len(row["transcript"].split())
        if kind == "speaker":
            assert row["answer"] == ("a woman" if variant in WOMEN else "a man")
            assert variant in (*WOMEN, *MEN)
        found[kind, row["answer"]] += 1
    kinds = Counter(kind for kind, _ in found.elements())
    assert set(kinds) == set(LISTENING_KINDS) and min(kinds.values()) >= 8
    assert found["pace", "fast"] and found["pace", "slow"]
    recordings = list((world / "audio").glob("train_*"))
    taught = rows_of(world, "listening.json")
    assert len(taught) == round(0.3 * len(recordings))
    assert all(said(row, "human")[0].startswith("<audio>") for row in taught)


@pytest.mark.parametrize(
    ("kind", "voice", "rate", "answer"),
    [
        ("speaker", "en+f1", 190, "a woman"),
        ("speaker", "en-us+m3", 190, "a man"),
        ("speaker", "en+klatt3", 190, None),
        ("pace", "en+f1", 170, "slow"),
        ("pace", "en+f1", 171, None),
        ("pace", "en+f1", 200, "fast"),
        ("words", "en+f1", 190, "three"),
    ],
)
def test_what_is_not_clear_cut_is_not_asked(kind, voice, rate, answer):
    question = listen(kind, "how are you?", voice, rate, random.Random(0), "train")
    assert (question and question.answer) == answer


def test_stage1_has_long_picture_conversations_spoken_ones_and_repetitions(world):
    rows = rows_of(world, "stage1.json")
    pictures = [row for row in rows if "image" in row]
    repetitions = [row for row in rows if "repetition" in row["id"]]
    spoken = [row for row in rows if "speech" in row["id"]]
    assert len(pictures) == 120 and len(spoken) == 20
    assert len(pictures) + len(spoken) + len(repetitions) == len(rows)
    assert {len(said(row, "human")) for row in pictures} == {4, 5, 6, 7}
    for row in pictures:
        texts = said(row, "human")
        assert texts[0].startswith("<image>\n") and "<image>" not in "".join(texts[1:])
        assert len(set(texts)) == len(texts)
    asked = {wording.format(x="<audio>") for wording in REPEAT}
    for row in repetitions:
        assert set(said(row, "human")) <= asked
        assert said(row, "gpt") == [text.removesuffix(".") for text in row["transcripts"]]
    recordings = [path for row in repetitions for path in row["audio"]]
    on_disk = {f"audio/{path.name}" for path in (world / "audio").glob("train_*")}
    assert len(recordings) == len(set(recordings)) and set(recordings) == on_disk


def test_many_training_pictures_hold_colours_and_shapes_that_no_test_asks_for(world):
    strange = re.compile(rf"\b({'|'.join([*OTHER_COLOURS, *OTHER_OUTLINES])})\b")
    pictures = [row for row in rows_of(world, "stage1.json") if "image" in row]
    found = [row for row in pictures if strange.search(row["scene"])]
    assert 0.3 < len(found) / len(pictures) < 0.6
    for folder in ("val", "test"):
        for row in rows_of(world, f"{folder}/describe.json"):
            assert not strange.search(row["scene"] + row["answer"])


def test_what_pictures_hold_is_what_is_said_of_them(world):
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4}
    checked = Counter()
    for row in (row for row in rows_of(world, "stage1.json") if "image" in row):
        for question, answer in zip(said(row, "human"), said(row, "gpt"), strict=True):
            if answer.startswith("a ") and re.search(r" (on|at|in) the ", answer):
                assert answer == row["scene"]
                checked["describe"] += 1
            elif re.search(r"number of (things|shapes)( |\?|\.)", question):
                assert numbers[answer] == row["scene"].count(" and ") + 1
                checked["total"] += 1
    assert checked["describe"] > 80 and checked["total"] > 10


def test_stage2_mixes_typed_and_spoken_turns(world):
    rows = {row["id"]: row for row in rows_of(world, "stage2.json")}
    spoken = [len(rows[f"train_picture_{number:05d}"].get("audio", [])) for number in range(8)]
    assert spoken == [0, 3, 0, 1] * 2
    kinds = Counter(name.split("_")[1] for name in rows)
    assert (kinds["picture"], kinds["speech"], kinds["text"]) == (120, 20, 400)
    assert kinds["repetition"] > 15
    both = [row for row in rows.values() if "image" in row and "audio" in row]
    assert any(said(row, "human")[0] == "<image>\n<audio>" for row in both)
    assert any("<audio>" in said(row, "human")[1:] for row in both)


def test_media_have_the_form_that_the_towers_want(world):
    with Image.open(world / rows_of(world, "stage1.json")[0]["image"]) as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (48, 48), "RGB")
    for path in (world / "audio").iterdir():
        header = soundfile.info(path)
        assert (header.format, header.subtype) == ("FLAC", "PCM_16")
        assert (header.samplerate, header.channels) == (16000, 1)
        assert 0.2 < header.duration <= 4


def test_every_file_reads_without_a_fault(world, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    names = ["stage1", "stage2", "listening", "validation", *(f"test/{task}" for task in TASKS)]
    for name in names:
        report = check([{"path": str(world / f"{name}.json")}])
        assert report.parts[0].rows == len(rows_of(world, f"{name}.json"))
        # A world this small asks a thing twice; the whole one does not.
        assert {finding.kind for finding in report.findings} <= {Kind.DUPLICATE}, str(report)
    row = load_rows(world / "test/image_qa_spoken.json")[0]
    assert row["messages"][0]["content"] == [
        {"type": "image", "image": str(world / "images/test_picture_00000.png")},
        {"type": "audio", "audio": str(world / "audio/test_picture_00000_0.flac")},
    ]
    assert row["task"] == "image_qa_spoken" and row["transcript"]


def test_one_seed_one_world_whatever_the_workers(tmp_path):
    for name, seed, workers in (("a", 3, 2), ("b", 3, 1), ("c", 4, 1)):
        write_world(tmp_path / name, seed=seed, workers=workers, **FEW)
    first = content_of(tmp_path / "a")
    assert first == content_of(tmp_path / "b")
    other = content_of(tmp_path / "c")
    assert set(first) != set(other) or all(first[k] != other[k] for k in first if "images" in k)


def test_a_whole_world_is_kept_and_a_broken_or_other_one_rewritten(tmp_path):
    counts = write_world(tmp_path, seed=0, workers=1, **FEW)
    written = content_of(tmp_path)
    (tmp_path / "stage1.json").write_text("kept as it is")
    assert write_world(tmp_path, seed=0, workers=1, **FEW) == counts
    assert (tmp_path / "stage1.json").read_text() == "kept as it is"
    (tmp_path / "manifest.json").unlink()  # as an interrupted run leaves it
    assert write_world(tmp_path, seed=0, workers=1, **FEW) == counts
    assert content_of(tmp_path) == written
    more = write_world(tmp_path, seed=0, workers=1, **{**FEW, "texts": 3})
    assert more["stage2.json"] == counts["stage2.json"] + 1


def test_an_amount_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got test=0, expected at least 1"):
        write_world(tmp_path, seed=0, test=0)
