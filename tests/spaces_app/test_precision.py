"""Which precision is chosen, what it is predicted to need, and what int8 layers compute."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine.int8 import Int8Linear, quantize_linears
from engine.loading import load
from engine.precision import WORKING_BYTES, choose
from torch import nn
from transformers import PhiConfig
from transformers.models.phi.modeling_phi import PhiDecoderLayer


def test_int8_is_close_and_each_token_is_computed_alone() -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        linear = nn.Linear(96, 64, bias=bias)
        rounded = Int8Linear(linear)
        states = torch.randn(2, 7, 96) * torch.logspace(-3, 3, 7)[:, None]
        states[0, 0] = 0
        exact, close = linear(states), rounded(states)
        error = (close - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-9)
        assert close.shape == exact.shape and error.max() < 0.03
        alone = torch.stack([rounded(row[None])[0] for row in states.reshape(-1, 96)])
        torch.testing.assert_close(close.reshape(-1, 64), alone, rtol=0, atol=0)


def test_what_reads_the_same_states_is_one_product() -> None:
    torch.manual_seed(0)
    config = PhiConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2)
    layer = PhiDecoderLayer(config, layer_idx=0)
    attention, mlp = layer.self_attn, layer.mlp
    names = [(attention, "q_proj"), (attention, "k_proj"), (attention, "v_proj"), (mlp, "fc1")]
    alone = [Int8Linear(getattr(module, name)) for module, name in names]
    quantize_linears(nn.ModuleList([layer]))
    together = attention.q_proj.together
    assert mlp.fc1.together is together and together.out_features == 3 * 32 + 64
    for states in (torch.randn(2, 7, 32), torch.randn(1, 1, 32)):
        for (module, name), one in zip(names, alone, strict=True):
            torch.testing.assert_close(getattr(module, name)(states), one(states), rtol=0, atol=0)
        assert together.states is None and together.product is None  # nothing stays behind
    attention.q_proj(torch.randn(1, 1, 32))  # and then the request is given up
    states = torch.randn(1, 3, 32)
    for (module, name), one in zip(names, alone, strict=True):
        torch.testing.assert_close(getattr(module, name)(states), one(states), rtol=0, atol=0)
    assert together.states is None


def test_lora_between_states_and_weights_keeps_them_apart() -> None:
    layer = PhiDecoderLayer(PhiConfig(hidden_size=32, num_attention_heads=2), layer_idx=0)
    layer.self_attn.q_proj = nn.ModuleDict({"base_layer": layer.self_attn.q_proj})
    quantize_linears(layer)
    assert isinstance(layer.self_attn.q_proj["base_layer"], Int8Linear)
    assert isinstance(layer.mlp.fc1, Int8Linear)


def test_layers_of_lora_are_left() -> None:
    root = nn.ModuleDict(
        {
            "base_layer": nn.Linear(4, 4),
            "lora_A": nn.ModuleDict({"image_adapter": nn.Linear(4, 2)}),
            "inner": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
        }
    )
    quantize_linears(root)
    assert isinstance(root["base_layer"], Int8Linear)
    assert isinstance(root["inner"][0], Int8Linear)
    assert type(root["lora_A"]["image_adapter"]) is nn.Linear


def test_memory_is_predicted_from_the_config(artefact: Path) -> None:
    model, _ = load(str(artefact), None, "fp32")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    linear = 2 * (4 * 32 * 32 + 2 * 32 * 64)  # of each of two layers: attention, MLP
    plain = choose(str(artefact), None, "fp32", stores=1000, free=1 << 40)
    assert plain.memory.serving == weights + WORKING_BYTES + 1000
    assert plain.memory.loading == weights + WORKING_BYTES
    small = choose(str(artefact), None, "int8", stores=0, free=1 << 40)
    linear += 300 * 32  # and the head
    assert small.memory.serving == round(weights - 4 * linear + 1.01 * linear) + WORKING_BYTES
    assert small.memory.loading == weights + 9 * 300 * 32 + WORKING_BYTES
    assert str(small).startswith("int8: as set; predicted 0.8")


def test_int8_is_chosen_where_there_is_much_to_read(artefact: Path, tmp_path: Path) -> None:
    config = json.loads((artefact / "config.json").read_text())
    wide = shutil.copytree(artefact, tmp_path / "artefact")

    def chosen(intermediate_size: int) -> str:
        config["text_config"]["intermediate_size"] = intermediate_size
        (wide / "config.json").write_text(json.dumps(config))
        return str(choose(str(wide), None, "auto", stores=0, free=1 << 40)).partition(";")[0]

    others = 2 * 4 * 32 * 32 + 300 * 32  # attention of both layers, and the head
    enough = (4_000_000 - others) // (2 * 2 * 32)  # and nothing over
    assert chosen(enough) == "int8: the quickest on a CPU"
    assert chosen(enough - 1) == "fp32: so small a model is quicker in it than in int8"


MAPS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux tells what is mapped into memory")
def test_int8_leaves_nothing_of_the_file_in_memory(artefact: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(artefact, tmp_path / "artefact")
    model, _ = load(str(copied), None, "int8")
    assert isinstance(model.lm_head, Int8Linear)
    assert str(copied) not in MAPS.read_text()
    plain, _ = load(str(copied), None, "fp32")
    assert str(copied) in MAPS.read_text()


def test_what_does_not_fit_is_refused_with_the_remedy(artefact: Path) -> None:
    where = (str(artefact), None)
    need = choose(*where, "fp32", 0, 1 << 40).memory.peak
    with pytest.raises(ValueError, match="got 0.00 GB of free .* take a larger machine, or serve"):
        choose(*where, "auto", stores=0, free=0)
    with pytest.raises(ValueError, match="lower PHI_MM_PREFIX_MB or PHI_MM_MEDIA_MB, or serve"):
        choose(*where, "int8", stores=1 << 30, free=1 << 30)
    stores = 1 << 20
    fits = choose(*where, "int8", stores, 1 << 40).memory.peak
    assert fits < need + stores
    with pytest.raises(ValueError, match="in fp32: set PHI_MM_PRECISION=int8, or serve a smaller"):
        choose(*where, "fp32", stores, fits)
    with pytest.raises(ValueError, match="'nf4' on a machine with no GPU, expected auto or one of"):
        choose(*where, "nf4", stores=0)
