"""The collator: labels on exactly what the assistant says, padding on the right, nothing cut
silently.
"""

import copy

import numpy as np
import pytest
import torch

from processing import PhiMMCollator

PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
RECORDING = np.random.default_rng(1).normal(0, 0.1, 5000).astype(np.float32)

SAMPLES = [
    {
        "id": "picture",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": PICTURE},
                    {"type": "text", "text": "what <|endoftext|>?"},
                ],
            },
            {"role": "assistant", "content": "a red star"},
            {"role": "user", "content": "where?"},
            {"role": "assistant", "content": "left"},
        ],
    },
    {
        "id": "sound",
        "messages": [
            {"role": "user", "content": [{"type": "audio", "audio": RECORDING}]},
            {"role": "assistant", "content": "yes"},
        ],
    },
    {
        "id": "text",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
        ],
    },
]
SAID = {
    "phi": [" a red star<|endoftext|> left<|endoftext|>", " yes<|endoftext|>", " hi<|endoftext|>"],
    "phi3": ["a red star<|end|>left<|end|>", "yes<|end|>", "hi<|end|>"],
}


@pytest.mark.parametrize("family", ["phi", "phi3"])
def test_labels_decode_to_what_the_assistant_says(make_phi_mm, family):
    _, processor = make_phi_mm(family)
    batch = PhiMMCollator(processor)(SAMPLES)
    for labels, ids, said in zip(batch["labels"], batch["input_ids"], SAID[family], strict=True):
        supervised = labels != -100
        assert processor.decode(labels[supervised]) == said
        assert torch.equal(labels[supervised], ids[supervised])


@pytest.mark.parametrize("family", ["phi", "phi3"])
def test_an_answer_of_weight_0_is_read_and_not_learnt(make_phi_mm, family):
    _, processor = make_phi_mm(family)
    asked, wrong, again, right = SAMPLES[0]["messages"]
    whole = PhiMMCollator(processor)(SAMPLES[:1])
    weighed = [asked, {**wrong, "weight": 0}, again, {**right, "weight": 1}]
    batch = PhiMMCollator(processor)([{"messages": weighed}])
    assert torch.equal(batch["input_ids"], whole["input_ids"])
    said = {"phi": " left<|endoftext|>", "phi3": "left<|end|>"}[family]
    assert processor.decode(batch["labels"][batch["labels"] != -100]) == said
    with pytest.raises(ValueError, match="without a supervised token"):
        PhiMMCollator(processor)([{"messages": [asked, {**wrong, "weight": 0}]}])


def test_batch_is_right_padded_and_whole(phi_mm):
    model, processor = phi_mm
    collator = PhiMMCollator(processor)
    batch = collator(SAMPLES)
    for row, sample in enumerate(SAMPLES):
        alone = collator([sample])
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, :length], alone["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (
            batch["input_ids"].shape[1] - length
        )
        assert (batch["labels"][row, length:] == -100).all()
    with torch.no_grad():
        losses = [model(**collator([sample])) for sample in SAMPLES]
        together = model(**batch)
    counts = [len(output.logits) for output in losses]
    expected = sum(o.loss * n for o, n in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together.loss, expected, rtol=1e-5, atol=1e-5)


class TowerOutputs:
    """Features computed on the spot, looked up as a cache would."""

    def __init__(self, model, processor):
        self.model, self.processor = model.model, processor

    @torch.no_grad()
    def image(self, source):
        return self.model.get_vision_features(self.processor(images=[source])["pixel_values"])[0]

    @torch.no_grad()
    def audio(self, source):
        windows = self.processor(audio=[source])["input_features"]
        frames = self.model.get_audio_tower_features(windows).flatten(0, 1)
        return frames[: self.processor.count_frames(len(source))]


def test_cached_features_give_the_same_loss(phi_mm):
    model, processor = phi_mm
    live = PhiMMCollator(processor)(SAMPLES)
    cached = PhiMMCollator(processor, features=TowerOutputs(model, processor))(SAMPLES)
    assert cached.keys() - live.keys() == {"image_embeds", "audio_embeds", "audio_embeds_mask"}
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(cached[name], live[name])
    with torch.no_grad():
        torch.testing.assert_close(model(**cached).loss, model(**live).loss, rtol=1e-5, atol=1e-5)


def test_a_sample_with_nothing_to_learn_is_refused(phi_mm):
    _, processor = phi_mm
    sample = {"id": "mute", "messages": [{"role": "user", "content": "hello"}]}
    with pytest.raises(ValueError, match="got sample 'mute' without a supervised token"):
        PhiMMCollator(processor)([sample])


def test_a_long_sample_loses_text_from_its_end_and_never_a_placeholder(phi_mm):
    _, processor = phi_mm
    whole = PhiMMCollator(processor)([SAMPLES[0]])
    length = whole["input_ids"].shape[1]
    cut = PhiMMCollator(processor, max_length=length - 3)([SAMPLES[0]])
    for name in ("input_ids", "labels"):
        assert torch.equal(cut[name], whole[name][:, : length - 3])
    with pytest.raises(
        ValueError, match="'picture' of .* whose media do not end within max_length=12"
    ):
        PhiMMCollator(processor, max_length=12)([SAMPLES[0]])
    first = int((whole["labels"][0] != -100).nonzero()[0])
    with pytest.raises(ValueError, match="'picture' without a supervised token"):
        PhiMMCollator(processor, max_length=first)([SAMPLES[0]])


def test_a_list_of_samples_shares_a_row(phi_mm):
    _, processor = phi_mm
    collator = PhiMMCollator(processor)
    pieces = [collator([sample]) for sample in SAMPLES]
    lengths = [piece["input_ids"].shape[1] for piece in pieces]
    batch = collator([SAMPLES[1:], SAMPLES[:1]])
    assert "attention_mask" not in batch
    assert batch["input_ids"].shape == (2, max(lengths[1] + lengths[2], lengths[0]))
    places = [(1, 0), (0, 0), (0, lengths[1])]  # of the samples in their order
    for (row, start), length, piece in zip(places, lengths, pieces, strict=True):
        there = slice(start, start + length)
        assert torch.equal(batch["input_ids"][row, there], piece["input_ids"][0])
        assert torch.equal(batch["labels"][row, there], piece["labels"][0])
        assert batch["position_ids"][row, there].tolist() == list(range(length))
    assert torch.equal(batch["input_features"], pieces[1]["input_features"])
    assert torch.equal(batch["pixel_values"], pieces[0]["pixel_values"])


def test_padding_of_a_shared_row_is_no_conversation(phi_mm):
    _, processor = phi_mm
    lengths = [PhiMMCollator(processor)([s])["input_ids"].shape[1] for s in SAMPLES]
    batch = PhiMMCollator(processor)([SAMPLES, SAMPLES[2:]])
    assert (batch["labels"][1, lengths[2] :] == -100).all()
    # Long RoPE looks at the highest position: padding must not be it.
    padded = [place % max(lengths) for place in range(lengths[0] + lengths[1])]
    assert batch["position_ids"][1, lengths[2] :].tolist() == padded
    assert max(padded) < len(padded) - 1


def test_a_list_that_is_too_long_for_a_row_goes_on_in_the_next(phi_mm):
    _, processor = phi_mm
    lengths = [PhiMMCollator(processor)([s])["input_ids"].shape[1] for s in SAMPLES]
    fits = PhiMMCollator(processor, packed_length=sum(lengths))([SAMPLES])
    assert fits["input_ids"].shape == (1, sum(lengths))
    spilt = PhiMMCollator(processor, packed_length=sum(lengths) - 1)([SAMPLES])
    assert spilt["input_ids"].shape == (2, lengths[0] + lengths[1])
    assert spilt["position_ids"][1, : lengths[2]].tolist() == list(range(lengths[2]))
    assert spilt["labels"].ne(-100).sum() == fits["labels"].ne(-100).sum()


def test_the_first_token_of_a_conversation_is_never_predicted(phi_mm):
    _, processor = phi_mm
    opens = {"messages": [{"role": "assistant", "content": "hello"}]}
    processor = copy.copy(processor)
    processor.chat_template = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    batch = PhiMMCollator(processor)([[opens, opens]])
    assert (batch["labels"][0] != -100).tolist() == ([False] + [True] * 4) * 2
