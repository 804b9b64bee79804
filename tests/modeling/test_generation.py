"""Generation: the same answer in a batch and alone, with and without cache, beams, and cached
features.
"""

import numpy as np
import pytest
import torch


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def recording(seed: int, samples: int) -> np.ndarray:
    """A tone of its own pitch in a little noise."""
    noise = np.random.default_rng(seed).normal(0, 0.01, samples)
    tone = 0.3 * np.sin(2 * np.pi * 300 * seed * np.arange(samples) / 16000)
    return (tone + noise).astype(np.float32)


def ask(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def image(seed: int) -> dict:
    return {"type": "image", "image": picture(seed)}


def audio(seed: int, samples: int = 5000) -> dict:
    return {"type": "audio", "audio": recording(seed, samples)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def said(words: str) -> dict:
    return {"role": "assistant", "content": words}


CONVERSATIONS = {
    "text": ask(text("hello")),
    "image": ask(image(1), text("what is it?")),
    "two images": ask(image(2), text("against"), image(3)),
    "audio": ask(audio(4)),
    "two audios": ask(audio(5, 3000), text("then"), audio(6, 9000)),
    "long audio": ask(audio(7, 40001)),
    "both": ask(image(8), audio(9), text("?")),
    "interleaved": ask(audio(10, 160), image(11), text("or"), image(12), audio(13, 16001)),
    "several turns": [
        *ask(image(14), text("one?")),
        said("yes"),
        *ask(audio(15)),
        said("no"),
        *ask(image(16), audio(17, 700), text("and?")),
    ],
}


def inputs_of(processor, conversations):
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def answer(model, processor, conversations, **kwargs) -> list[list[int]]:
    inputs = inputs_of(processor, conversations)
    options = {"max_new_tokens": 8, "do_sample": False} | kwargs
    output = model.generate(**inputs, **options)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def trimmed(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


def test_media_change_the_answer(phi_mm):
    """Guards every other test here: a model that ignored its media would pass them all."""
    model, processor = phi_mm
    with torch.no_grad():
        red = model(**inputs_of(processor, [ask(image(1), audio(4))])).logits[:, -1]
        other_picture = model(**inputs_of(processor, [ask(image(2), audio(4))])).logits[:, -1]
        other_sound = model(**inputs_of(processor, [ask(image(1), audio(5))])).logits[:, -1]
    assert (red - other_picture).abs().max() > 0.1
    assert (red - other_sound).abs().max() > 0.1


def test_batch_equals_single_for_every_mix(phi_mm):
    model, processor = phi_mm
    eos = model.generation_config.eos_token_id
    together = answer(model, processor, list(CONVERSATIONS.values()))
    for name, conversation, batched in zip(
        CONVERSATIONS, CONVERSATIONS.values(), together, strict=True
    ):
        alone = answer(model, processor, [conversation])[0]
        assert trimmed(batched, eos) == trimmed(alone, eos), name


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_kv_cache_equals_full_forward(phi_mm, name):
    model, processor = phi_mm
    cached = answer(model, processor, [CONVERSATIONS[name]], use_cache=True)
    inputs = dict(inputs_of(processor, [CONVERSATIONS[name]]))
    prompt = inputs["input_ids"].shape[1]
    suppressed = model.generation_config.suppress_tokens
    for _ in cached[0]:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[:, -1]
        logits[:, suppressed] = -torch.inf
        token = logits.argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert inputs["input_ids"][0, prompt:].tolist() == cached[0]


def test_one_beam_equals_greedy_and_beams_equal_the_sample_alone(phi_mm):
    model, processor = phi_mm
    eos = model.generation_config.eos_token_id
    conversations = [
        ask(image(1), audio(2, 3000), image(3), audio(4, 9000)),
        ask(text("hello")),
        ask(audio(5), audio(6, 700), image(7), image(8)),
    ]
    greedy = answer(model, processor, conversations)
    assert answer(model, processor, conversations, num_beams=1) == greedy
    together = answer(model, processor, conversations, num_beams=3)
    for conversation, batched in zip(conversations, together, strict=True):
        alone = answer(model, processor, [conversation], num_beams=3)[0]
        assert trimmed(batched, eos) == trimmed(alone, eos)


def test_beam_search_scores_are_those_of_the_full_forward(phi_mm):
    """The score of a beam is the sum of its tokens' log probabilities with the media in place."""
    model, processor = phi_mm
    conversation = [ask(image(1), audio(2, 3000), image(3), audio(4, 9000))]
    inputs = inputs_of(processor, conversation)
    output = model.generate(
        **inputs,
        max_new_tokens=4,
        min_new_tokens=4,
        num_beams=3,
        do_sample=False,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    prompt = inputs["input_ids"].shape[1]
    full = dict(inputs) | {
        "input_ids": output.sequences,
        "attention_mask": torch.ones_like(output.sequences),
    }
    with torch.no_grad():
        scores = model(**full).logits.log_softmax(-1)
    tokens = output.sequences[0, prompt:]
    expected = sum(scores[0, prompt - 1 + i, token].item() for i, token in enumerate(tokens))
    assert output.sequences_scores[0].item() == pytest.approx(expected, abs=1e-4)


def test_return_sequences_of_sampling_repeat_the_media_of_each_sample(phi_mm):
    model, processor = phi_mm
    inputs = inputs_of(processor, [ask(audio(1), audio(2, 900)), ask(image(3)), ask(text("x"))])
    output = model.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert output.shape[0] == 6
    torch.testing.assert_close(
        output[::2, : inputs["input_ids"].shape[1]], inputs["input_ids"], rtol=0, atol=0
    )


def with_cached_features(model, processor, conversation) -> list[dict]:
    """The conversation with tower outputs in the place of its media."""

    def convert(part: dict) -> dict:
        with torch.no_grad():
            if part["type"] == "image":
                pixels = processor(images=[part["image"]])["pixel_values"]
                return {
                    "type": "image",
                    "image_embeds": model.model.get_vision_features(pixels)[0],
                }
            if part["type"] == "audio":
                windows = processor(audio=[part["audio"]])["input_features"]
                frames = model.model.get_audio_tower_features(windows)
                sounding = processor.count_frames(len(part["audio"]))
                return {"type": "audio", "audio_embeds": frames.flatten(0, 1)[:sounding]}
        return part

    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [convert(part) for part in message["content"]]}
        for message in conversation
    ]


def test_cached_features_equal_live_media(phi_mm):
    model, processor = phi_mm
    for name, conversation in CONVERSATIONS.items():
        live = inputs_of(processor, [conversation])
        cached = inputs_of(processor, [with_cached_features(model, processor, conversation)])
        assert not {"pixel_values", "input_features"} & set(cached)
        torch.testing.assert_close(cached["input_ids"], live["input_ids"], rtol=0, atol=0)
        with torch.no_grad():
            difference = (model(**cached).logits - model(**live).logits).abs().max()
        assert difference < 1e-4, name
        assert (
            model.generate(**cached, max_new_tokens=4).tolist()
            == model.generate(**live, max_new_tokens=4).tolist()
        )


def test_raw_and_cached_media_in_one_batch_are_refused(phi_mm):
    model, processor = phi_mm
    cached = with_cached_features(model, processor, CONVERSATIONS["image"])
    with pytest.raises(ValueError, match="got 1 cached and 1 raw images in one batch"):
        inputs_of(processor, [cached, CONVERSATIONS["image"]])


def test_generate_drops_media_after_the_prefill(phi_mm):
    model, processor = phi_mm
    calls = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda *args: calls.append(1))
    answer(model, processor, [CONVERSATIONS["both"]], min_new_tokens=8)
    handle.remove()
    assert len(calls) == 1


def test_raw_media_and_encoder_outputs_together_are_refused(phi_mm):
    model, processor = phi_mm
    inputs = inputs_of(processor, [CONVERSATIONS["image"]])
    encoded = model.model.encode_media({"pixel_values": inputs["pixel_values"]})
    with pytest.raises(ValueError, match="both mm_encoder_outputs and raw inputs for .'image'."):
        model.generate(**inputs, mm_encoder_outputs=encoded, max_new_tokens=1)
    given = {k: v for k, v in inputs.items() if k != "pixel_values"}
    from_outputs = model.generate(**given, mm_encoder_outputs=encoded, max_new_tokens=4)
    assert from_outputs.tolist() == model.generate(**inputs, max_new_tokens=4).tolist()
