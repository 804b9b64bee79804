"""The report on a data set: counts, and every fault by name."""

import json

import numpy as np
import pytest
import soundfile
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast, WhisperFeatureExtractor

from phi_mm.datasets import check, load_rows
from phi_mm.datasets.validation import audio_fault, image_fault
from processing import PhiMMCollator, PhiMMProcessor, chat_template_for


def save_sound(path, seconds=0.5, **options):
    samples = np.sin(np.arange(int(16000 * seconds)) / 10).astype(np.float32)
    soundfile.write(path, samples, 16000, **options)
    return path


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return str(path)


def test_image_faults_are_told_apart(tmp_path):
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    for name in ("good.png", "good.jpg", "cut.png", "cut.jpg"):
        picture.save(tmp_path / name)
    picture.save(tmp_path / "moving.jpg", "GIF")
    (tmp_path / "words.png").write_text("not a picture")
    assert image_fault(str(tmp_path / "good.png")) is None
    assert image_fault(str(tmp_path / "good.jpg")) is None
    assert image_fault(str(tmp_path / "none.png")) == "missing"
    assert image_fault(str(tmp_path / "moving.jpg")) == "mislabelled: holds GIF"
    assert image_fault(str(tmp_path / "words.png")).startswith("unreadable")
    assert image_fault(cut(tmp_path / "cut.png", 0.5)).startswith("unreadable")
    assert image_fault(cut(tmp_path / "cut.jpg", 0.5)).startswith("unreadable")


def test_audio_faults_are_told_apart(tmp_path):
    for name in ("good.wav", "good.flac", "good.mp3", "good.ogg", "cut.wav", "cut.flac"):
        save_sound(tmp_path / name)
    save_sound(tmp_path / "cut.mp3", seconds=5)
    save_sound(tmp_path / "named.wav", format="FLAC")
    save_sound(tmp_path / "empty.wav", seconds=0)
    soundfile.write(tmp_path / "nan.wav", np.full(9, np.nan), 16000, subtype="FLOAT")
    for name in ("good.wav", "good.flac", "good.mp3", "good.ogg"):
        assert audio_fault(str(tmp_path / name)) is None, name
    assert audio_fault(str(tmp_path / "none.wav")) == "missing"
    assert audio_fault(str(tmp_path / "named.wav")) == "mislabelled: holds FLAC"
    assert audio_fault(str(tmp_path / "empty.wav")) == "empty"
    assert audio_fault(str(tmp_path / "nan.wav")) == "holds values that are not finite"
    assert audio_fault(cut(tmp_path / "cut.wav", 0.5)) == "truncated"
    assert audio_fault(cut(tmp_path / "cut.mp3", 0.5)) == "truncated"
    assert audio_fault(cut(tmp_path / "cut.flac", 0.5)).startswith("unreadable")


@pytest.fixture
def messy(tmp_path):
    """Seven rows, three of them with a fault."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    save_sound(tmp_path / "s.wav", seconds=0.5)

    def row(name, question, **media):
        said = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
        return {"id": name, "conversations": said, **media}

    rows = [
        row("plain", "is it so?"),
        row("seen", "<image>\nis it so?", image="x.png"),
        row("heard", "<audio>", audio="s.wav"),
        row("both", "<image><audio>", image="x.png", audio="s.wav"),
        row("lost", "<image>", image="lost.png"),
        row("unmarked", "is it?", image="x.png"),
        row("long", "is it so? " * 50),
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_report_without_a_processor(messy):
    report = check(messy)
    assert (report.rows, report.turns) == (6, 6)
    assert report.media == {"image": 3, "audio": 2}
    assert report.audio_seconds == pytest.approx(1.0)
    assert len(report.files) == 3
    assert report.bad_files == [f"{messy.parent / 'lost.png'}: missing"]
    assert len(report.bad_rows) == 1 and "row unmarked: got 0 <image> markers" in report.bad_rows[0]
    assert report.faults == 2
    lines = str(report).splitlines()
    assert "recordings  2 (1.0 s)" in lines
    assert "bad media files: 1" in lines
    assert f"  {messy.parent / 'lost.png'}: missing" in lines


def test_real_rows_have_their_faults_named(samples):
    report = check(samples / "llamafactory_demo/mllm_audio_demo.json")
    assert (report.rows, report.faults) == (3, 0)
    assert report.audio_seconds == pytest.approx(4.032 + 2.901 + 5.855, abs=0.01)
    lost = check(samples / "qwen_vl_demo/single_images.json")  # its rows say demo/images/...
    assert len(lost.bad_files) == 2


@pytest.fixture(scope="module")
def processor():
    """A whole processor with a word tokenizer: 4 tokens a picture, one for 80 ms of sound."""
    words = ["<|endoftext|>", "<|image|>", "<|audio|>", "is", "it", "so", "?", "yes", "<unk>"]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        extra_special_tokens={"image_token": "<|image|>", "audio_token": "<|audio|>"},
    )
    return PhiMMProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8),
        feature_extractor=WhisperFeatureExtractor(),
        tokenizer=tokenizer,
        num_image_tokens=4,
        chat_template=chat_template_for(tokenizer),
    )


def test_report_with_a_processor_counts_tokens_as_training_does(messy, processor):
    report = check(messy, processor, max_length=100)
    rows = load_rows(messy, on_bad_row="skip")
    collator = PhiMMCollator(processor)
    trained = [int(collator([row])["attention_mask"].sum()) for row in rows if row["id"] != "lost"]
    assert report.token_lengths == trained
    assert len(report.too_long) == 1 and report.too_long[0].startswith("row long: ")
    assert report.refused == []
    assert report.faults == 3
    assert "rows over the maximum length: 1" in str(report)


def test_rows_the_model_cannot_take_are_reported(messy, processor):
    deaf = PhiMMProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        num_image_tokens=4,
        chat_template=processor.chat_template,
    )
    refused = check(messy, deaf).refused
    assert [line.split(":")[0] for line in refused] == ["row heard", "row both"]
    assert "no audio tower" in refused[0]
