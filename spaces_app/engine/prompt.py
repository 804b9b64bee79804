"""From messages to what the model reads: token ids, and which medium stands where.

Pictures and recordings pass their towers once: features are kept by the content of the file.

Shapes: L positions, P patches, F encoder frames, C tower width.
"""

import hashlib
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from .media import MediaLimits, UnusableFile
from .store import BoundedStore


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it.

    Attributes:
        ids: (1, L) token ids.
        keys: one for each position: a text token's id, or for a placeholder (content of the medium,
            number of the token in it). Equal keys are computed alike.
        inputs: `image_embeds`, `audio_embeds` and `audio_embeds_mask` of all media, reading order.
        windows: audio windows of each recording, reading order.
        modalities: what stands in it, of "image" and "audio".
        heard: Whisper's transcript of each recording, where the artefact's route has one.
        encoded: media that had to pass a tower now.
    """

    ids: torch.LongTensor
    keys: list[Hashable]
    inputs: dict[str, torch.Tensor]
    windows: list[int]
    modalities: frozenset[str]
    heard: list[str]
    encoded: int

    def inputs_after(self, start: int) -> dict[str, torch.Tensor]:
        """The media whose placeholders stand at or after a position.

        Args:
            start: a position that is not inside a medium.
        """
        first = [key[0] for key in self.keys[start:] if isinstance(key, tuple) and key[1] == 0]
        images = sum(content.startswith("image:") for content in first)
        recordings = len(first) - images
        windows = sum(self.windows[len(self.windows) - recordings :])
        counts = {"image_embeds": images, "audio_embeds": windows, "audio_embeds_mask": windows}
        return {
            name: tensor[len(tensor) - counts[name] :]
            for name, tensor in self.inputs.items()
            if counts[name]
        }


class PromptReader:
    """Turns messages into prompts; media parts name files, `{"type": "image", "image": path}`.

    Args:
        model, processor: of the artefact.
        budget: bytes of tower outputs to keep.
        limits: of the files that are opened.
        context: positions that a conversation may have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        budget: int,
        limits: MediaLimits,
        context: int,
    ):
        self.model, self.processor, self.limits, self.context = model, processor, limits, context
        self.features: BoundedStore[torch.Tensor | tuple] = BoundedStore(budget)

    @torch.no_grad()
    def read(self, messages: list[dict[str, Any]]) -> Prompt:
        """The prompt for the next answer.

        Raises:
            UnusableFile: a file cannot be opened, or is larger than may be.
            ValueError: the model has no tower for a file, or the conversation is too long.
        """
        media = _Media()
        filled = [
            {**message, "content": [self._fill(part, media) for part in message["content"]]}
            for message in messages
        ]
        inputs = self.processor.apply_chat_template(
            filled, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = inputs["input_ids"]
        if ids.shape[1] >= self.context:
            raise ValueError(
                f"got a conversation of {ids.shape[1]} tokens, expected fewer than {self.context}: "
                "clear it and start anew"
            )
        return Prompt(
            ids=ids,
            keys=self._keys(ids[0].tolist(), media),
            inputs={name: inputs[name] for name in inputs if "_embeds" in name},
            windows=[
                math.ceil(len(frames) / self.processor.frames_per_window)
                for _, frames in media.recordings
            ],
            modalities=frozenset(
                ["image"] * bool(media.images) + ["audio"] * bool(media.recordings)
            ),
            heard=media.heard,
            encoded=media.encoded,
        )

    def _fill(self, part: dict[str, Any], media: "_Media") -> dict[str, Any]:
        """The part with tower outputs in the place of its file; they are noted in `media`."""
        kind = part["type"]
        if kind == "text":
            return part
        if kind == "image":
            content, features = self._once("image", part["image"], self._see, media)
            media.images.append((content, features))
            return {"type": "image", "image_embeds": features}
        if self.processor.transcript_tokenizer is not None:
            content, (text, features) = self._once(
                "transcript", part["audio"], self._transcribe, media
            )
            media.heard.append(text)
            if features is None:
                return {"type": "text", "text": text}
            media.recordings.append((content, features))
            return {"type": "audio", "audio_embeds": features}
        content, features = self._once("audio", part["audio"], self._hear, media)
        media.recordings.append((content, features))
        return {"type": "audio", "audio_embeds": features}

    def _once(
        self, kind: str, path: str, compute: Callable[[str], Any], media: "_Media"
    ) -> tuple[str, Any]:
        """The content of a file by name, and what `compute` made of it, now or before."""
        if not Path(path).is_file():
            raise ValueError(f"got {path}, which is gone: show or say it again")
        with Path(path).open("rb") as file:
            content = f"{kind}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        value = self.features.get(content)
        if value is None:
            value = compute(path)
            media.encoded += 1
            self.features.put(content, value, _size(value))
        return content, value

    def _open(self, path: str, check: Callable[[str], None], load: Callable[[str], Any]) -> Any:
        try:
            check(path)
            return load(path)
        except ValueError as error:
            raise UnusableFile(str(error), path) from error.__cause__

    def _see(self, path: str) -> torch.Tensor:
        """Patches (P, C) of a picture."""
        picture = self._open(path, self.limits.check_picture, self.processor.load_image)
        pixels = self.processor(images=[picture], return_tensors="pt")["pixel_values"]
        return self.model.model.get_vision_features(pixels.to(self.model.device))[0].cpu()

    def _hear(self, path: str) -> torch.Tensor:
        """Sounding encoder frames (F, C) of a recording."""
        if self.processor.feature_extractor is None:
            self.processor(audio=[path])  # says that there is no tower
        samples = self._open(path, self.limits.check_recording, self.processor.load_audio)
        frames = self.processor.count_frames(len(samples))
        if (tokens := self.processor.count_audio_tokens(frames)) >= self.context:
            seconds = len(samples) / self.processor.feature_extractor.sampling_rate
            raise UnusableFile(
                f"got {path!r}, a recording of {seconds:.0f} s, which is {tokens} tokens, expected "
                f"fewer than {self.context}: record or cut a shorter one",
                path,
            )
        given = self.processor(audio=[samples], return_tensors="pt").to(self.model.device)
        heard = self.model.model.get_audio_tower_features(
            given["input_features"], given["input_features_mask"]
        )
        return heard.flatten(0, 1)[:frames].cpu().clone()

    def _transcribe(self, path: str) -> tuple[str, torch.Tensor | None]:
        """What Whisper wrote, and features (T, C) at its words where the route projects them."""
        samples = self._open(path, self.limits.check_recording, self.processor.load_audio)
        recording = {"role": "user", "content": [{"type": "audio", "audio": samples}]}
        written = self.processor.transcribe([recording], self.model)
        part = written[0]["content"][0]
        return part.get("transcript", part.get("text")), part.get("audio_embeds")

    def _keys(self, ids: list[int], media: "_Media") -> list[Hashable]:
        count, config = self.processor.count_audio_tokens, self.model.config
        placeholders = {
            config.image_token_id: iter(
                (content, number)
                for content, _ in media.images
                for number in range(self.processor.num_image_tokens)
            ),
            config.audio_token_id: iter(
                (content, number)
                for content, frames in media.recordings
                for number in range(count(len(frames)))
            ),
        }
        return [next(placeholders[i]) if i in placeholders else i for i in ids]


def _size(value: torch.Tensor | tuple[str, torch.Tensor | None]) -> int:
    """Bytes of what `_once` keeps."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    text, features = value
    return len(text) + (0 if features is None else features.nbytes)


@dataclass
class _Media:
    """What was met while reading one prompt: (content, features) in reading order."""

    images: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    recordings: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    encoded: int = 0
