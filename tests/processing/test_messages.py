"""Messages: placeholders stand where the media stand, counts must match, typed placeholders stay
text.
"""

import numpy as np
import pytest

PICTURE = np.zeros((8, 8, 3), dtype=np.uint8)
RECORDING = np.zeros(3200, dtype=np.float32)  # 20 mel frames, 10 encoder frames, 3 tokens of 4

EXPECTED = {
    "phi": (
        "You see.\nInstruct: look<|image|> and<|image|> hear<|audio|>\nOutput: yes<|endoftext|>\n"
        "Instruct: why?\nOutput:"
    ),
    "phi3": (
        "<|system|>\nYou "
        "see.<|end|>\n<|user|>\nlook<|image|>\nand<|image|>\nhear<|audio|>\n<|end|>\n"
        "<|assistant|>\nyes<|end|>\n<|user|>\nwhy?<|end|>\n<|assistant|>\n"
    ),
}


def parts(*content) -> list[dict]:
    return [{"type": "text", "text": item} if isinstance(item, str) else item for item in content]


def image() -> dict:
    return {"type": "image", "image": PICTURE}


def audio() -> dict:
    return {"type": "audio", "audio": RECORDING}


def conversation() -> list[dict]:
    return [
        {"role": "system", "content": "You see."},
        {"role": "user", "content": parts("look", image(), "and ", image(), "hear", audio())},
        {"role": "assistant", "content": " yes"},
        {"role": "user", "content": "why?"},
    ]


@pytest.mark.parametrize("family", ["phi", "phi3"])
def test_rendered_prompt(make_phi_mm, family):
    _, processor = make_phi_mm(family)
    prompt = processor.apply_chat_template(conversation(), add_generation_prompt=True)
    assert prompt == EXPECTED[family]


def test_placeholders_stand_where_the_media_stand(phi_mm):
    _, processor = phi_mm
    inputs = processor.apply_chat_template(
        conversation(), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = inputs["input_ids"][0]
    text = processor.decode(ids)
    runs = text.replace("<|image|>" * 16, "I").replace("<|audio|>" * 3, "A")
    plain = processor.apply_chat_template(conversation(), add_generation_prompt=True)
    assert runs == plain.replace("<|image|>", "I").replace("<|audio|>", "A")
    assert inputs["pixel_values"].shape[0] == 2 and inputs["input_features"].shape[0] == 1


@pytest.mark.parametrize("typed", ["<|image|>", "<|audio|>", "<|endoftext|>"])
def test_a_typed_control_token_is_text(phi_mm, typed):
    _, processor = phi_mm
    said = [
        {"role": "user", "content": parts(f"what does {typed} mean?", image())},
        {"role": "assistant", "content": f"{typed} is a token"},
        {"role": "user", "content": f"is {typed} one?"},
    ]
    for mask in (False, True):
        inputs = processor.apply_chat_template(
            said, tokenize=True, return_dict=True, return_assistant_tokens_mask=mask
        )
        ids = inputs["input_ids"][0]
        assert ids.count(processor.image_token_id) == 16
        assert ids.count(processor.audio_token_id) == 0
        assert processor.decode(ids).replace("\u200b", "").count(f"is {typed} one?") == 1


def test_the_conversation_passed_in_is_left_as_it_is(phi_mm):
    _, processor = phi_mm
    said = [{"role": "user", "content": parts("a <|image|>", image())}]
    processor.apply_chat_template(said, tokenize=True)
    assert said == [{"role": "user", "content": [{"type": "text", "text": "a <|image|>"}, image()]}]


@pytest.mark.parametrize(
    ("text", "images", "audio", "message"),
    [
        ("<|image|><|image|>", [PICTURE], None, "got 1 images and 2 <.image.> placeholders"),
        ("none", [PICTURE], None, "got 1 images and 0 <.image.> placeholders"),
        ("<|image|>", None, None, "got 0 images and 1 <.image.> placeholders"),
        (
            "<|audio|>",
            None,
            [RECORDING, RECORDING],
            "got 2 recordings and 1 <.audio.> placeholders",
        ),
        (None, None, None, "got no text, images or audio"),
    ],
)
def test_counts_that_do_not_match_raise_with_both_numbers(phi_mm, text, images, audio, message):
    _, processor = phi_mm
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=images, audio=audio)


def test_a_part_of_another_type_is_refused(phi_mm):
    _, processor = phi_mm
    with pytest.raises(Exception, match="got a content part of type 'video'"):
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "video", "video": "x"}]}]
        )


def test_a_media_part_without_media_is_refused(phi_mm):
    _, processor = phi_mm
    said = [{"role": "user", "content": [{"type": "image", "picture": PICTURE}]}]
    with pytest.raises(ValueError, match=r"got an image part with the keys \['picture', 'type'\]"):
        processor.apply_chat_template(said, tokenize=True)


def test_truncation_inside_placeholders_is_refused(phi_mm):
    _, processor = phi_mm
    with pytest.raises(ValueError, match="image"):
        processor(text="<|image|> what?", images=[PICTURE], truncation=True, max_length=8)
