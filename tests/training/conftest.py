"""Small random Phi, CLIP and Whisper checkpoints, and a little data set, for the training tests."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from phi_mm.assembly import assemble
from phi_mm.datasets import mixture
from phi_mm.recipes import Recipe, load_recipe
from phi_mm.training import PhiMMTrainer
from processing import PhiMMCollator

WORDS = "what colour is the star ? red green blue say again how many one two hello world".split()
VOCABULARY_ROWS = 320  # 256 bytes and a few tokens: the rest is spare


def save_tokenizer(folder: Path, phi3: bool) -> None:
    """A byte-level tokenizer with the special tokens of Phi-2 or of Phi-3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    turns = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": turns if phi3 else []})
    tokenizer.save_pretrained(folder)


def save_phi(folder: Path, model_type: str = "phi", **settings: object) -> Path:
    """A random `phi` or `phi3` checkpoint whose head has a bias that matters where it has one."""
    width = 32
    cls, config_cls = {
        "phi": (PhiForCausalLM, PhiConfig),
        "phi3": (Phi3ForCausalLM, Phi3Config),
    }[model_type]
    config = config_cls(
        vocab_size=VOCABULARY_ROWS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=None,
        **settings,
    )
    model = cls(config)
    if model_type == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder)
    save_tokenizer(folder, phi3=model_type == "phi3")
    return folder


def save_clip(folder: Path, width: int = 32, layers: int = 3) -> Path:
    """A random whole CLIP of 16-pixel pictures, 4x4 patches."""
    tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=tower | {"num_hidden_layers": 1, "vocab_size": 99},
        vision_config=tower | {"num_hidden_layers": layers, "image_size": 16, "patch_size": 4},
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return folder


def save_whisper(folder: Path, width: int = 32, layers: int = 1) -> Path:
    """A random Whisper that hears 2-second windows in 16 mel bands."""
    special = dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0
    )
    config = WhisperConfig(
        vocab_size=64,
        num_mel_bins=16,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_source_positions=100,
        max_target_positions=32,
        **special,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=2).save_pretrained(folder)
    return folder


def save_rows(folder: Path, count: int, seed: int) -> Path:
    """LLaVA json of `count` rows: picture, recording, both, or text alone, in turn."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for i in range(count):
        row = {"id": f"row-{i}"}
        parts = []
        if i % 4 in (0, 2):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            row["image"] = f"{i}.png"
            parts.append("<image>")
        if i % 4 in (1, 2):
            samples = rng.normal(0, 0.1, int(rng.integers(4_000, 40_000)))
            soundfile.write(folder / f"{i}.wav", samples.astype(np.float32), 16_000)
            row["audio"] = f"{i}.wav"
            parts.append("<audio>")
        question = " ".join(rng.choice(WORDS, 4))
        answer = " ".join(rng.choice(WORDS, int(rng.integers(1, 4))))
        row["conversations"] = [
            {"from": "human", "value": "\n".join([*parts, question])},
            {"from": "gpt", "value": answer},
        ]
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small only wait for each other's threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the random checkpoints: phi, phi3, clip, whisper."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    return {
        "phi": save_phi(root / "phi"),
        "phi3": save_phi(root / "phi3", model_type="phi3"),
        "clip": save_clip(root / "clip"),
        "whisper": save_whisper(root / "whisper"),
    }


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA json of 24 rows with its media."""
    return save_rows(tmp_path_factory.mktemp("data") / "rows", 24, seed=0)


@pytest.fixture(scope="session")
def make_phi():
    """`save_phi`, for tests that want a checkpoint of their own."""
    return save_phi


@pytest.fixture
def recipe(bases: dict[str, Path], rows: Path, tmp_path: Path):
    """Function that gives a recipe on the random bases, with overrides."""

    def make(*overrides: str, text: str = "phi", tune: str = "qlora") -> Recipe:
        path = tmp_path / "base.yaml"
        lines = {
            "model": {k: str(v) for k, v in _parts(bases, text).items()},
            "data": {"train": str(rows)},
            "tune": {"language_model": tune, "learning_rates": _rates(overrides)},
            "training": {
                "output_dir": str(tmp_path / "run"),
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                "disable_tqdm": True,
                "use_cpu": True,
            },
        }
        if tune in ("lora", "qlora"):
            lines["lora"] = {"r": 4, "lora_alpha": 8}
        path.write_text(json.dumps(lines))  # JSON is YAML
        return load_recipe(path, overrides)

    return make


@pytest.fixture(scope="session")
def trainer():
    """Function that gives a trainer as train.py makes it, without the cache."""

    def make(recipe: Recipe, **settings: object) -> PhiMMTrainer:
        arguments = recipe.training_arguments()
        torch.manual_seed(arguments.seed)
        model, processor = assemble(recipe)
        return PhiMMTrainer(
            model=model,
            args=arguments,
            data_collator=PhiMMCollator(
                processor, None, recipe.data.max_length, recipe.data.packed_length
            ),
            train_dataset=mixture(recipe.data.train, arguments.seed),
            processing_class=processor,
            learning_rates=recipe.tune.learning_rates,
            gradient_norm_limit=recipe.tune.gradient_norm_limit,
            distillation=recipe.distillation,
            group_by_modality=recipe.data.group_by_modality,
            augmentation=recipe.data.augmentation,
            **settings,
        )

    return make


def _rates(overrides: tuple[str, ...]) -> dict[str, float]:
    """Of the projectors that there are."""
    gone = {"multi_modal_projector": "model.vision=null", "audio_projector": "model.audio=null"}
    return {name: 1e-2 for name, override in gone.items() if override not in overrides}


def _parts(bases: dict[str, Path], text: str) -> dict[str, Path]:
    return {"text": bases[text], "vision": bases["clip"], "audio": bases["whisper"]}
