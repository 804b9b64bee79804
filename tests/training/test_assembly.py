"""Assembly: what is loaded, adapted, quantised, refused.

pytest tests/training/test_assembly.py
"""

import shutil
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPModel,
    WhisperForConditionalGeneration,
)

from phi_mm.assembly import assemble, join_parts
from phi_mm.plan import TuneSection
from phi_mm.summary import Row, Summary, summarise
from phi_mm.weights import load_projectors

PHIS = pytest.mark.parametrize("text", ["phi", "phi3"])


@PHIS
def test_text_answers_as_the_language_model_alone(recipe, bases: dict[str, Path], text: str):
    model, processor = join_parts(recipe(text=text, tune="frozen"))
    alone = AutoModelForCausalLM.from_pretrained(bases[text]).eval()
    ids = processor.tokenizer("what colour is the star?", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, alone(ids).logits)


def test_towers_give_the_features_of_their_checkpoints(recipe, bases: dict[str, Path]):
    model, _ = join_parts(recipe(tune="frozen"))
    clip = CLIPModel.from_pretrained(bases["clip"]).vision_model.eval()
    whisper = WhisperForConditionalGeneration.from_pretrained(bases["whisper"]).eval()
    pixels, mel = torch.randn(2, 3, 16, 16), torch.randn(2, 16, 200)
    with torch.no_grad():
        hidden = clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(model.model.get_vision_features(pixels), hidden)
        frames = whisper.model.encoder(mel).last_hidden_state
        torch.testing.assert_close(model.model.get_audio_tower_features(mel), frames)
    assert len(model.model.vision_tower.encoder.layers) == 2  # of three


@PHIS
def test_placeholders_take_spare_rows(recipe, text: str):
    model, processor = join_parts(recipe(text=text, tune="frozen"))
    known = {"phi": 257, "phi3": 262}[text]  # bytes and special tokens of the test tokenizer
    ids = (model.config.image_token_id, model.config.audio_token_id)
    assert ids == (known, known + 1)
    assert ids == (processor.image_token_id, processor.audio_token_id)
    assert model.lm_head.out_features == 320
    assert processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id == 256
    assert model.generation_config.pad_token_id == 256


def test_embeddings_grow_when_no_row_is_spare(recipe, bases: dict[str, Path], tmp_path: Path):
    full = tmp_path / "full"
    shutil.copytree(bases["phi"], full)
    small = AutoModelForCausalLM.from_pretrained(full)
    small.resize_token_embeddings(257, mean_resizing=False)
    small.save_pretrained(full)
    model, _ = join_parts(recipe(f"model.text={full}", tune="frozen"))
    assert model.config.text_config.vocab_size == 259
    assert model.lm_head.weight.shape == (259, 32)
    assert model.lm_head.bias.shape == (259,)
    torch.testing.assert_close(model.lm_head.bias[:257], small.lm_head.bias)


@PHIS
def test_lora_touches_the_language_model_only(recipe, text: str):
    model, _ = assemble(recipe(text=text, tune="lora"))
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert len(adapted) == 2 * {"phi": 6, "phi3": 4}[text]
    assert all(".language_model.layers." in name for name in adapted)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("language_model" in n or "projector.modules_to_save" in n for n in learning)


@PHIS
def test_four_bit_leaves_towers_projectors_and_head_float(recipe, text: str):
    model, _ = join_parts(recipe(text=text))
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    quantised = {name for name, kind in kinds.items() if kind == "Linear4bit"}
    assert len(quantised) == 2 * {"phi": 6, "phi3": 4}[text]
    assert all(name.startswith("model.language_model.layers.") for name in quantised)
    assert kinds["lm_head"] == kinds["model.multi_modal_projector.linear_1"] == "Linear"


def test_summary_counts_are_exact(recipe):
    model, _ = assemble(recipe("lora.r=4"))
    # width 32, feed-forward 64, 320 tokens, two layers; 16 patches of 4x4x3 and a class token
    layer = 4 * 32 * 32 + 2 * 32 * 64
    biases = 4 * 32 + 64 + 32
    tower_layer = layer + biases + 4 * 32
    vision = 2 * tower_layer + 32 + 48 * 32 + 17 * 32 + 4 * 32
    audio = tower_layer - 32 + 16 * 32 * 3 + 32 + 32 * 32 * 3 + 32 + 100 * 32 + 2 * 32
    assert summarise(model).rows == (
        Row("vision_tower", vision, "float32", False),
        Row("audio_tower", audio, "float32", False),
        Row("multi_modal_projector", 32 * 32 + 32 + 32 * 32 + 32, "float32", True),
        Row("audio_projector", 128 * 32 + 32 + 32 * 32 + 32, "float32", True),
        Row("language_model", 2 * layer, "4-bit", False),
        Row("language_model", 320 * 32 + 2 * (biases + 2 * 32) + 64, "float32", False),
        Row("language_model (LoRA)", 2 * 4 * (4 * 64 + 2 * 96), "float32", True),
        Row("lm_head", 320 * 32 + 320, "float32", False),
    )


def test_summary_prints_totals_and_shares(recipe):
    summary = Summary(
        (Row("audio_projector", 250, "float32", True), Row("lm_head", 750, "float32", False))
    )
    assert str(summary).splitlines()[-2:] == [
        "total                             1,000",
        "trains                              250  (25.00 %)",
    ]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (Row("vision_tower", 5, "float32", True), "vision_tower with 0 weights of LoRA and 5 of"),
        (Row("audio_tower (LoRA)", 5, "float32", True), "audio_tower with 5 weights of LoRA and 0"),
        (Row("language_model (LoRA)", 5, "float32", False), "language_model .* expected it lora"),
        (Row("lm_head", 5, "float32", True), "lm_head .* expected it frozen"),
        (Row("lm_head", 5, "4-bit", False), "lm_head is in 4-bit"),
    ],
)
def test_a_run_that_is_not_what_it_says_is_refused(row: Row, complaint: str):
    learning = Row("multi_modal_projector", 5, "float32", True)
    with pytest.raises(ValueError, match=complaint):
        Summary((row, learning)).check(TuneSection(language_model="lora"))


def test_a_run_in_which_nothing_learns_is_refused(recipe):
    overrides = ("model.vision=null", "model.audio_route=transcript")
    with pytest.raises(ValueError, match="nothing would learn"):
        assemble(recipe(*overrides, tune="frozen"))


def test_missing_and_unexpected_weights_raise(recipe, bases: dict[str, Path], tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(bases["phi"], broken)
    weights = load_file(broken / "model.safetensors")
    weights["stray.weight"] = weights.pop("lm_head.bias")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of .*broken are missing: lm_head.bias"):
        join_parts(recipe(f"model.text={broken}", tune="frozen"))


def test_another_kind_of_language_model_is_refused(recipe, bases: dict[str, Path]):
    with pytest.raises(ValueError, match="model type 'whisper'"):
        join_parts(recipe(f"model.text={bases['whisper']}", tune="frozen"))


def test_a_model_without_a_tower_holds_nothing_of_it(recipe):
    model, processor = assemble(recipe("model.audio=null"))
    assert not any("audio" in name for name, _ in model.named_parameters())
    assert processor.feature_extractor is None


def test_init_from_wants_the_projectors_of_an_aligned_run(recipe, tmp_path: Path):
    model, _ = join_parts(recipe(tune="frozen"))
    with pytest.raises(ValueError, match="tune.language_model: frozen"):
        load_projectors(model, tmp_path)


@pytest.mark.parametrize("override", ["model.dtype=float16", "training.fp16=true"])
def test_phi_is_refused_in_float16_and_phi3_is_not(recipe, override: str):
    with pytest.raises(ValueError, match="got float16, expected bfloat16 or float32"):
        join_parts(recipe(override, tune="frozen"))
    model, _ = join_parts(recipe(override, text="phi3", tune="frozen"))
    assert model.model.audio_projector.linear_1.weight.dtype == torch.float32


def test_tied_embeddings_stay_tied(recipe, make_phi, tmp_path: Path):
    torch.manual_seed(0)
    folder = make_phi(tmp_path / "tied", model_type="phi3", tie_word_embeddings=True)
    model, processor = join_parts(recipe(f"model.text={folder}", text="phi3"))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    alone = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, alone.lm_head.weight)
    assert not any(row.part == "lm_head" for row in summarise(model).rows)
