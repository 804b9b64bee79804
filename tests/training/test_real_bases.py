"""The recipes for real bases, on random weights behind the real tokenizers and input sizes.

    pytest tests/training/test_real_bases.py

Depth and width are cut down; vocabulary, picture size and mel windows are the real ones.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from phi_mm.assembly import assemble
from phi_mm.recipes import load_recipe
from processing import PhiMMCollator

ROOT = Path(__file__).parents[2]
TOKENIZERS = (ROOT / "../shared/data/tokenizers/onnxruntime-extensions").resolve()
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ON_CPU = (
    "model.dtype=float32",
    "training.bf16=false",
    "training.use_cpu=true",
    "training.report_to=none",
)


def phi_2() -> PreTrainedModel:
    ends = {"bos_token_id": 50256, "eos_token_id": 50256}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return PhiForCausalLM(PhiConfig(vocab_size=51200, rope_parameters=rope, **ends, **SMALL))


def phi_3_5_mini() -> PreTrainedModel:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 4096,
    }
    ends = {"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000}
    sizes = {"vocab_size": 32064, "max_position_embeddings": 131072}
    return Phi3ForCausalLM(Phi3Config(rope_parameters=rope, **sizes, **ends, **SMALL))


def phi_4_mini() -> PreTrainedModel:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0] * 6,
        "long_factor": [2.0] * 6,
        "original_max_position_embeddings": 4096,
    }
    ends = {"bos_token_id": 199999, "eos_token_id": 199999, "pad_token_id": 199999}
    sizes = {"vocab_size": 200064, "max_position_embeddings": 131072, "num_key_value_heads": 2}
    tied = {"tie_word_embeddings": True}
    return Phi3ForCausalLM(Phi3Config(rope_parameters=rope, **sizes, **ends, **tied, **SMALL))


# Phi-4-mini's vocabulary is not among the samples: here it has the words of Phi-3.
BASES = {
    "phi-2": (phi_2, "phi-2"),
    "phi-1.5": (phi_2, "phi-2"),
    "phi-3.5-mini": (phi_3_5_mini, "phi-3-mini"),
    "phi-4-mini": (phi_4_mini, "phi-3-mini"),
}
RUNS = {
    "stage1": ("image",),
    "stage2": ("image",),
    "mix665k": ("image",),
    "audio": ("audio",),
    "joint": ("image", "audio"),
}
ALIGNMENTS = ("stage1", "audio")
VARIANTS = [
    (run, variant)
    for run in RUNS
    for variant in (("frozen",) if run in ALIGNMENTS else ("qlora", "lora"))
]
TOKENS = {"image": 576, "audio": 19}  # 24x24 patches; 1.5 s are 75 frames of 20 ms, by fours


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """CLIP of 336 pixels in patches of 14 and a Whisper of 30 s in 80 mel bands."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(image_size=336, patch_size=14, **SMALL)).save_pretrained(
        root / "clip"
    )
    size = {"height": 336, "width": 336}
    CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=size).save_pretrained(root / "clip")
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = WhisperConfig(d_model=64, encoder_layers=2, decoder_layers=1, **heads)
    WhisperForConditionalGeneration(config).save_pretrained(root / "whisper")
    WhisperFeatureExtractor().save_pretrained(root / "whisper")
    return {"vision": root / "clip", "audio": root / "whisper"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory):
    """Function that gives a folder with a random language model of a base, and real tokens."""
    root = tmp_path_factory.mktemp("texts")

    def folder(base: str) -> Path:
        path, (make, tokenizer) = root / base, BASES[base]
        source = TOKENIZERS / tokenizer
        if not (source / "tokenizer.json").is_file():
            pytest.skip(f"no tokenizer at {source}")
        if not path.exists():
            torch.manual_seed(0)
            make().save_pretrained(path)
            for file in source.iterdir():
                shutil.copy(file, path / file.name)
        return path

    return folder


@pytest.mark.parametrize(("run", "variant"), VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_every_recipe_assembles_and_learns(
    base: str, run: str, variant: str, text, towers: dict[str, Path]
):
    overrides = [f"model.text={text(base)}", "model.init_from=null", *ON_CPU]
    senses = {"image": "vision", "audio": "audio"}
    overrides += [f"model.{senses[kind]}={towers[senses[kind]]}" for kind in RUNS[run]]
    overrides += {
        "frozen": [],
        "qlora": ["quantization.bnb_4bit_compute_dtype=float32"],
        "lora": ["tune.language_model=lora", "quantization=null"],
    }[variant]
    recipe = load_recipe(ROOT / "recipes" / base / f"{run}.yaml", overrides)
    model, processor = assemble(recipe)
    given = {"image": model.config.image_token_id, "audio": model.config.audio_token_id}
    length = len(AutoTokenizer.from_pretrained(text(base)))
    spare = {"image": length, "audio": length + 1}  # nothing is resized
    assert given == {k: v if k in RUNS[run] else None for k, v in spare.items()}
    assert max(spare.values()) < model.config.text_config.vocab_size

    batch = PhiMMCollator(processor, None, recipe.data.max_length)([sample(RUNS[run])])
    ids = batch["input_ids"][0].tolist()
    assert [ids.count(given[kind]) for kind in RUNS[run]] == [TOKENS[kind] for kind in RUNS[run]]
    answer = [i for i in batch["labels"][0].tolist() if i != -100]
    assert processor.tokenizer.decode(answer, skip_special_tokens=True).strip() == "a red star"
    model.train()
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    learning = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for _, p in learning)
    assert any("lora_B" in name for name, _ in learning) == (variant != "frozen")


def sample(kinds: tuple[str, ...]) -> dict:
    """A picture, a recording or both, with an answer."""
    rng = np.random.default_rng(0)
    media = {
        "image": Image.fromarray(rng.integers(0, 255, (90, 120, 3), np.uint8)),
        "audio": rng.normal(0, 0.1, 24_000).astype(np.float32),
    }
    parts = [{"type": kind, kind: media[kind]} for kind in kinds]
    answer = [{"type": "text", "text": "a red star"}]
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": "what is this?"}]},
            {"role": "assistant", "content": answer},
        ]
    }
