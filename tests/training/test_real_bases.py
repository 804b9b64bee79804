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


BASES = {"phi-2": (phi_2, "phi-2"), "phi-3.5-mini": (phi_3_5_mini, "phi-3-mini")}


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


@pytest.mark.parametrize("base", BASES)
def test_both_stages_assemble_and_learn(base: str, towers: dict[str, Path], tmp_path: Path):
    make, tokenizer = BASES[base]
    source = TOKENIZERS / tokenizer
    if not (source / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer at {source}")
    text = tmp_path / "text"
    torch.manual_seed(0)
    make().save_pretrained(text)
    for file in source.iterdir():
        shutil.copy(file, text / file.name)
    length = len(AutoTokenizer.from_pretrained(text))

    for stage in ("stage1", "stage2"):
        overrides = [f"model.text={text}", *(f"model.{k}={v}" for k, v in towers.items()), *ON_CPU]
        if stage == "stage2":
            overrides += ["model.init_from=null", "quantization.bnb_4bit_compute_dtype=float32"]
        recipe = load_recipe(ROOT / "recipes" / base / f"{stage}.yaml", overrides)
        model, processor = assemble(recipe)
        tokens = (model.config.image_token_id, model.config.audio_token_id)
        assert tokens == (length, length + 1)
        assert max(tokens) < model.config.text_config.vocab_size  # spare rows, nothing resized

        batch = PhiMMCollator(processor, None, recipe.data.max_length)([sample()])
        ids = batch["input_ids"][0].tolist()
        # 24x24 patches; 1.5 s are 75 frames of 20 ms, stacked by four
        assert (ids.count(tokens[0]), ids.count(tokens[1])) == (576, 19)
        answer = [i for i in batch["labels"][0].tolist() if i != -100]
        assert processor.tokenizer.decode(answer, skip_special_tokens=True).strip() == "a red star"
        model.train()
        loss = model(**batch).loss
        loss.backward()
        assert torch.isfinite(loss)
        learning = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for _, p in learning)
        if stage == "stage2":
            assert any("lora_B" in name for name, _ in learning)


def sample() -> dict:
    """One picture and one recording with an answer."""
    rng = np.random.default_rng(0)
    parts = [
        {"type": "image", "image": Image.fromarray(rng.integers(0, 255, (90, 120, 3), np.uint8))},
        {"type": "audio", "audio": rng.normal(0, 0.1, 24_000).astype(np.float32)},
        {"type": "text", "text": "what is this?"},
    ]
    answer = [{"type": "text", "text": "a red star"}]
    return {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": answer},
        ]
    }
