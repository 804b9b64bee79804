"""The check of a mixture: counts, every fault by name, and what training makes of it."""

import json
import zipfile
from collections import Counter

import pytest
from PIL import Image

from phi_mm.datasets import check, mixture, write_page
from phi_mm.datasets.examination import examine
from phi_mm.datasets.faults import Kind
from phi_mm.datasets.report import histogram
from phi_mm.datasets.rows import read_rows
from processing import PhiMMCollator, PhiMMProcessor

from .conftest import save_sound


def row(name, question, answer="yes", **media):
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": said, **media}


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def messy(tmp_path):
    """Eleven rows, of which plain, seen, heard and both are sound."""
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "x.png")
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    Image.new("RGB", (8, 8), "red").save(tmp_path / "moving.png", "GIF")
    save_sound(tmp_path / "s.wav", seconds=0.5)
    save_sound(tmp_path / "cd.wav", seconds=1.3, rate=44100)
    unlearnt = row("unlearnt", "is it?")
    unlearnt["conversations"][1]["weight"] = 0
    rows = [
        row("plain", "is it so?"),
        row("seen", "<image>\nis it so?", image="x.png"),
        row("heard", "<audio>", audio="cd.wav"),
        row("both", "<image><audio>", image="x.png", audio="s.wav"),
        row("lost", "<image>", image="lost.png"),
        row("cut", "<image>is it?", image="cut.png"),
        row("gif", "<image>is it?", image="moving.png"),
        row("unmarked", "is it?", image="x.png"),
        row("alone", "is it?") | {"conversations": [{"from": "human", "value": "is it?"}]},
        unlearnt,
        row("long", "is it so? " * 50, "yes " * 50),
    ]
    return write(tmp_path / "rows.json", rows)


def counts(report):
    return {kind.name: len(found) for kind, found in report.by_kind.items() if found}


def test_report_without_a_processor(messy):
    report = check([{"path": str(messy)}])
    part = report.parts[0]
    assert (part.rows, part.answers) == (11, 9)
    assert (part.count("image"), part.count("audio")) == (5, 2)
    assert part.seconds == pytest.approx(1.8)
    assert counts(report) == {
        "FORM": 1, "PLACEHOLDERS": 1, "MISSING": 1, "CORRUPT": 1, "MISLABELLED": 1
    }  # fmt: skip
    assert report.faults == 5
    folder = messy.parent
    lines = str(report).splitlines()
    assert "  recordings  2 (1.8 s)" in lines
    assert "missing media: 1" in lines
    assert f"  {folder}/lost.png: missing (1 row, the first is lost of {messy})" in lines
    assert report.by_kind[Kind.CORRUPT][0].text.startswith(f"{folder}/cut.png: unreadable")
    assert f"{folder}/moving.png: mislabelled: holds GIF (1 row, the first is gif" in str(report)
    assert f"  {messy}, row unmarked: got 0 <image> markers and 1 image files" in str(report)
    assert "  training refuses 4 rows (at most 0 allowed)" in lines


def test_report_with_a_processor_counts_tokens_as_training_does(messy, processor):
    report = check([{"path": str(messy)}], processor=processor, max_length=100)
    examined = report.parts[0].examined
    collator = PhiMMCollator(processor)
    sound = ("plain", "seen", "heard", "both", "gif", "long")
    trained = {
        row["id"]: int(collator([row])["attention_mask"].sum())
        for row in examined.rows
        if row["id"] in sound
    }
    tokens = dict(zip(examined.rows["id"], examined.verdicts["tokens"], strict=True))
    assert {name: tokens[name] for name in sound} == trained
    assert trained["heard"] == trained["plain"] - 4 + 17  # 65 frames for 4 words
    assert counts(report)["UNLEARNABLE"] == 1
    assert report.by_kind[Kind.UNLEARNABLE][0].text.startswith("row unlearnt: got sample")
    # The question alone is longer than 100 tokens: cut there, nothing is left to learn.
    assert [finding.text.split(":")[0] for finding in report.by_kind[Kind.TOO_LONG]] == ["row long"]


def test_a_row_that_loses_its_end_is_told_from_one_that_cannot_be_cut(tmp_path, processor):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    rows = [
        row("fits", "is it?"),
        row("ends", "is it?", "yes " * 30),
        row("picture", "is it so " * 10 + "<image>", image="x.png"),
    ]
    path = str(write(tmp_path / "rows.json", rows))
    report = check([{"path": path}], processor=processor, max_length=20)
    assert counts(report) == {"TOO_LONG": 1, "CUT": 1}
    length = report.parts[0].examined.verdicts["tokens"][1]
    assert report.by_kind[Kind.CUT][0].text == (
        f"row ends of {path}: {length} tokens, of which 20 are kept"
    )
    assert "whose media do not end within max_length=20" in report.by_kind[Kind.TOO_LONG][0].text
    source = {"path": path, "on_bad_row": "skip", "skip_at_most": 1}
    kept = mixture([source], 0, processor, 20)
    assert sorted(kept["id"]) == ["ends", "fits"]
    # A length of exactly max_length is whole.
    whole = check([{"path": path}], processor=processor, max_length=length)
    assert counts(whole) == {"TOO_LONG": 1}


def test_media_without_a_tower(messy, processor):
    deaf = PhiMMProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        num_image_tokens=4,
        chat_template=processor.chat_template,
    )
    refused = check([{"path": str(messy)}], processor=deaf).by_kind[Kind.UNFIT]
    assert [finding.text.split(":")[0] for finding in refused] == ["row heard", "row both"]
    assert "no audio tower" in refused[0].text


def test_training_takes_what_the_check_passes_and_nothing_else(messy, processor, caplog):
    source = {"path": str(messy), "on_bad_row": "skip", "skip_at_most": 6}
    with caplog.at_level("WARNING"):
        kept = mixture([source], 0, processor, max_length=100)
    assert sorted(kept["id"]) == ["both", "gif", "heard", "plain", "seen"]
    assert f"skipped 6 bad rows of 11 in {messy}" in caplog.text
    collator = PhiMMCollator(processor, max_length=100)
    assert len(collator(list(kept))["input_ids"]) == 5
    for stricter, expected in (({"on_bad_row": "error", "skip_at_most": None}, "expected none"),
                               ({"skip_at_most": 5}, "expected at most 5")):  # fmt: skip
        with pytest.raises(ValueError, match=f"got 6 bad rows of 11 (.|\n)*{expected}"):
            mixture([source | stricter], 0, processor, max_length=100)


def test_a_limit_checks_only_the_rows_that_are_drawn(tmp_path, processor):
    rows = [row("lost", "<image>", image="lost.png"), *(row(str(n), "is it?") for n in range(30))]
    source = {"path": str(write(tmp_path / "rows.json", rows)), "limit": 5}
    clean = [s for s in range(8) if "MISSING" not in counts(check([source], seed=s))]
    assert clean  # 5 of 31: most draws miss the bad row
    assert len(mixture([source], clean[0], processor)) == 5
    names = check([source], seed=clean[0]).parts[0].examined.rows["id"]
    assert sorted(names) == sorted(mixture([source], clean[0], processor)["id"])


def test_what_was_examined_is_remembered_until_a_file_changes(messy, processor, monkeypatch):
    rows = read_rows(messy)
    before = examine(rows, processor, 100)
    opened = []
    with monkeypatch.context() as patch:
        patch.setattr("phi_mm.datasets.examination.media_facts", lambda *file: opened.append(file))
        again = examine(read_rows(messy), processor, 100)
    assert again.verdicts[:] == before.verdicts[:] and again.files[:] == before.files[:]
    assert opened == []
    Image.new("RGB", (9, 9)).save(messy.parent / "lost.png")
    found = examine(read_rows(messy), processor, 100)
    assert sum(fault is not None for fault in found.faults) == 5
    assert sum(fault is not None for fault in before.faults) == 6
    shorter = examine(read_rows(messy), processor, 12)
    assert Counter(f.kind for f in shorter.faults if f)[Kind.TOO_LONG] > 1


def test_many_rows_are_read_in_several_processes(tmp_path, processor):
    rows = [row(str(n), f"is it {'so ' * (n % 7)}?") for n in range(1200)]
    rows[700] = row("700", "<image>", image="lost.png")
    path = write(tmp_path / "rows.json", rows)
    report = check([{"path": str(path)}], processor=processor)
    tokens = report.parts[0].examined.verdicts["tokens"][:]
    collator = PhiMMCollator(processor)
    for index in (0, 699, 701, 1199):
        sample = report.parts[0].examined.rows[index]
        assert tokens[index] == len(collator([sample])["input_ids"][0])
    assert tokens[700] is None
    assert counts(report) == {"MISSING": 1, "DUPLICATE": 1192}


def test_duplicates_and_held_out_rows(tmp_path):
    for name, colour in (("x", "red"), ("y", "blue"), ("z", "green")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "x.png").read_bytes())
    train = [
        row("a", "<image>What is it?", "red", image="x.png"),
        row("b", "<image>\nWhat  is it?", "Red", image="copy.png"),  # the same by content
        row("c", "<image>What is it?", "blue", image="y.png"),
        row("d", "<image>what is  IT?", "green", image="z.png"),
        row("e", "two and two?", "four"),
        row("f", "what is it?", "words"),
    ]
    held_out = [
        row("v", "<image>what is it?", "a blue thing", image="y.png"),
        row("w", "<image>how big is it?", "big", image="z.png"),
        row("t", "Two and two?", "4"),
    ]
    paths = [
        str(write(tmp_path / name, rows))
        for name, rows in (
            ("train.json", train),
            ("val.json", held_out[:2]),
            ("test.json", held_out[2:]),
        )
    ]
    report = check([{"path": paths[0]}], [{"path": paths[1]}], [paths[2], paths[2]])
    assert [part.role for part in report.parts] == ["train", "validation", "evaluation"]
    assert {kind: [f.text for f in found] for kind, found in report.by_kind.items() if found} == {
        Kind.DUPLICATE: [f"row b of {paths[0]} says what row a of {paths[0]} says"],
        Kind.EVALUATED: [
            f"row c of {paths[0]} asks what row v of {paths[1]} asks",
            f"row e of {paths[0]} asks what row t of {paths[2]} asks",
        ],
        Kind.SHARED_MEDIA: [f"row d of {paths[0]} shows what row w of {paths[1]} shows"],
    }
    assert report.faults == 3  # shared media alone are a note


def test_the_page_shows_rows_and_needs_nothing_else(messy, processor, tmp_path):
    report = check([{"path": str(messy)}], processor=processor, max_length=100)
    page = write_page(report, tmp_path / "out", "rows <b>").read_text(encoding="utf-8")
    assert "<h1>rows &lt;b&gt;</h1>" in page
    assert f'<p class="bad">{report.faults} faults</p>' in page
    assert "http" not in page
    # All rows are examples: three pictures can be shown, one of them once more for its fault.
    assert page.count('src="data:image/') == 4 and page.count('src="data:audio/mpeg') == 2
    assert f"[image: {messy.parent}/lost.png]" in page
    bins = histogram(report.parts[0].tokens)
    assert sum(count for count, _, _ in bins) == len(report.parts[0].tokens)
    assert page.count("<rect") == len(bins)


# Real rows: what is wrong there, and nothing else.


def test_llama_factory_rows(samples):
    folder = samples / "llamafactory_demo"
    heard = check([{"path": str(folder / "mllm_audio_demo.json")}])
    assert (heard.parts[0].rows, heard.faults) == (3, 0)
    assert heard.parts[0].seconds == pytest.approx(4.032 + 2.901 + 5.855, abs=0.1)
    seen = check([{"path": str(folder / "mllm_demo.json")}])
    assert (seen.parts[0].count("image"), counts(seen)) == (8, {})
    for name in ("mllm_video_demo.json", "mllm_video_audio_demo.json"):
        video = check([{"path": str(folder / name)}])
        assert counts(video) == {"FORM": 3}
        assert all("got a row with 'videos'" in f.text for f in video.findings)
    for name, rows in (("identity.json", 91), ("alpaca_en_demo.json", 999)):
        other = check([{"path": str(folder / name)}])  # instruction and output: no turns
        assert counts(other) == {"FORM": rows}


def test_qwen_rows(samples, tmp_path):
    path = str(samples / "qwen_vl_demo/single_images.json")
    (tmp_path / "demo").symlink_to(samples / "qwen_vl_demo")  # the rows say demo/images/...
    assert counts(check([{"path": path, "media_root": str(tmp_path)}])) == {}
    lost = check([{"path": path}])
    assert counts(lost) == {"MISSING": 2}  # two pictures, one of them in two rows
    assert "10095.png: missing (2 rows, the first is 0 of" in lost.findings[0].text


def test_real_pictures_and_speech(samples, tmp_path):
    """Nothing is wrong with them but what is done to some here."""
    with zipfile.ZipFile(samples / "fsdd/recordings.zip") as clips:
        for name in clips.namelist()[:20]:
            clips.extract(name, tmp_path / "fsdd")
    folders = ("minimind_v_images", "llava_repo", "qwen_vl_demo", "jfk", "pocketsphinx_speech",
               "librispeech_bits", "llamafactory_demo")  # fmt: skip
    kinds = {
        "image": (".jpg", ".png"),
        "audio": (".wav", ".flac", ".mp3", ".ogg"),
    }
    found = [path for name in folders for path in sorted((samples / name).rglob("*"))]
    found += sorted((tmp_path / "fsdd").rglob("*"))
    media = [(k, str(p)) for p in found for k, ends in kinds.items() if p.suffix in ends]
    assert len(media) > 60
    rows = [row(path, f"<{kind}>What is it?", **{kind: path}) for kind, path in media]
    path = str(write(tmp_path / "rows.json", rows))
    assert counts(check([{"path": path}])) == {}

    picture = samples / "minimind_v_images/eval_images/image-04-yellow-car.jpg"
    speech = samples / "jfk/jfk.wav"
    for source, name in ((picture, "cut.jpg"), (speech, "cut.wav")):
        content = source.read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "named.flac").write_bytes(speech.read_bytes())
    broken = [
        row("one", "<image>What is it?", image="cut.jpg"),
        row("two", "<audio>What is it?", audio="cut.wav"),
        row("three", "<audio>What was said?", audio="named.flac"),
        row("four", "<image>What is IT?", image=str(picture)),
        row("five", "What is it?", image=str(picture)),
    ]
    report = check([{"path": str(write(tmp_path / "rows.json", rows + broken))}])
    assert counts(report) == {"PLACEHOLDERS": 1, "CORRUPT": 2, "MISLABELLED": 1, "DUPLICATE": 1}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("playground/data/coco2014_val_qa_eval/qa90_questions.jsonl", 90),
        ("playground/data/coco2014_val_gpt4_qa_30x3.jsonl", 90),
        ("llava/eval/table/question.jsonl", 80),
    ],
)
def test_questions_without_turns_are_no_rows(samples, name, rows):
    report = check([{"path": str(samples / "llava_repo" / name)}])
    assert counts(report) == {"FORM": rows}
    assert "got no turns, expected a list of them under" in report.findings[0].text
