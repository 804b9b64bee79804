"""The feature cache: equality, resuming, refusal. `pytest tests/training/test_features.py`"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from phi_mm.assembly import join_parts
from phi_mm.datasets import mixture
from phi_mm.features import fill_cache, open_cache
from phi_mm.features.cache import content_key
from phi_mm.features.store import FeatureStore
from processing import PhiMMCollator


def store(folder: Path, **fingerprint: object) -> FeatureStore:
    return FeatureStore(folder, fingerprint, torch.float32)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_store_returns_what_it_was_given(tmp_path: Path, dtype: torch.dtype):
    wrote = FeatureStore(tmp_path, {}, dtype)
    tensors = {f"k{n}": torch.randn(n, 3).to(dtype) for n in (1, 5, 2)}
    wrote.append(tensors.items())
    read = FeatureStore(tmp_path, {}, dtype)
    assert len(read) == 3 and "k5" in read and "k9" not in read
    for key, tensor in tensors.items():
        assert torch.equal(wrote[key], tensor)
        assert torch.equal(read[key], tensor)


def test_a_key_is_stored_once(tmp_path: Path):
    features = store(tmp_path)
    features.append([("a", torch.zeros(2, 2)), ("a", torch.ones(2, 2))])
    features.append([("a", torch.ones(2, 2))])
    assert (tmp_path / "features.bin").stat().st_size == 16
    assert torch.equal(features["a"], torch.zeros(2, 2))


@pytest.mark.parametrize("torn", ["index", "data"])
def test_a_torn_record_is_cut_off_and_written_again(tmp_path: Path, torn: str):
    store(tmp_path).append([("a", torch.zeros(2, 2))])
    if torn == "index":  # killed while writing the line of a record whose bytes are there
        (tmp_path / "features.bin").open("ab").write(b"\1" * 16)
        (tmp_path / "index.jsonl").open("a").write('{"key": "b", "off')
    else:  # killed while writing the bytes
        (tmp_path / "features.bin").open("ab").write(b"\1" * 7)
    again = store(tmp_path)
    assert "a" in again and "b" not in again
    again.append([("b", torch.full((3, 2), 7.0))])
    read = store(tmp_path)
    assert torch.equal(read["a"], torch.zeros(2, 2))
    assert torch.equal(read["b"], torch.full((3, 2), 7.0))
    assert [line["offset"] for line in lines(tmp_path)] == [0, 16]
    assert (tmp_path / "features.bin").stat().st_size == 16 + 24


def test_a_stale_store_is_refused_naming_the_part(tmp_path: Path):
    store(tmp_path, layers=2, weights="abc")
    with pytest.raises(ValueError, match=r"stale; layers: stored 2, now 3\. Delete"):
        store(tmp_path, layers=3, weights="abc")


def test_features_of_another_dtype_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="float16, expected torch.float32"):
        store(tmp_path).append([("a", torch.zeros(2, 2, dtype=torch.float16))])


def test_cached_batches_give_the_live_loss(recipe, rows: Path, tmp_path: Path):
    model, processor = join_parts(recipe())
    data = mixture([{"path": str(rows)}], seed=0)
    cache = open_cache(tmp_path / "features", model, processor)
    fill_cache(cache, model, processor, [data], batch_size=5)
    assert [len(cache.stores[modality]) for modality in ("image", "audio")] == [12, 12]
    samples = [data[i] for i in range(len(data))]
    live, cached = PhiMMCollator(processor)(samples), PhiMMCollator(processor, cache)(samples)
    assert "pixel_values" in live and "pixel_values" not in cached
    assert torch.equal(live["input_ids"], cached["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**cached).loss, model(**live).loss, atol=1e-5, rtol=0)


def test_what_is_written_does_not_depend_on_how_often(recipe, rows: Path, tmp_path, monkeypatch):
    model, processor = join_parts(recipe())
    data = mixture([{"path": str(rows)}], seed=0)
    for name, at_once in (("seldom", 16 << 20), ("often", 1)):
        monkeypatch.setattr("phi_mm.features.cache.WRITTEN_AT_ONCE", at_once)
        cache = open_cache(tmp_path / name, model, processor)
        fill_cache(cache, model, processor, [data], batch_size=5)
    for file in ("image/features.bin", "audio/features.bin", "audio/index.jsonl"):
        assert (tmp_path / "often" / file).read_bytes() == (tmp_path / "seldom" / file).read_bytes()


def test_a_broken_picture_is_named_in_one_sentence(recipe, tmp_path: Path):
    model, processor = join_parts(recipe())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    pictures = [np.full((8, 8, 3), shade, dtype=np.uint8) for shade in range(5)]
    content = [{"type": "image", "image": p} for p in (*pictures, str(tmp_path / "broken.png"))]
    rows = [{"messages": [{"role": "user", "content": content}]}]
    cache = open_cache(tmp_path / "features", model, processor)
    with pytest.raises(ValueError, match=r"broken\.png") as caught:
        fill_cache(cache, model, processor, [rows], batch_size=2)
    assert "Traceback" not in str(caught.value)


def test_filling_goes_on_where_it_was_killed(recipe, rows: Path, tmp_path: Path):
    model, processor = join_parts(recipe())
    data = mixture([{"path": str(rows)}], seed=0)

    def fill(folder: Path) -> None:
        fill_cache(open_cache(folder, model, processor), model, processor, [data], batch_size=5)

    fill(tmp_path / "straight")
    straight = tmp_path / "straight" / "audio"
    killed = tmp_path / "killed" / "audio"
    killed.mkdir(parents=True)
    index = (straight / "index.jsonl").read_text().splitlines(keepends=True)
    (killed / "index.jsonl").write_text("".join(index[:5]) + index[5][:9])
    (killed / "features.bin").write_bytes((straight / "features.bin").read_bytes()[:-11])
    fill(tmp_path / "killed")
    for name in ("index.jsonl", "features.bin"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()


def test_same_content_under_two_names_is_encoded_once(recipe, tmp_path: Path):
    model, processor = join_parts(recipe())
    image = Image.fromarray(np.full((16, 16, 3), 99, dtype=np.uint8))
    for name in ("a.png", "b.png"):
        image.save(tmp_path / name)
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / n)}]}]}
        for n in ("a.png", "b.png")
    ]
    cache = open_cache(tmp_path / "features", model, processor)
    fill_cache(cache, model, processor, [rows])
    assert len(cache.stores["image"]) == 1
    assert torch.equal(cache.image(str(tmp_path / "a.png")), cache.image(str(tmp_path / "b.png")))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.vision_feature_layer=-1", "layers: stored 2, now 3"),
        ("model.dtype=bfloat16", "dtype: stored 'float32', now 'bfloat16'"),
    ],
)
def test_cache_of_another_tower_is_refused(recipe, tmp_path: Path, override: str, part: str):
    open_cache(tmp_path, *join_parts(recipe(tune="frozen")))
    with pytest.raises(ValueError, match=part):
        open_cache(tmp_path, *join_parts(recipe(override, tune="frozen")))


def test_cache_of_other_preprocessing_is_refused(recipe, tmp_path: Path):
    model, processor = join_parts(recipe(tune="frozen"))
    open_cache(tmp_path, model, processor)
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="preprocessing image_mean: stored"):
        open_cache(tmp_path, model, processor)


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
