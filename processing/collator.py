"""Turns conversations into training batches with labels on what the assistant says."""

import math
from itertools import chain, islice
from typing import Any, Protocol

import torch

from .processing_phi_mm import PhiMMProcessor

IGNORE_INDEX = -100

Piece = tuple[list[int], list[int]]  # ids and labels of one conversation


class Features(Protocol):
    """Cached tower outputs, as `PhiMMCollator` looks them up by what stands in the message."""

    def image(self, source: Any) -> torch.Tensor:
        """Patch features (P, C) of a picture."""

    def audio(self, source: Any) -> torch.Tensor | str:
        """Sounding encoder frames (F, C) of a recording, or states (T, C) at the words of its
        transcript, or the words themselves."""


class PhiMMCollator:
    """Batches samples `{"messages": [...]}` for training: right padded, labels on the assistant's
    spans.

    The spans come from the chat template's generation blocks, never from re-tokenised pieces. An
    assistant's message with `"weight": 0` is read and not learnt.

    A list of samples in the place of a sample shares one row. Such a batch has `position_ids` that
    start anew with every conversation in the place of `attention_mask`: that keeps the model from
    looking from one conversation into another.

    Args:
        processor: a `PhiMMProcessor` whose chat template marks the assistant's spans.
        features: cached tower outputs to put in the place of the media; `None` opens the media
            themselves.
        max_length: longest sample in tokens. A longer one loses text from its end; one that would
            lose a placeholder or all its supervised tokens is refused.
        packed_length: most tokens of a row that several samples share, no less than `max_length`. A
            list of samples that turns out longer goes on in another row.

    Raises:
        ValueError: on a sample with nothing to learn from, or one that does not fit; the message
            names it.
    """

    def __init__(
        self,
        processor: PhiMMProcessor,
        features: Features | None = None,
        max_length: int | None = None,
        packed_length: int | None = None,
    ):
        self.processor = processor
        self.features = features
        self.max_length = max_length
        self.packed_length = packed_length

    def __call__(self, samples: list[dict] | list[list[dict]]) -> dict[str, torch.Tensor]:
        """Returns input_ids, labels and attention_mask or position_ids (B, L), and the media inputs
        of the whole batch in reading order.
        """
        if isinstance(samples[0], dict):
            pieces, media = self._prepare(samples)
            batch = self._pad([[piece] for piece in pieces])
            del batch["position_ids"]
        else:
            pieces, media = self._prepare(list(chain.from_iterable(samples)))
            batch = self._pad(self._share([len(together) for together in samples], pieces))
            del batch["attention_mask"]
        return batch | media

    def _prepare(self, samples: list[dict]) -> tuple[list[Piece], dict[str, torch.Tensor]]:
        inputs = self.processor.apply_chat_template(
            [self._with_features(sample["messages"]) for sample in samples],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": False},
        )
        pieces = [
            self._cut(sample, ids, _weighed(sample["messages"], mask))
            for sample, ids, mask in zip(
                samples, inputs["input_ids"], inputs["assistant_masks"], strict=True
            )
        ]
        names = ("pixel_values", "image_embeds", "input_features", "input_features_mask")
        names += ("audio_embeds", "audio_embeds_mask")
        return pieces, {name: inputs[name] for name in names if name in inputs}

    def _with_features(self, messages: list[dict]) -> list[dict]:
        if self.features is None:
            return messages

        def convert(part: dict) -> dict:
            if part["type"] == "image":
                return {"type": "image", "image_embeds": self.features.image(part["image"])}
            if part["type"] == "audio":
                heard = self.features.audio(part["audio"])
                if isinstance(heard, str):
                    return {"type": "text", "text": heard}
                return {"type": "audio", "audio_embeds": heard}
            return part

        return [
            message
            if isinstance(message["content"], str)
            else {**message, "content": [convert(part) for part in message["content"]]}
            for message in messages
        ]

    def _cut(self, sample: dict, ids: list[int], mask: list[int]) -> Piece:
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
        # The first token is never predicted, least of all from the conversation before.
        labels[0] = IGNORE_INDEX
        if all(label == IGNORE_INDEX for label in labels):
            raise ValueError(
                f"got {name} without a supervised token, expected an assistant's answer to learn "
                "from"
            )
        return ids, labels

    def _share(self, sizes: list[int], pieces: list[Piece]) -> list[list[Piece]]:
        """Rows of whole conversations, in order; `sizes` says how many are to share a row.

        Lengths that were not known exactly when rows were put together may be too much for one.
        """
        rows, rest = [], iter(pieces)
        most = self.packed_length or math.inf
        for size in sizes:
            row: list[Piece] = []
            length = 0
            for piece in islice(rest, size):
                if row and length + len(piece[0]) > most:
                    rows.append(row)
                    row, length = [], 0
                row.append(piece)
                length += len(piece[0])
            rows.append(row)
        return rows

    def _pad(self, rows: list[list[Piece]]) -> dict[str, torch.Tensor]:
        length = max(sum(len(ids) for ids, _ in row) for row in rows)
        longest = max(len(ids) for row in rows for ids, _ in row)
        shape = (len(rows), length)
        input_ids = torch.full(shape, self.processor.tokenizer.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        position_ids = torch.zeros(shape, dtype=torch.long)
        for number, row in enumerate(rows):
            start = 0
            for ids, piece_labels in row:
                place = (number, slice(start, start + len(ids)))
                input_ids[place] = torch.tensor(ids)
                labels[place] = torch.tensor(piece_labels)
                attention_mask[place] = 1
                position_ids[place] = torch.arange(len(ids))
                start += len(ids)
            # Padding is no longer than a conversation, since RoPE may look at the highest position.
            position_ids[number, start:] = torch.arange(length - start) % longest
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "labels": labels,
        }


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
