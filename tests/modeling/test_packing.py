"""Several conversations in a row: no one sees another, loss and gradients as in rows of their own.

pytest tests/modeling/test_packing.py
"""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from modeling_phi_mm import PhiMMForConditionalGeneration
from modeling_phi_mm.packing_phi_mm import packed_arguments
from processing import PhiMMCollator

GENERATOR = np.random.default_rng(0)
ATTENTIONS = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def conversation(question: str, answer: str, *media: str) -> dict:
    """One sample; `media` are names of modalities, each with a content of its own."""
    contents = {
        "image": lambda: GENERATOR.integers(0, 256, (8, 8, 3), dtype=np.uint8),
        "audio": lambda: GENERATOR.normal(0, 0.1, 5000).astype(np.float32),
    }
    parts = [{"type": kind, kind: contents[kind]()} for kind in media]
    parts.append({"type": "text", "text": question})
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"messages": said}


ROWS = [
    conversation("what is this?", "a red star", "image"),
    conversation("say it again", "yes", "audio"),
    conversation("hello", "hi there, you"),
    conversation("which of them?", "the second", "image", "audio"),
    conversation("and this?", "blue", "image"),
]
SHARED = [ROWS[:3], ROWS[3:]]


def loss_and_gradients(
    model: PhiMMForConditionalGeneration, batch: dict
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def assert_learns_the_same(model: PhiMMForConditionalGeneration, collator: PhiMMCollator) -> None:
    loss, gradients = loss_and_gradients(model, collator(ROWS))
    packed_loss, packed = loss_and_gradients(model, collator(SHARED))
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    assert packed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@ATTENTIONS
def test_loss_and_gradients_are_those_of_rows_of_their_own(phi_mm, attention: str):
    model, processor = phi_mm
    model.set_attn_implementation(attention)
    assert_learns_the_same(model, PhiMMCollator(processor))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_frozen_towers_and_checkpointing(phi_mm, checkpointing: bool):
    model, processor = phi_mm
    model.model.vision_tower.requires_grad_(False)
    model.model.audio_tower.requires_grad_(False)
    if checkpointing:
        model.activation_checkpointing_enable()
    assert_learns_the_same(model, PhiMMCollator(processor))


@ATTENTIONS
def test_no_conversation_sees_another(phi_mm, attention: str):
    """The answer to a row of three is, bit by bit, that of a row with other neighbours."""
    model, processor = phi_mm
    model.set_attn_implementation(attention)
    batch = PhiMMCollator(processor)([ROWS[:3]])
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) == 3
    middle = slice(starts[1], starts[2])
    changed = batch["input_ids"].clone()
    for place in (*range(starts[1]), *range(starts[2], changed.shape[1])):
        if changed[0, place] != model.config.image_token_id:
            changed[0, place] = (changed[0, place] + 7) % 200
    with torch.no_grad():
        before = model(**batch | {"labels": None}).logits[0]
        after = model(**batch | {"labels": None, "input_ids": changed}).logits[0]
    assert torch.equal(before[middle], after[middle])
    assert not torch.equal(before[: starts[1]], after[: starts[1]])
    alone = PhiMMCollator(processor)([ROWS[1]])
    with torch.no_grad():
        expected = model(**alone | {"labels": None}).logits[0]
    torch.testing.assert_close(before[middle], expected, rtol=1e-4, atol=1e-4)


def with_text_settings(make_phi_mm, **settings: object):
    """A phi3 with other settings of its language model."""
    model, processor = make_phi_mm("phi3")
    config = copy.deepcopy(model.config)
    for name, value in settings.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    changed = PhiMMForConditionalGeneration(config)
    changed.load_state_dict(model.state_dict())
    return changed, processor


@ATTENTIONS
def test_sliding_window(make_phi_mm, attention: str):
    model, processor = with_text_settings(make_phi_mm, sliding_window=9)
    model.set_attn_implementation(attention)
    assert_learns_the_same(model, PhiMMCollator(processor))


@pytest.mark.parametrize("beyond", [0, 1])
def test_long_rope_looks_at_the_longest_conversation(make_phi_mm, beyond: int):
    """At its original length the short factors hold, one token beyond it the long ones do."""
    longest = PhiMMCollator(make_phi_mm("phi3")[1])(ROWS)["input_ids"].shape[1]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": longest - beyond,
    }
    model, processor = with_text_settings(
        make_phi_mm,
        rope_parameters=rope,
        max_position_embeddings=4 * longest,
        original_max_position_embeddings=longest - beyond,
    )
    assert PhiMMCollator(processor)(SHARED)["input_ids"].shape[1] > longest
    assert_learns_the_same(model, PhiMMCollator(processor))
    frequencies = model.model.language_model.rotary_emb.inv_freq
    assert frequencies[0].item() == pytest.approx(1 / 2.0 if beyond else 1.0)


def test_every_conversation_meets_the_adapters_of_what_it_holds(phi_mm):
    model, processor = phi_mm
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*(dense|o_proj)")
    model.add_modality_adapters({"image": config, "audio": config})
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    assert_learns_the_same(model, PhiMMCollator(processor))
    model.eval()
    batch = PhiMMCollator(processor)([ROWS[:3]])
    text = slice(int((batch["position_ids"][0] == 0).nonzero()[2]), None)
    with torch.no_grad():
        adapted = model(**batch | {"labels": None}).logits[0, text]
        model.disable_adapters()
        plain = model(**batch | {"labels": None}).logits[0, text]
    assert torch.equal(adapted, plain)


def attend_by_boundaries(module, query, key, value, attention_mask, scaling, **given):
    """What a flash kernel computes of (B, heads, L, width): causal attention between boundaries."""
    assert attention_mask is None
    ends = given["cu_seq_lens_q"].tolist()
    assert ends == given["cu_seq_lens_k"].tolist()
    lengths = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    assert given["max_length_q"] == given["max_length_k"] == max(lengths)
    rows, _, length, _ = query.shape
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    parts = []
    for pieces in zip(*(tensor.split(lengths) for tensor in flat), strict=True):
        q, k, v = (piece.transpose(0, 1) for piece in pieces)
        attend = torch.nn.functional.scaled_dot_product_attention
        parts.append(attend(q, k, v, is_causal=True, scale=scaling).transpose(0, 1))
    return torch.cat(parts).unflatten(0, (rows, length)), None


def test_a_conversation_ends_with_its_row():
    conversations = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 2, 3]])
    told = packed_arguments(conversations, "sdpa")
    assert told["conversation_lengths"] == [4, 2, 2, 2, 1, 1]
    told = packed_arguments(conversations, "flash_attention_2")
    assert told["cu_seq_lens_q"].tolist() == [0, 4, 6, 8, 10, 11, 12]
    assert told["max_length_k"] == 4


def test_flash_attention_is_told_where_conversations_end(phi_mm):
    """Of several rows, which transformers alone would let look into each other's conversations."""
    model, processor = phi_mm
    AttentionInterface.register("flash_by_boundaries", attend_by_boundaries)
    AttentionMaskInterface.register("flash_by_boundaries", flash_attention_mask)
    batch = PhiMMCollator(processor)(SHARED)
    expected = model(**batch).loss
    model.model.language_model.config._attn_implementation = "flash_by_boundaries"
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-5, atol=1e-5)
