"""The phi-mm processor: messages with text, images and audio become the inputs of the model.

It opens media of any usual kind, counts how many tokens each becomes, and writes that many
placeholders.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer, ProcessorMixin
from transformers.image_utils import load_image
from transformers.processing_utils import MultiModalData

from .recordings_phi_mm import media_of, name_of, open_recording, split_at_pauses
from .transcripts_phi_mm import TranscriptMixin

SUB_PROCESSORS = ("image_processor", "feature_extractor", "tokenizer", "transcript_tokenizer")


class _PresentSubProcessors:
    """`get_attributes`: all sub-processors for the class, those that are there for an instance.

    The base class takes for granted that a processor has every sub-processor of its signature; a
    phi-mm model without a tower has none for it.
    """

    def __get__(self, instance: "PhiMMProcessor | None", owner: type):
        if instance is None:
            return lambda: list(SUB_PROCESSORS)
        return lambda: [
            name for name in SUB_PROCESSORS if getattr(instance, name, None) is not None
        ]


class PhiMMProcessor(TranscriptMixin, ProcessorMixin):
    r"""
    Joins a CLIP image processor, a Whisper feature extractor and a Phi tokenizer.

    A picture is given as a path, a URL, a PIL image, a uint8 array (H, W, 3), or as cached patch
    features
    `{"image_embeds": (P, C)}`. A recording is given as a path, a URL, the bytes of a file, a file
    object, a 16 kHz array (samples,), a pair `(array, sampling_rate)`, a dict
    `{"array", "sampling_rate"}`, `{"bytes"}` or `{"path"}`, or as cached encoder frames
    `{"audio_embeds": (F, C)}`. In messages they stand under the part's own type:
    `{"type": "image", "image": "cat.png"}`, `{"type": "audio", "audio": "question.wav"}`.

    Args:
        image_processor: CLIP's; `None` for a model without images, which then has no such
            attribute.
        feature_extractor: Whisper's; `None` for a model without audio.
        tokenizer: Phi's, with the placeholder tokens in its vocabulary.
        transcript_tokenizer: Whisper's, for the routes that start from a transcript.
        num_image_tokens: placeholders for one picture (`PhiMMConfig.num_image_tokens`).
        audio_stack: encoder frames stacked into one audio token (`PhiMMConfig.audio_stack`).
        chat_template: Jinja source; `processing.chat_template_for(tokenizer)` has one for each Phi.
    """

    get_attributes = _PresentSubProcessors()
    text_kwargs = {"padding": True, "padding_side": "left"}

    def __init__(
        self,
        image_processor=None,
        feature_extractor=None,
        tokenizer=None,
        transcript_tokenizer=None,
        num_image_tokens: int = 576,
        audio_stack: int = 4,
        image_token: str = "<|image|>",
        audio_token: str = "<|audio|>",
        chat_template: str | None = None,
    ):
        self.num_image_tokens = num_image_tokens
        self.audio_stack = audio_stack
        self.image_token, self.audio_token = image_token, audio_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        self.chat_template = chat_template
        given = (image_processor, feature_extractor, tokenizer, transcript_tokenizer)
        for name, part in zip(SUB_PROCESSORS, given, strict=True):
            if part is not None:
                self.check_argument_for_proper_class(name, part)
            # vLLM takes whatever has this attribute for a processor of pictures.
            if part is not None or name != "image_processor":
                setattr(self, name, part)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path, processor_dict=None, **kwargs
    ) -> list:
        saved = processor_dict or {}
        subfolder = kwargs.pop("subfolder", "")

        def load(auto_class, name, folder):
            if saved.get(name) is None and name != "tokenizer":
                return None
            return auto_class.from_pretrained(
                pretrained_model_name_or_path, subfolder=folder, **kwargs
            )

        transcript_folder = f"{subfolder}/transcript_tokenizer".lstrip("/")
        return [
            load(AutoImageProcessor, "image_processor", subfolder),
            load(AutoFeatureExtractor, "feature_extractor", subfolder),
            load(AutoTokenizer, "tokenizer", subfolder),
            load(AutoTokenizer, "transcript_tokenizer", transcript_folder),
        ]

    def to_dict(self) -> dict[str, Any]:
        """As the base class, but an absent sub-processor leaves no key behind."""
        output = {k: v for k, v in super().to_dict().items() if v is not None}
        if self.transcript_tokenizer is not None:
            output["transcript_tokenizer"] = True  # its files are in a subfolder of that name
        return output

    @property
    def model_input_names(self) -> list[str]:
        names = list(self.tokenizer.model_input_names)
        if "image_processor" in self.get_attributes():
            names += ["pixel_values", "image_embeds"]
        if self.feature_extractor is not None:
            names += ["input_features", "input_features_mask", "audio_embeds", "audio_embeds_mask"]
        return names

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_audio_tokens"]

    # ---- messages

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As in transformers; placeholder and control tokens that stand in the messages' text stay
        text.

        They are broken up by a zero-width space, so that what a user types never opens a turn or
        moves a picture.
        """
        return super().apply_chat_template(
            self._escape_control_tokens(conversation), *args, **kwargs
        )

    def _escape_control_tokens(self, value: Any) -> Any:
        if isinstance(value, str):
            for token in self._control_tokens():
                value = value.replace(token, token[0] + "\u200b" + token[1:])
            return value
        if isinstance(value, dict):
            return {
                k: self._escape_control_tokens(v) if k in ("content", "text") else v
                for k, v in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._escape_control_tokens(v) for v in value]
        return value

    def _control_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special or token.content.startswith("<|")]

    def _multimodal_inputs_from_conversations(
        self, conversations, audio_loading_params, load_audio_from_video=False
    ):
        """Collects the media of all messages in reading order; they are opened in
        `prepare_inputs_layout`.
        """
        images, audios = [], []
        for message in (message for conversation in conversations for message in conversation):
            content = message.get("content") or []
            for part in [] if isinstance(content, str) else content:
                if part["type"] == "image":
                    images.append(
                        media_of(part, ("image", "url", "path", "base64", "image_embeds"))
                    )
                elif part["type"] == "audio":
                    audios.append(
                        media_of(part, ("audio", "url", "path", "base64", "audio_embeds"))
                    )
        # One flat list for the whole batch, in the batch's reading order, which is what the model
        # takes.
        return [images] if images else [[None]], [[None]], audios, {}

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Opens the media and flattens them to one list each."""
        if videos is not None:
            raise ValueError("got videos, expected images or audio: phi-mm has no video tower")
        if images is not None:
            self._require("image_processor", "images", "vision tower")
            images = [x if _is_cached(x) else self.load_image(x) for x in _flatten(images)]
        if audio is not None:
            self._require("feature_extractor", "audio", "audio tower")
            audio = _flatten(audio)
            written = self.transcript_tokenizer is not None and text is not None
            if written and not all(map(_is_cached, audio)):
                raise ValueError(
                    "got audio, but this model's audio_route starts from a transcript: first write "
                    "it down with messages = processor.transcribe(messages, model)"
                )
            audio = [x if _is_cached(x) else self.load_audio(x) for x in audio]
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
        return images, text, videos, audio

    def _require(self, sub_processor: str, what: str, tower: str):
        if sub_processor not in self.get_attributes():
            raise ValueError(
                f"got {what}, but this model has no {tower}: leave them out, or use a model that "
                "has one"
            )

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Checks that there are as many placeholders as media.

        Raises:
            ValueError: naming both numbers.
        """
        if images is None and text is None and audio is None:
            raise ValueError("got no text, images or audio, expected at least one of them")
        if text is None:
            return
        for name, token, media in (
            ("images", self.image_token, images),
            ("recordings", self.audio_token, audio),
        ):
            found, given = sum(sample.count(token) for sample in text), len(media or [])
            if found != given:
                raise ValueError(
                    f"got {given} {name} and {found} {token} placeholders in the text, expected "
                    "as many of both"
                )

    # ---- images

    def load_image(self, source: Any) -> Image.Image:
        """Opens a picture as RGB: turned as EXIF says, alpha on white, 16 bit scaled to 8, an
        animation's first frame.

        Raises:
            ValueError: when the source is missing, broken or no picture; the message names it.
        """
        name = name_of(source)
        try:
            if isinstance(source, (str, Path)) and not _is_local(source):
                return load_image(str(source))
            if isinstance(source, (str, Path)):
                source = Image.open(source)
            elif isinstance(source, (np.ndarray, torch.Tensor)):
                source = Image.fromarray(_as_uint8_hwc(source))
            if not isinstance(source, Image.Image):
                raise ValueError(f"a {type(source).__name__} is not a picture")
            return _to_rgb(source)
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"got the image {name}, expected one of a sane size: {error}"
            ) from error
        except Exception as error:  # a broken file makes Pillow raise errors of any kind
            raise ValueError(
                f"got the image {name}, expected a picture that can be opened (PNG, JPEG, GIF, "
                f"WebP, ...): {error}"
            ) from error

    def pad_to_square(self, image: Image.Image) -> Image.Image:
        """Scales the longer side to the tower's input and pads the shorter with the mean colour
        (LLaVA-1.5's `pad`).

        Scaling comes first, so that a very long picture never becomes a huge square.
        """
        side = self.image_processor.crop_size["height"]
        scale = side / max(image.size)
        size = tuple(max(1, round(length * scale)) for length in image.size)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        if size == (side, side):
            return image
        colour = tuple(round(255 * mean) for mean in self.image_processor.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
        return square

    def _process_images(self, images: list, **kwargs) -> tuple[dict, list[str]]:
        cached = _all_cached(images, "images")
        if cached:
            inputs = {"image_embeds": torch.stack([image["image_embeds"] for image in images])}
        else:
            squares = [self.pad_to_square(image) for image in images]
            inputs = {
                "pixel_values": self.image_processor(squares, return_tensors="pt")["pixel_values"]
            }
        return inputs, [self.replace_image_token(inputs, i) for i in range(len(images))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one picture."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """What vLLM reserves: the same number of tokens, and one row of pixels, for any picture.

        Args:
            image_sizes: (height, width) of each picture.
        """
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count
        )

    # ---- audio

    def load_audio(self, source: Any) -> np.ndarray:
        """Opens a recording of any usual kind as 16 kHz mono float32 (samples,), by
        `open_recording`, which says what it may be.

        Raises:
            ValueError: when the source is missing, broken, empty or holds NaN; the message names
                it.
        """
        return open_recording(source, self.feature_extractor.sampling_rate)

    def split_windows(self, samples: np.ndarray) -> list[np.ndarray]:
        """Cuts a recording into windows of at most Whisper's length (30 s).

        For the encoder all are full but the last. Where Whisper writes them down they end in
        pauses.
        """
        length = self.feature_extractor.n_samples
        if self.transcript_tokenizer is not None:
            return split_at_pauses(samples, length, self.feature_extractor.sampling_rate)
        return [samples[start : start + length] for start in range(0, len(samples), length)]

    def count_audio_tokens(self, num_frames: int) -> int:
        """Audio tokens of a recording with that many sounding encoder frames (20 ms each), window
        by window.
        """
        whole, rest = divmod(num_frames, self.frames_per_window)
        return whole * math.ceil(self.frames_per_window / self.audio_stack) + math.ceil(
            rest / self.audio_stack
        )

    @property
    def frames_per_window(self) -> int:
        """Encoder frames of one window: Whisper's second convolution halves the mel rate."""
        return self.feature_extractor.nb_max_frames // 2

    def count_frames(self, num_samples: int) -> int:
        """Sounding encoder frames of a recording of that many 16 kHz samples."""
        whole, rest = divmod(num_samples, self.feature_extractor.n_samples)
        mel_frames = math.ceil(rest / self.feature_extractor.hop_length)
        return whole * self.frames_per_window + math.ceil(mel_frames / 2)

    def _process_audio(self, audio: list, **kwargs) -> tuple[dict, list[str]]:
        if _all_cached(audio, "audio"):
            frames = [len(recording["audio_embeds"]) for recording in audio]
            inputs = self._pad_frames([recording["audio_embeds"] for recording in audio])
        else:
            frames = [self.count_frames(len(samples)) for samples in audio]
            inputs = self._mel_windows(self._all_windows(audio))
        inputs["num_audio_tokens"] = [self.count_audio_tokens(count) for count in frames]
        return inputs, [self.replace_audio_token(inputs, i) for i in range(len(audio))]

    def _all_windows(self, recordings: list[np.ndarray]) -> list[np.ndarray]:
        return [window for samples in recordings for window in self.split_windows(samples)]

    def _mel_windows(self, windows: list[np.ndarray]) -> dict[str, torch.Tensor]:
        extracted = self.feature_extractor(
            windows,
            sampling_rate=self.feature_extractor.sampling_rate,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {
            "input_features": extracted["input_features"],
            "input_features_mask": extracted["attention_mask"],
        }

    def _pad_frames(self, recordings: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        windows = [w for frames in recordings for w in frames.split(self.frames_per_window)]
        mask = [torch.ones(len(window), dtype=torch.long) for window in windows]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "audio_embeds": pad(windows, batch_first=True),
            "audio_embeds_mask": pad(mask, batch_first=True),
        }

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs) -> str:
        """The placeholders of one recording."""
        return self.audio_token * audio_inputs["num_audio_tokens"][audio_idx]


def _is_cached(item: Any) -> bool:
    return isinstance(item, dict) and ("image_embeds" in item or "audio_embeds" in item)


def _all_cached(items: list, what: str) -> bool:
    cached = sum(_is_cached(item) for item in items)
    if cached not in (0, len(items)):
        raise ValueError(
            f"got {cached} cached and {len(items) - cached} raw {what} in one batch, expected all "
            "cached or all raw"
        )
    return cached > 0


def _flatten(items: Any) -> list:
    """Media in any nesting of lists to one flat list; a pair (array, rate) and a list of samples
    are one item.
    """
    if not isinstance(items, list) or (items and isinstance(items[0], float)):
        return [items]
    return [leaf for item in items for leaf in _flatten(item)]


def _is_local(source: str | Path) -> bool:
    return not str(source).startswith(("http://", "https://", "data:"))


def _as_uint8_hwc(array: np.ndarray | torch.Tensor) -> np.ndarray:
    array = array.cpu().numpy() if isinstance(array, torch.Tensor) else array
    if array.dtype != np.uint8:
        raise ValueError(f"got an array of {array.dtype}, expected uint8 values from 0 to 255")
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # channels first, as torch has it
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def _to_rgb(image: Image.Image) -> Image.Image:
    image.seek(0)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bit, as scanners and depth cameras write
        values = np.asarray(image).clip(0, 65535).astype(np.int32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


__all__ = ["PhiMMProcessor"]
