"""float16: a plain Phi overflows in attention, this one does not, and nothing answers with NaN."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, BatchFeature, PhiForCausalLM, PreTrainedModel

LOUD = 440.0  # fits float16; its square does not, also divided by the root of the heads' width, 8


def make_loud(language_model: PreTrainedModel) -> None:
    """One constant number in every query and key, outside of what the rotary part turns.

    All scores grow by the same square of it, so the weights of attention stay what they are.
    """
    for layer in language_model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            last = torch.arange(attention.head_dim - 1, len(projection.bias), attention.head_dim)
            projection.weight.data[last] = 0.0
            projection.bias.data[last] = LOUD


def multiply(language_model: PreTrainedModel, factor: float) -> None:
    """Queries and keys of a Phi-3, which has no biases, `factor` times as large."""
    for layer in language_model.layers:
        width = layer.self_attn.o_proj.in_features
        layer.self_attn.qkv_proj.weight.data[: 2 * width] *= factor


def question(processor, *typed: str) -> BatchFeature:
    """A picture and a recording, and typed prompts padded to its length."""
    random = np.random.default_rng(0)
    content = [
        {"type": "image", "image": random.integers(0, 256, (8, 8, 3), dtype=np.uint8)},
        {"type": "audio", "audio": random.normal(0, 0.1, 5000).astype(np.float32)},
        {"type": "text", "text": "what is it?"},
    ]
    conversations = [[{"role": "user", "content": part}] for part in (content, *typed)]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@pytest.fixture(params=["eager", "sdpa"])
def attention(request) -> str:
    """Attention as it is written down, and torch's own, made to multiply in float16 as some of its
    kernels do.
    """
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    with sdpa_kernel(SDPBackend.MATH):
        yield request.param
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@pytest.fixture(params=[4, 2], ids=["all heads", "grouped heads"])
def loud(request, make_phi_mm: Callable, attention: str):
    """A phi-mm whose scores overflow float16."""
    model, processor = make_phi_mm()
    config = copy.deepcopy(model.config)
    config.text_config.num_key_value_heads = request.param
    torch.manual_seed(0)
    model = type(model)(config).eval()
    model.generation_config.suppress_tokens = [config.image_token_id, config.audio_token_id]
    model.set_attn_implementation(attention)
    make_loud(model.model.language_model)
    return model, processor


def plain_phi(model: PreTrainedModel, attention: str) -> PhiForCausalLM:
    """transformers' own Phi with the weights of this one."""
    phi = PhiForCausalLM(copy.deepcopy(model.config.text_config)).eval()
    phi.set_attn_implementation(attention)
    phi.model.load_state_dict(model.model.language_model.state_dict())
    phi.lm_head.load_state_dict(model.lm_head.state_dict())
    return phi


def test_a_plain_phi_overflows(loud, attention):
    model, processor = loud
    phi, ids = plain_phi(model, attention), question(processor)["input_ids"]
    with torch.no_grad():
        assert phi(ids).logits.isfinite().all()
        assert phi.half()(ids).logits.isnan().all()


def test_scores_are_float32(loud):
    model, processor = loud
    inputs = question(processor, "hello", "and who are you?")
    told = inputs["attention_mask"].bool()
    with torch.no_grad():
        exact = model(**inputs).logits[told]
        with torch.autocast("cpu", dtype=torch.float16):
            mixed = model(**inputs).logits[told]
        half = model.half()(**inputs).logits
    assert half.dtype == torch.float16
    assert half.isfinite().all()  # at the padding too
    for found in (mixed, half[told]):
        assert (found.float() - exact).abs().max() <= 1e-2 * exact.abs().max()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_and_its_cache_are_float16(loud, cache: str):
    model, processor = loud
    inputs, model = question(processor, "hello"), model.half()
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**inputs, **options, cache_implementation=cache)
    assert output.past_key_values.layers[0].keys.dtype == torch.float16
    alone = model.generate(**question(processor), **options)
    full = model.generate(**inputs, **options, use_cache=False)
    assert output.sequences[0].tolist() == alone.sequences[0].tolist()
    assert output.sequences.tolist() == full.sequences.tolist()


def test_a_decode_step_can_be_compiled(loud):
    model, processor = loud
    model = model.half()
    with torch.no_grad():
        start = model(**question(processor), use_cache=True)
        token = {"input_ids": start.logits[:, -1].argmax(-1, keepdim=True)}
        cache = start.past_key_values
        plain = model(**token, past_key_values=copy.deepcopy(cache)).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        found = compiled(**token, past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(found, plain)


def test_saving_says_nothing_of_it(loud, attention, tmp_path):
    model, _ = loud
    model.save_pretrained(tmp_path)
    assert "phi_mm_" not in (tmp_path / "config.json").read_text().replace('"phi_mm"', "")
    again = type(model).from_pretrained(tmp_path, dtype="float16", attn_implementation=attention)
    assert again.config.text_config._attn_implementation == f"phi_mm_{attention}"
    kinds = {weight.dtype for weight in again.parameters()}
    assert kinds == {torch.float16}  # towers too


def test_phi3_is_guarded_alike(make_phi_mm, attention):
    model, processor = make_phi_mm("phi3")
    model.set_attn_implementation(attention)
    multiply(model.model.language_model, 100.0)
    inputs = question(processor)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config)).eval()
    plain.set_attn_implementation(attention)
    plain.model.load_state_dict(model.model.language_model.state_dict())
    with torch.no_grad():
        exact = model(**inputs).logits
        half = model.half()(**inputs).logits
        assert plain.half()(inputs["input_ids"]).logits.isnan().all()
    assert (half - exact).abs().max() <= 1e-2 * exact.abs().max()


def test_in_other_dtypes_it_is_the_plain_phi(phi_mm):
    model, processor = phi_mm
    ids = processor.tokenizer("what is it?", return_tensors="pt").input_ids
    config = copy.deepcopy(model.config.text_config)
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.model.load_state_dict(model.model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("eager", "sdpa"):
            model.to(dtype).set_attn_implementation(name)
            # the loaded rotary frequencies of a plain Phi would be rounded by `.to`
            plain.to(dtype).set_attn_implementation(name)
            plain.model.rotary_emb = copy.deepcopy(model.model.language_model.rotary_emb)
            with torch.no_grad():
                assert torch.equal(model(ids).logits, plain(ids).logits), (dtype, name)


def test_what_overflows_elsewhere_is_refused(phi_mm):
    """No trick helps where the activations themselves are too large."""
    model, processor = phi_mm
    layer = model.model.language_model.layers[-1].mlp
    last = layer.fc2 if model.config.text_config.model_type == "phi" else layer.down_proj
    last.weight.data *= 1e6
    inputs = question(processor)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match="got float16, in which this model overflows on this inp"):
        model.half().generate(**inputs, max_new_tokens=1)
