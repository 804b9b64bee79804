"""Tiny random models and processors for all tests: no download, no training."""

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
import torch
import transformers.utils.hub
from conformance_table import Table
from loopback import LoopbackHub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from modeling_phi_mm import PhiMMConfig, PhiMMForConditionalGeneration
from processing import PhiMMProcessor, chat_template_for

SAMPLES = Path(__file__).parents[1] / "../shared/data"
BYTES = len(pre_tokenizers.ByteLevel.alphabet())  # 256: the tokenizer below has one token a byte
VOCABULARY = 300  # leaves spare rows after bytes and special tokens, as Phi-2 has


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "write the table of conformance to this file"
    parser.addoption("--write-table", metavar="PATH", type=Path, help=words)


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--write-table")
    if path is not None:
        config.pluginmanager.register(Table(path))


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of real media, rows and tokenizers; tests that need it skip where it is absent."""
    if not SAMPLES.is_dir():
        pytest.skip(f"the real samples are not there: {SAMPLES}")
    return SAMPLES


def byte_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with the special tokens of a Phi family."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    if family == "phi3":
        turns = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
        tokenizer.add_special_tokens(
            {"extra_special_tokens": turns}, replace_extra_special_tokens=False
        )
    media = ["<|image|>", "<|audio|>"]
    tokenizer.add_special_tokens(
        {"extra_special_tokens": media}, replace_extra_special_tokens=False
    )
    return tokenizer


def text_config(family: str, eos_token_id: int, pad_token_id: int) -> PhiConfig | Phi3Config:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "eos_token_id": eos_token_id,
        "bos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "initializer_range": 0.3,  # far from uniform logits, so that wrong inputs change the answer
    }
    return PhiConfig(**shape) if family == "phi" else Phi3Config(**shape)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=2,
    )


def audio_config(max_source_positions: int = 50) -> WhisperConfig:
    return WhisperConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=max_source_positions,
        pad_token_id=60,
        bos_token_id=61,
        eos_token_id=61,
        decoder_start_token_id=62,
        init_std=0.2,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )


def image_processor(side: int = 8) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def build(
    family: str = "phi", vision: bool = True, audio: bool = True, seed: int = 0, **config_fields
) -> tuple[PhiMMForConditionalGeneration, PhiMMProcessor]:
    """A random model in eval mode with its processor; audio windows last one second."""
    tokenizer = byte_tokenizer(family)
    config = PhiMMConfig(
        text_config=text_config(family, tokenizer.eos_token_id, tokenizer.pad_token_id),
        vision_config=vision_config() if vision else None,
        audio_config=audio_config() if audio else None,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio|>"),
        **config_fields,
    )
    torch.manual_seed(seed)
    model = PhiMMForConditionalGeneration(config).eval()
    for projector in (model.model.multi_modal_projector, model.model.audio_projector):
        for weight in projector.parameters() if projector is not None else ():
            torch.nn.init.normal_(weight, std=0.3)  # as loud as the word embeddings
    model.generation_config.suppress_tokens = [config.image_token_id, config.audio_token_id]
    processor = PhiMMProcessor(
        image_processor=image_processor() if vision else None,
        feature_extractor=WhisperFeatureExtractor(feature_size=8, chunk_length=1)
        if audio
        else None,
        tokenizer=tokenizer,
        num_image_tokens=config.num_image_tokens if vision else 0,
        audio_stack=config.audio_stack,
        chat_template=chat_template_for(tokenizer),
    )
    return model, processor


@pytest.fixture(scope="session")
def make_phi_mm() -> Callable[..., tuple[PhiMMForConditionalGeneration, PhiMMProcessor]]:
    """`build` above, for tests that need their own configuration."""
    return build


@pytest.fixture(params=["phi", "phi3"])
def phi_mm(request) -> tuple[PhiMMForConditionalGeneration, PhiMMProcessor]:
    """A model and its processor, once for each family of language model."""
    return build(request.param)


@pytest.fixture(scope="session")
def loopback() -> Iterator[LoopbackHub]:
    """A Hub on the loopback, one for the session; it stays empty until something is pushed."""
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def login(
    loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str | None], None]:
    """Points this process, and those that it starts, at the loopback Hub with an empty cache.

    Call it with a token, or with None for nobody. huggingface_hub reads its settings when it is
    imported, so they are set in its constants as well as in the environment.
    """
    settings = {
        "ENDPOINT": loopback.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": loopback.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,  # the loopback Hub does not speak it
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    # These two keep the endpoint that they began with.
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", loopback.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_ENDPOINT", loopback.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def as_user(token: str | None) -> None:
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)

    return as_user
