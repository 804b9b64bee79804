"""A cache of its own for every test, a processor, and the folder of real sample rows."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast, WhisperFeatureExtractor

from processing import PhiMMProcessor, chat_template_for

SAMPLES = Path(__file__).parents[2] / "../shared/data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def samples() -> Path:
    if not SAMPLES.is_dir():
        pytest.skip("the real sample rows (../shared/data) are not here")
    return SAMPLES.resolve()


@pytest.fixture(scope="session")
def processor() -> PhiMMProcessor:
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


def save_sound(path: Path, seconds: float = 0.5, rate: int = 16000, **options: object) -> Path:
    """A hum."""
    samples = np.sin(np.arange(int(rate * seconds)) / 10).astype(np.float32)
    soundfile.write(path, samples, rate, **options)
    return path
