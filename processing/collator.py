"""Turns conversations into padded training batches with labels on what the assistant says."""

from typing import Any, Protocol

import torch

from .processing_phi_mm import PhiMMProcessor

IGNORE_INDEX = -100


class Features(Protocol):
    """Cached tower outputs, as `PhiMMCollator` looks them up by what stands in the message."""

    def image(self, source: Any) -> torch.Tensor:
        """Patch features (P, C) of a picture."""

    def audio(self, source: Any) -> torch.Tensor:
        """Sounding encoder frames (F, C) of a recording."""


class PhiMMCollator:
    """Batches samples `{"messages": [...]}` for training: right padded, labels on the assistant's
    spans.

    The spans come from the chat template's generation blocks, never from re-tokenised pieces. An
    assistant's message with `"weight": 0` is read and not learnt.

    Args:
        processor: a `PhiMMProcessor` whose chat template marks the assistant's spans.
        features: cached tower outputs to put in the place of the media; `None` opens the media
            themselves.
        max_length: longest sample in tokens. A longer one loses text from its end; one that would
            lose a placeholder or all its supervised tokens is refused.

    Raises:
        ValueError: on a sample with nothing to learn from, or one that does not fit; the message
            names it.
    """

    def __init__(
        self,
        processor: PhiMMProcessor,
        features: Features | None = None,
        max_length: int | None = None,
    ):
        self.processor = processor
        self.features = features
        self.max_length = max_length

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """Returns input_ids, attention_mask and labels (B, L), and the media inputs of the whole
        batch.
        """
        inputs = self.processor.apply_chat_template(
            [self._with_features(sample["messages"]) for sample in samples],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": False},
        )
        rows = [
            self._cut(sample, ids, _weighed(sample["messages"], mask))
            for sample, ids, mask in zip(
                samples, inputs["input_ids"], inputs["assistant_masks"], strict=True
            )
        ]
        batch = self._pad(rows)
        media = ("pixel_values", "image_embeds", "input_features", "input_features_mask")
        for name in (*media, "audio_embeds", "audio_embeds_mask"):
            if name in inputs:
                batch[name] = inputs[name]
        return batch

    def _with_features(self, messages: list[dict]) -> list[dict]:
        if self.features is None:
            return messages

        def convert(part: dict) -> dict:
            if part["type"] == "image":
                return {"type": "image", "image_embeds": self.features.image(part["image"])}
            if part["type"] == "audio":
                return {"type": "audio", "audio_embeds": self.features.audio(part["audio"])}
            return part

        return [
            message
            if isinstance(message["content"], str)
            else {**message, "content": [convert(part) for part in message["content"]]}
            for message in messages
        ]

    def _cut(self, sample: dict, ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
        name = f"sample {sample['id']!r}" if "id" in sample else "a sample"
        if self.max_length is not None and len(ids) > self.max_length:
            placeholders = (self.processor.image_token_id, self.processor.audio_token_id)
            if any(token in placeholders for token in ids[self.max_length :]):
                raise ValueError(
                    f"got {name} of {len(ids)} tokens whose media do not end within "
                    f"max_length={self.max_length}: "
                    "raise max_length, or leave the sample out"
                )
            ids, mask = ids[: self.max_length], mask[: self.max_length]
        labels = [
            token if supervised else IGNORE_INDEX
            for token, supervised in zip(ids, mask, strict=True)
        ]
        # The first token is never predicted, so it does not count.
        if all(label == IGNORE_INDEX for label in labels[1:]):
            raise ValueError(
                f"got {name} without a supervised token, expected an assistant's answer to learn "
                "from"
            )
        return ids, labels

    def _pad(self, rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(ids) for ids, _ in rows)
        pad_id = self.processor.tokenizer.pad_token_id
        input_ids = torch.full((len(rows), length), pad_id)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORE_INDEX)
        for row, (ids, row_labels) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
            labels[row, : len(ids)] = torch.tensor(row_labels)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _weighed(messages: list[dict], mask: list[int]) -> list[int]:
    """The mask of the assistant's spans, without those of messages with weight 0."""
    weights = iter([m.get("weight", 1) for m in messages if m["role"] == "assistant"])
    weighed, weight = [], 0
    for before, now in zip([0, *mask], mask, strict=False):
        if now and not before:
            weight = next(weights)
        weighed.append(now * weight)
    return weighed


__all__ = ["PhiMMCollator"]
