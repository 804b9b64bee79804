"""A cache of its own for every test, and the folder of real sample rows."""

from pathlib import Path

import datasets
import pytest

SAMPLES = Path(__file__).parents[2] / "../shared/data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def samples() -> Path:
    if not SAMPLES.is_dir():
        pytest.skip("the real sample rows (../shared/data) are not here")
    return SAMPLES.resolve()
