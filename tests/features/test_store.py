"""The store of features: equality, shards, killed writers, damage. `pytest tests/features`"""

from pathlib import Path

import psutil
import pytest
import torch

from phi_mm.features.storage import Storage
from phi_mm.features.store import FeatureStore
from phi_mm.features.writer import ShardWriter

FEATURES = {"a": (2, 2), "b": (3, 2), "c": (1, 2)}


def store(folder: Path, storage: str = "tower", **fingerprint: object) -> FeatureStore:
    return FeatureStore(folder, fingerprint, Storage(storage, torch.float32))


def write(folder: Path, features: dict[str, torch.Tensor], shard: int = 0) -> FeatureStore:
    made = store(folder)
    with ShardWriter(made, shard) as writer:
        writer.append(features.items())
    return made


def some() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in FEATURES.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_store_returns_what_it_was_given(tmp_path: Path, dtype: torch.dtype):
    storage = Storage("tower", dtype)
    wrote = FeatureStore(tmp_path, {}, storage)
    tensors = {f"k{n}": torch.randn(n, 3).to(dtype) for n in (1, 5, 2)}
    with ShardWriter(wrote) as writer:
        writer.append(tensors.items())
    read = FeatureStore(tmp_path, {}, storage)
    assert len(read) == 3 and "k5" in read and "k9" not in read
    for key, tensor in tensors.items():
        assert torch.equal(wrote[key], tensor)
        assert torch.equal(read[key], tensor)


def test_float16_halves_and_int8_quarters(tmp_path: Path):
    tensor = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -2, 2, 5
    ).unsqueeze(1)
    read = {}
    for storage in ("float16", "int8"):
        made = store(tmp_path / storage, storage)
        with ShardWriter(made) as writer:
            writer.append([("a", tensor)])
        read[storage] = store(tmp_path / storage, storage)["a"]
        size = (tmp_path / storage / "00000.bin").stat().st_size
        assert size == made.storage.size(5, 64) == {"float16": 640, "int8": 340}[storage]
    assert torch.equal(read["float16"], tensor.half())
    assert read["int8"].dtype == torch.float32
    half_step = tensor.abs().amax(-1, keepdim=True) / 127 / 2  # each row has a scale of its own
    assert ((read["int8"] - tensor).abs() <= half_step * 1.0001).all()
    largest = tensor.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(read["int8"].gather(1, largest), tensor.gather(1, largest))


def test_a_row_of_zeros_stays_zero_in_int8(tmp_path: Path):
    made = store(tmp_path, "int8")
    with ShardWriter(made) as writer:
        writer.append([("a", torch.zeros(2, 4))])
    assert torch.equal(made["a"], torch.zeros(2, 4))


def test_what_float16_cannot_hold_is_refused(tmp_path: Path):
    made = store(tmp_path, "float16")
    with ShardWriter(made) as writer, pytest.raises(ValueError, match=r"up to 7e\+04, which fl"):
        writer.append([("a", torch.full((1, 2), 7e4))])
    assert len(store(tmp_path, "float16")) == 0


def test_a_key_is_stored_once(tmp_path: Path):
    made = store(tmp_path)
    with ShardWriter(made) as writer:
        writer.append([("a", torch.zeros(2, 2)), ("a", torch.ones(2, 2))])
        writer.append([("a", torch.ones(2, 2))])
    assert (tmp_path / "00000.bin").stat().st_size == 16
    assert torch.equal(made["a"], torch.zeros(2, 2))


def test_shards_of_several_writers_are_read_as_one(tmp_path: Path):
    features = some()
    first = store(tmp_path)
    write(tmp_path, {"a": features["a"]}, shard=0)
    write(tmp_path, {"b": features["b"], "c": features["c"]}, shard=7)
    assert len(first) == 0
    first.refresh()
    for key, tensor in features.items():
        assert torch.equal(first[key], tensor)
    assert sorted(path.name for path in tmp_path.glob("0*")) == [
        "00000.bin",
        "00000.jsonl",
        "00007.bin",
        "00007.jsonl",
    ]


def test_two_writers_of_one_shard_are_refused(tmp_path: Path):
    with ShardWriter(store(tmp_path)), pytest.raises(ValueError, match="another process is wri"):
        ShardWriter(store(tmp_path)).__enter__()


def test_a_writer_keeps_what_another_wrote_after_it_looked(tmp_path: Path):
    features = some()
    early = store(tmp_path)
    write(tmp_path, {"a": features["a"]})
    with ShardWriter(early) as writer:
        writer.append([("b", features["b"])])
    read = store(tmp_path)
    assert torch.equal(read["a"], features["a"]) and torch.equal(read["b"], features["b"])


def test_killed_at_any_byte_it_goes_on_without_loss(tmp_path: Path):
    features = some()
    with ShardWriter(store(tmp_path / "whole")) as writer:  # each record is on disk before the next
        for item in features.items():
            writer.append([item])
    data, index = ((tmp_path / "whole" / f"00000.{end}").read_bytes() for end in ("bin", "jsonl"))
    lines = index.splitlines(keepends=True)
    states, at, told = [], 0, 0
    for line, (rows, width) in zip(lines, FEATURES.values(), strict=True):
        size = rows * width * 4
        states += [(at + n, told) for n in range(size + 1)]
        states += [(at + size, told + n) for n in range(1, len(line) + 1)]
        at, told = at + size, told + len(line)
    assert (at, told) == (len(data), len(index))
    for number, (bytes_written, index_written) in enumerate(states):
        folder = tmp_path / str(number)
        store(folder)
        (folder / "00000.bin").write_bytes(data[:bytes_written])
        (folder / "00000.jsonl").write_bytes(index[:index_written])
        kept = store(folder)
        for key in kept.records:
            assert torch.equal(kept[key], features[key])
        assert len(kept) == index[:index_written].count(b"\n")
        write(folder, features)
        assert (folder / "00000.bin").read_bytes() == data
        assert (folder / "00000.jsonl").read_bytes() == index


def test_any_flipped_byte_is_refused_or_computed_anew(tmp_path: Path):
    features = some()
    write(tmp_path, features)
    for name in ("00000.bin", "00000.jsonl"):
        path, right = tmp_path / name, (tmp_path / name).read_bytes()
        for place in range(len(right)):
            path.write_bytes(right[:place] + bytes([right[place] ^ 1]) + right[place + 1 :])
            refused, lost = False, set()
            try:
                damaged = store(tmp_path)
                for key, tensor in features.items():
                    if key not in damaged:
                        lost.add(key)
                    else:
                        assert torch.equal(damaged[key], tensor), (name, place)
            except ValueError as error:
                assert "Delete 00000.bin and 00000.jsonl" in str(error)
                refused = True
            # Letters of the index lines' own words may change; they are read by position.
            assert refused or lost or name == "00000.jsonl", (name, place)
        path.write_bytes(right)


def test_a_truncated_shard_is_refused(tmp_path: Path):
    write(tmp_path, some())
    path = tmp_path / "00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated: it holds 47 bytes and its index tells of 48"):
        store(tmp_path)


def test_a_damaged_record_is_named(tmp_path: Path):
    write(tmp_path, some())
    path = tmp_path / "00000.bin"
    raw = bytearray(path.read_bytes())
    raw[16] ^= 128
    path.write_bytes(raw)
    read = store(tmp_path)
    assert torch.equal(read["a"], some()["a"])
    with pytest.raises(ValueError, match=r"record of b at byte 16 of .*00000\.bin is damaged"):
        read["b"]


def test_a_stale_store_is_refused_naming_the_part(tmp_path: Path):
    store(tmp_path, layers=2, weights="abc")
    with pytest.raises(ValueError, match=r"stale; layers: stored 2, now 3\. Delete"):
        store(tmp_path, layers=3, weights="abc")
    with pytest.raises(ValueError, match=r"stale; storage: stored 'tower', now 'int8'\. Delete"):
        store(tmp_path, "int8", layers=2, weights="abc")


def test_features_of_another_dtype_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="float16, expected torch.float32"):
        write(tmp_path, {"a": torch.zeros(2, 2, dtype=torch.float16)})


def test_reading_all_of_a_large_store_keeps_none_of_it(tmp_path: Path):
    made, count = store(tmp_path), 128
    with ShardWriter(made) as writer:
        for number in range(count):
            writer.append([(str(number), torch.full((256, 1024), float(number)))])
    read = store(tmp_path)
    process = psutil.Process()
    assert read["0"][0, 0] == 0
    before = process.memory_info().rss
    for number in range(count):
        assert read[str(number)][-1, -1] == number
    grown = process.memory_info().rss - before
    assert (tmp_path / "00000.bin").stat().st_size == 128 << 20
    assert grown < 16 << 20


def test_a_store_can_be_sent_to_workers(tmp_path: Path):
    import pickle

    made = write(tmp_path, some())
    assert torch.equal(made["a"], pickle.loads(pickle.dumps(made))["a"])
