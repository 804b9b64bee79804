"""Mixtures: exact counts, seeded draws, one order for one seed."""

import json
from collections import Counter

import pytest

from phi_mm.datasets import mixture


@pytest.fixture
def sources(tmp_path):
    paths = []
    for name, count in (("a", 10), ("b", 6)):
        rows = [
            {
                "id": f"{name}{i}" if name == "a" else i,
                name: i,  # a field that the other source lacks
                "image": f"{name}{i}.png",
                "conversations": [
                    {"from": "human", "value": "<image>"},
                    {"from": "gpt", "value": f"{name}{i}"},
                ],
            }
            for i in range(count)
        ]
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(rows))
    return paths


def answers(mixed):
    return [messages[1]["content"][0]["text"] for messages in mixed["messages"]]


def test_weight_repeats_and_limit_draws(sources):
    a, b = sources
    mixed = mixture([{"path": a, "weight": 2.5}, {"path": b, "limit": 3}], seed=0)
    counts = Counter(answers(mixed))
    assert len(mixed) == 28
    assert sorted(counts[f"a{i}"] for i in range(10)) == [2] * 5 + [3] * 5
    assert sorted(counts[f"b{i}"] for i in range(6)) == [0] * 3 + [1] * 3
    assert len(mixture([{"path": a, "weight": 0.2}], seed=0)) == 2


def test_one_seed_one_order(sources):
    spec = [{"path": path, "weight": 0.5} for path in sources]
    assert answers(mixture(spec, seed=3)) == answers(mixture(spec, seed=3))
    assert answers(mixture(spec, seed=3)) != answers(mixture(spec, seed=4))


def test_a_mixed_row_is_whole(sources, tmp_path):
    mixed = mixture([{"path": path} for path in sources], seed=1)
    assert mixed.column_names == ["id", "messages", "length"]
    assert mixed["length"][:] == [144] * 16
    for row in mixed:
        name = row["messages"][1]["content"][0]["text"]
        assert row["messages"][0]["content"] == [
            {"type": "image", "image": str(tmp_path / f"{name}.png")}
        ]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ([], "got no data sources"),
        ([{"weight": 1}], "expected path"),
        ([{"path": "a.json", "share": 1}], "expected path and any of"),
        ([{"path": "a.json", "weight": 0}], "got weight=0 for a.json, expected more than 0"),
        ([{"path": "a.json", "limit": -1}], "got limit=-1"),
    ],
)
def test_a_bad_source_is_refused(spec, reason):
    with pytest.raises(ValueError, match=reason):
        mixture(spec, seed=0)


def test_a_source_that_gives_no_row_is_refused(sources):
    with pytest.raises(ValueError, match="gives no row"):
        mixture([{"path": sources[0], "weight": 0.01}], seed=0)
