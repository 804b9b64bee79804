"""The feature cache: equality with live towers, keys, resuming, refusal. `pytest tests/features`"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from phi_mm.assembly import join_parts
from phi_mm.features import FeatureCache, fill_cache, open_cache
from phi_mm.features import keys as keys_module
from phi_mm.features.keys import content_key
from phi_mm.features.prediction import predict
from phi_mm.features.towers import fingerprint, load_towers
from phi_mm.recipes import load_recipe
from processing import PhiMMCollator

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(make_phi_mm):
    """A random model and its processor."""
    return make_phi_mm()


def filled(
    folder: Path, made, rows: list[dict], storage: str = "tower", **settings
) -> FeatureCache:
    model, processor = made
    cache = open_cache(folder, model.model, processor, storage)
    fill_cache(cache, model.model, processor, [rows], **settings)
    return cache


def test_cached_batches_give_the_live_loss(made, rows: list[dict], tmp_path: Path):
    model, processor = made
    cache = filled(tmp_path, made, rows, batch_size=4)
    assert [len(cache.stores[modality]) for modality in ("image", "audio")] == [5, 6]
    live, cached = PhiMMCollator(processor)(rows), PhiMMCollator(processor, cache)(rows)
    assert "pixel_values" in live and "pixel_values" not in cached
    assert torch.equal(live["input_ids"], cached["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**cached).loss, model(**live).loss, atol=1e-5, rtol=0)


def test_audio_keeps_its_true_length(made, rows: list[dict], tmp_path: Path):
    cache = filled(tmp_path, made, rows)
    parts = [row["messages"][0]["content"] for row in rows[:6]]
    sources = [part["audio"] for content in parts for part in content if part["type"] == "audio"]
    frames = [len(cache.audio(source)) for source in sources]
    # A window of one second has 50 frames of 20 ms; the last window ends where the sound does.
    assert frames == [5, 25, 50, 50, 51, 125]


def test_smaller_forms_change_the_logits_a_little(made, rows: list[dict], tmp_path: Path):
    model, processor = made
    with torch.no_grad():
        live = model(**PhiMMCollator(processor)(rows)).logits
        errors = {}
        for storage in ("float16", "int8"):
            cache = filled(tmp_path / storage, made, rows, storage)
            logits = model(**PhiMMCollator(processor, cache)(rows)).logits
            errors[storage] = ((logits - live).abs().max() / live.std()).item()
    assert 0 < errors["float16"] < 0.01
    assert errors["float16"] < errors["int8"] < 0.2


def test_what_is_written_does_not_depend_on_how_often(made, rows, tmp_path, monkeypatch):
    for name, at_once in (("seldom", 16 << 20), ("often", 1)):
        monkeypatch.setattr("phi_mm.features.filling.WRITTEN_AT_ONCE", at_once)
        filled(tmp_path / name, made, rows, batch_size=2)
    for file in ("image/00000.bin", "audio/00000.bin", "audio/00000.jsonl"):
        assert (tmp_path / "often" / file).read_bytes() == (tmp_path / "seldom" / file).read_bytes()


def test_filling_goes_on_where_it_was_killed(made, rows: list[dict], tmp_path: Path):
    filled(tmp_path / "straight", made, rows, batch_size=3)
    straight, killed = tmp_path / "straight" / "audio", tmp_path / "killed" / "audio"
    killed.mkdir(parents=True)
    index = (straight / "00000.jsonl").read_text().splitlines(keepends=True)
    (killed / "00000.jsonl").write_text("".join(index[:3]) + index[3][:9])
    (killed / "00000.bin").write_bytes((straight / "00000.bin").read_bytes()[:-11])
    filled(tmp_path / "killed", made, rows, batch_size=3)
    for name in ("00000.jsonl", "00000.bin"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()


def test_a_broken_picture_is_named_in_one_sentence(made, one_picture, tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    pictures = [np.full((8, 8, 3), shade, dtype=np.uint8) for shade in range(5)]
    rows = [one_picture(source) for source in (*pictures, str(tmp_path / "broken.png"))]
    with pytest.raises(ValueError, match=r"broken\.png") as caught:
        filled(tmp_path / "features", made, rows, batch_size=2)
    assert "Traceback" not in str(caught.value)


def test_a_broken_or_missing_recording_is_named(made, tmp_path: Path):
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    for name, words in (("broken.wav", "expected a recording"), ("none.wav", "expected a file")):
        part = {"type": "audio", "audio": str(tmp_path / name)}
        rows = [{"messages": [{"role": "user", "content": [part]}]}]
        with pytest.raises(ValueError, match=f"{name}'?, {words}"):
            filled(tmp_path / "features", made, rows)


def test_same_content_under_two_names_is_encoded_once(made, one_picture, tmp_path: Path):
    image = Image.fromarray(np.full((16, 16, 3), 99, dtype=np.uint8))
    names = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for name in names:
        image.save(name)
    cache = filled(tmp_path / "features", made, [one_picture(name) for name in names])
    assert len(cache.stores["image"]) == 1
    assert torch.equal(cache.image(names[0]), cache.image(names[1]))


def test_a_second_start_reads_no_file_that_has_not_changed(
    made, rows, one_picture, tmp_path: Path, monkeypatch
):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((16, 16, 3), 99, dtype=np.uint8)).save(path)
    rows = [*rows, one_picture(str(path))]
    filled(tmp_path / "features", made, rows)
    assert len(json.loads((tmp_path / "features" / "files.json").read_text())) == 12
    read = []
    monkeypatch.setattr(keys_module, "content_key", lambda p: read.append(p) or content_key(p))
    filled(tmp_path / "features", made, rows)
    assert read == []
    Image.fromarray(np.full((16, 16, 3), 98, dtype=np.uint8)).save(path)
    os.utime(path, ns=(1, 1))
    cache = filled(tmp_path / "features", made, rows)
    assert read == [str(path)]
    assert len(cache.stores["image"]) == 7


def test_size_is_predicted_to_the_byte(made, rows: list[dict], tmp_path: Path):
    model, processor = made
    for storage in ("tower", "float16", "int8"):
        cache = open_cache(tmp_path / storage, model.model, processor, storage)
        predictions = fill_cache(cache, model.model, processor, [rows])
        for one in predictions:
            written = (tmp_path / storage / one.modality / "00000.bin").stat().st_size
            assert one.size - one.missing * 128 == written
    image, audio = predictions
    assert (image.distinct, image.missing, image.tokens, image.width) == (5, 5, 80, 16)
    assert (audio.distinct, audio.missing, audio.tokens, audio.width) == (6, 6, 306, 16)
    again = predict(cache, model.model, processor, cache.find_media([rows]))
    assert [(one.missing, one.size) for one in again] == [(0, 0), (0, 0)]
    told = "image: 5 distinct, 5 to compute, 80 tokens of 16 numbers: 2.24 kB, 0.45 kB each"
    assert str(image) == told


def test_a_disk_that_is_too_small_is_refused_before_anything(made, rows, tmp_path, monkeypatch):
    class Usage:
        free = 1_000_001_000

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(ValueError, match=r"got 1\.00 GB free in .*, expected 26\.11 kB for the ca"):
        filled(tmp_path, made, rows)
    assert not list(tmp_path.rglob("*.bin"))


def test_cache_of_another_tower_is_refused(make_phi_mm, tmp_path: Path):
    model, processor = make_phi_mm()
    open_cache(tmp_path, model.model, processor)
    more, _ = make_phi_mm(vision_feature_layer=-1)
    with pytest.raises(ValueError, match="layers: stored 2, now 3"):
        open_cache(tmp_path, more.model, processor)
    other, _ = make_phi_mm(seed=1)
    with pytest.raises(ValueError, match="weights: stored"):
        open_cache(tmp_path, other.model, processor)
    with pytest.raises(ValueError, match="dtype: stored 'float32', now 'bfloat16'"):
        open_cache(tmp_path, model.model.bfloat16(), processor)


def test_cache_of_other_preprocessing_is_refused(make_phi_mm, tmp_path: Path):
    model, processor = make_phi_mm()
    open_cache(tmp_path, model.model, processor)
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="preprocessing image_mean: stored"):
        open_cache(tmp_path, model.model, processor)


def test_the_transcript_route_caches_no_audio(make_phi_mm, rows, tmp_path: Path):
    model, processor = make_phi_mm(audio_route="transcript")
    processor.transcript_tokenizer = processor.tokenizer  # bytes: ids of Whisper's toy vocabulary
    cache = filled(tmp_path, (model, processor), rows)
    assert list(cache.stores) == ["image"] and len(cache.stores["image"]) == 5
    recording = rows[5]["messages"][0]["content"][1]
    written = processor.transcribe([{"role": "user", "content": [recording]}], model)
    assert written[0]["content"] == [{"type": "text", "text": cache.audio(recording["audio"])}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_towers_alone_are_those_of_the_joined_model(dtype: str, monkeypatch):
    monkeypatch.chdir(ROOT)
    for stage in ("stage1", "stage2"):  # the second has the language model in 4-bit
        recipe = load_recipe(f"recipes/tiny/{stage}.yaml", [f"model.dtype={dtype}"])
        towers, processor = load_towers(recipe)
        model, whole = join_parts(recipe)
        for modality, name in (("image", "vision_tower"), ("audio", "audio_tower")):
            alone = fingerprint(getattr(towers, name), processor, modality)
            assert alone == fingerprint(getattr(model.model, name), whole, modality)
        pixels, mel = torch.randn(2, 3, 48, 48), torch.randn(1, 40, 400)
        with torch.no_grad():
            for call, given in (("get_vision_features", pixels), ("get_audio_tower_features", mel)):
                assert torch.equal(getattr(towers, call)(given), getattr(model.model, call)(given))


def test_content_keys_tell_contents_apart():
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    sound = np.zeros(16, dtype=np.float32)
    keys = [
        content_key(item)
        for item in (
            pixels,
            pixels[:2],
            Image.fromarray(pixels),
            Image.fromarray(pixels).convert("L"),
            sound,
            (sound, 16_000),
            (sound, 8_000),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert content_key({"array": sound, "sampling_rate": 8_000}) == content_key((sound, 8_000))
    with pytest.raises(ValueError, match="got int"):
        content_key(3)
