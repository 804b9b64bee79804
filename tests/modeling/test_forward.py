"""The forward pass: loss, gradients, freezing, checks, optional towers, saving."""

import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file

from modeling_phi_mm import PhiMMConfig, PhiMMForConditionalGeneration


def sample_inputs(model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two samples, the first with a picture and a recording of 21 mel frames, the second with text
    only.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 200, (2, 40), generator=generator)
    ids[0, 3 : 3 + config.num_image_tokens] = config.image_token_id
    ids[0, 25:28] = config.audio_token_id  # 21 mel frames are 11 encoder frames, 3 stacks of 4
    mask = torch.zeros(1, 100, dtype=torch.long)
    mask[:, :21] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 8, 8, generator=generator),
        "input_features": torch.randn(1, 8, 100, generator=generator),
        "input_features_mask": mask,
    }


def labels_for(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, 30:40] = inputs["input_ids"][0, 30:40]
    labels[1, 5:12] = inputs["input_ids"][1, 5:12]
    return labels


def test_loss_is_the_cross_entropy_over_supervised_tokens(phi_mm):
    model, _ = phi_mm
    inputs = sample_inputs(model)
    labels = labels_for(inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
        output = model(**inputs, labels=labels)
    by_hand = [
        -logits[b, t - 1].log_softmax(-1)[labels[b, t]].item()
        for b in range(2)
        for t in range(1, 40)
        if labels[b, t] != -100
    ]
    assert len(by_hand) == 17
    assert output.logits.shape == (17, model.config.text_config.vocab_size)
    assert output.loss.item() == pytest.approx(math.fsum(by_hand) / 17, rel=1e-5)


def test_loss_adds_up_under_gradient_accumulation(phi_mm):
    model, _ = phi_mm
    inputs = sample_inputs(model)
    labels = labels_for(inputs)
    whole = model(**inputs, labels=labels, num_items_in_batch=17).loss
    first = {k: v[:1] for k, v in inputs.items()}
    second = {k: inputs[k][1:] for k in ("input_ids", "attention_mask")}
    parts = [
        model(**part, labels=part_labels, num_items_in_batch=17).loss
        for part, part_labels in ((first, labels[:1]), (second, labels[1:]))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
    assert model(**inputs, labels=labels).loss.item() == pytest.approx(whole.item(), rel=1e-5)


def test_head_bias_belongs_to_phi_only(make_phi_mm):
    assert make_phi_mm("phi")[0].lm_head.bias is not None
    assert make_phi_mm("phi3")[0].lm_head.bias is None


@pytest.mark.parametrize("missing", ["pixel_values", "input_features"])
def test_placeholders_without_media_raise_with_both_numbers(phi_mm, missing):
    model, _ = phi_mm
    inputs = sample_inputs(model)
    inputs.pop(missing)
    inputs.pop("input_features_mask") if missing == "input_features" else None
    count = {"pixel_values": "16 image", "input_features": "3 audio"}[missing]
    with pytest.raises(ValueError, match=f"got 0 .* and {count} placeholders"):
        model(**inputs)


def test_more_media_than_placeholders_raise_with_both_numbers(phi_mm):
    model, _ = phi_mm
    inputs = sample_inputs(model)
    inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(
        ValueError, match="got 32 image tokens from the encoder and 16 image placeholders"
    ):
        model(**inputs)


def test_frozen_towers_stay_in_eval_mode_and_get_no_gradient(phi_mm):
    model, _ = phi_mm
    model.model.vision_tower.requires_grad_(False)
    model.model.audio_tower.requires_grad_(False)
    model.train()
    assert not model.model.vision_tower.training and not model.model.audio_tower.training
    model.activation_checkpointing_enable()
    inputs = sample_inputs(model)
    features = model.model.get_vision_features(inputs["pixel_values"])
    assert not features.requires_grad
    model(**inputs, labels=labels_for(inputs)).loss.backward()
    for name, parameter in model.named_parameters():
        if "_tower" in name:
            assert parameter.grad is None, name
        elif "projector" in name:
            assert parameter.grad.abs().sum() > 0, name


def test_trained_towers_get_gradients(phi_mm):
    model, _ = phi_mm
    model.train()
    inputs = sample_inputs(model)
    model(**inputs, labels=labels_for(inputs)).loss.backward()
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    assert model.model.audio_tower.conv1.weight.grad.abs().sum() > 0


def test_idle_projectors_are_in_the_graph_of_a_text_batch(phi_mm):
    model, _ = phi_mm
    model.train()
    ids = torch.randint(0, 200, (1, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    for projector in (model.model.multi_modal_projector, model.model.audio_projector):
        assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in projector.parameters())


def test_inputs_embeds_equal_input_ids(phi_mm):
    model, _ = phi_mm
    inputs = sample_inputs(model)
    with torch.no_grad():
        by_ids = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        by_embeds = model(inputs_embeds=embeds, **inputs).logits
    torch.testing.assert_close(by_embeds, by_ids)
    with pytest.raises(ValueError, match="exactly one"):
        model(inputs_embeds=embeds, input_ids=torch.zeros(2, 40, dtype=torch.long))


def test_attention_implementations_agree(phi_mm):
    model, _ = phi_mm
    inputs = sample_inputs(model)
    logits = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(**inputs).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=1e-4, atol=1e-4)


def test_absent_towers_are_neither_built_nor_saved(make_phi_mm, tmp_path):
    for vision, audio, absent in (
        (False, True, "image"),
        (True, False, "audio"),
        (False, False, ""),
    ):
        model, processor = make_phi_mm(vision=vision, audio=audio)
        names = model.state_dict().keys()
        assert any("vision_tower" in name for name in names) == vision
        assert any("audio_" in name for name in names) == audio
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "processor_config.json").read_text())
        assert ("image_processor" in saved, "feature_extractor" in saved) == (vision, audio)
        again = type(processor).from_pretrained(tmp_path)
        assert (hasattr(again, "image_processor"), again.feature_extractor is not None) == (
            vision,
            audio,
        )
        assert PhiMMForConditionalGeneration.from_pretrained(tmp_path).state_dict().keys() == names
        if absent:
            message = [{"role": "user", "content": [{"type": absent, absent: "x"}]}]
            with pytest.raises(ValueError, match=f"got {absent}.*this model has no"):
                again.apply_chat_template(message, tokenize=True)


def test_layers_past_the_feature_layer_are_not_built(make_phi_mm):
    model, _ = make_phi_mm()
    assert model.config.vision_config.num_hidden_layers == 3
    assert len(model.model.vision_tower.encoder.layers) == 2


def test_vision_features_are_the_hidden_state_of_the_whole_tower(make_phi_mm):
    from transformers import CLIPVisionModel

    model, _ = make_phi_mm()
    torch.manual_seed(1)
    whole = CLIPVisionModel(model.config.vision_config).eval()
    model.model.vision_tower.load_state_dict(whole.state_dict(), strict=False)
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = whole(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(model.model.get_vision_features(pixels), expected)


@pytest.mark.parametrize(
    ("pool", "tokens_per_cell", "expected"), [(1, 1, 16), (2, 1, 4), (2, 4, 16), (4, 1, 1)]
)
def test_image_tokens_by_pool(make_phi_mm, pool, tokens_per_cell, expected):
    model, _ = make_phi_mm(image_pool=pool, image_tokens_per_cell=tokens_per_cell)
    assert model.config.num_image_tokens == expected
    assert model.get_image_features(pixel_values=torch.zeros(3, 3, 8, 8)).pooler_output.shape == (
        3,
        expected,
        32,
    )


def test_pooling_merges_neighbouring_patches(make_phi_mm):
    model, _ = make_phi_mm(image_pool=2)
    patches = torch.arange(16.0).view(1, 16, 1).expand(1, 16, 16)
    cells = model.model.multi_modal_projector.merge(patches)
    assert cells[0, :, ::16].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_pool": 3}, "got image_pool=3, expected a divisor"),
        ({"audio_stack": 0}, "got audio_stack=0"),
        ({"vision_feature_layer": -4}, "got vision_feature_layer=-4, expected -3 to -1"),
        ({"audio_padded": False, "audio_route": "decoder"}, "expected the route 'encoder'"),
        ({"image_token_id": None}, "without image_token_id"),
        ({"text_config": {"model_type": "llama"}}, "got a language model of type 'llama'"),
    ],
)
def test_configs_that_do_not_fit_are_refused(make_phi_mm, fields, message):
    good = make_phi_mm()[0].config.to_dict()
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        PhiMMConfig(**(good | fields))


def test_save_load_save_is_idempotent(phi_mm, tmp_path):
    model, processor = phi_mm
    inputs = sample_inputs(model)
    folders = [tmp_path / name for name in ("built", "first", "second")]
    model.save_pretrained(folders[0])
    processor.save_pretrained(folders[0])
    for source, target in zip(folders, folders[1:], strict=False):
        again = PhiMMForConditionalGeneration.from_pretrained(source)
        again.save_pretrained(target)
        type(processor).from_pretrained(source).save_pretrained(target)
    names = sorted(path.name for path in folders[1].iterdir())
    assert names == sorted(path.name for path in folders[2].iterdir())
    for name in names:
        assert (folders[1] / name).read_bytes() == (folders[2] / name).read_bytes(), name
    built, second = (load_file(folders[i] / "model.safetensors") for i in (0, 2))
    assert built.keys() == second.keys() and all(torch.equal(built[k], second[k]) for k in built)
    with torch.no_grad():
        logits = again.eval()(**inputs).logits
        torch.testing.assert_close(logits, model(**inputs).logits, rtol=0, atol=0)


def test_tied_embeddings_are_tied_and_saved_once(make_phi_mm, tmp_path):
    tied = make_phi_mm("phi3")[0].config.to_dict()
    tied["text_config"]["tie_word_embeddings"] = True
    config = PhiMMConfig(**{k: v for k, v in tied.items() if k != "tie_word_embeddings"})
    model = PhiMMForConditionalGeneration(config)
    assert config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = PhiMMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_half_a_window_of_noise_after_the_sound_changes_nothing(phi_mm):
    """Only sounding frames become tokens, and the last stack does not see what follows."""
    model, _ = phi_mm
    frames, mask = torch.randn(1, 50, 16), torch.zeros(1, 50, dtype=torch.long)
    mask[:, :11] = 1
    noisy = frames.clone()
    noisy[:, 11:] = 7.0
    with torch.no_grad():
        quiet = model.get_audio_features(audio_embeds=frames, audio_embeds_mask=mask).pooler_output
        loud = model.get_audio_features(audio_embeds=noisy, audio_embeds_mask=mask).pooler_output
    assert quiet.shape == (3, 32)
    torch.testing.assert_close(quiet, loud, rtol=0, atol=0)


def test_a_recording_that_is_not_padded_is_heard_by_itself(make_phi_mm):
    """The encoder's own forward pass where the window is full, and shorter where it is not."""
    model, _ = make_phi_mm(audio_padded=False)
    mel = torch.randn(3, 8, 100, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 100, dtype=torch.long)
    for window, length in enumerate((100, 21, 40)):
        mask[window, :length] = 1
    with torch.no_grad():
        padded = model.model.get_audio_tower_features(mel)
        own = model.model.get_audio_tower_features(mel, mask)
        alone = model.model.get_audio_tower_features(mel[1:2], mask[1:2])
    torch.testing.assert_close(own[0], padded[0])
    assert own.shape == (3, 50, 16) and not own[1, 11:].any() and not own[2, 20:].any()
    assert alone.shape == (1, 11, 16)
    torch.testing.assert_close(own[1:2, :11], alone)
    assert (own[1, :11] - padded[1, :11]).abs().max() > 0.01
    # What follows the sound is not heard.
    other = mel.clone()
    other[1, :, 21:] = 9.0
    with torch.no_grad():
        torch.testing.assert_close(model.model.get_audio_tower_features(other, mask)[1], own[1])


def test_training_has_phi_s_activation_by_one_kernel(make_phi_mm):
    model, processor = make_phi_mm("phi")
    assert model.config.text_config.hidden_act == "gelu_new"
    ids = processor.tokenizer("what is it?", return_tensors="pt").input_ids

    def loss_and_nodes() -> tuple[torch.Tensor, set[str]]:
        loss = model(input_ids=ids, labels=ids).loss
        names, ahead = set(), [loss.grad_fn]
        while ahead:
            node = ahead.pop()
            names.add(node.name())
            ahead += [other for other, _ in node.next_functions if other is not None]
        return loss, names

    plain, spelt_out = loss_and_nodes()
    model.train()
    fused, by_one_kernel = loss_and_nodes()
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)
    assert "TanhBackward0" in spelt_out and "TanhBackward0" not in by_one_kernel
    assert "GeluBackward0" in by_one_kernel
