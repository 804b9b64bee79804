"""How pictures and recordings become embeddings in the places that the prompt keeps for them.

Shapes as in modeling_phi_mm.py: B samples, L text positions, N images, P patches, W audio windows,
    M mel frames, F encoder frames, C tower width, D language model width.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .adapters_phi_mm import refuse_mixed_projectors
from .packing_phi_mm import any_in_conversation
from .transcription_phi_mm import WINDOWS_AT_ONCE, WRITTEN_ROUTES, TranscriptionMixin

MEDIA_INPUTS = (
    "pixel_values",
    "image_embeds",
    "input_features",
    "input_features_mask",
    "audio_embeds",
    "audio_embeds_mask",
)


class MediaMixin(TranscriptionMixin):
    """For a model with `vision_tower`, `audio_tower` (or None) and their projectors, and a
    `modality_router` (or None) of adapters by modality.
    """

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the vision tower sees before projection, (N, 3, H, W) to patches (N, P, C) without
        the class token.
        """
        self._require_vision()
        # A frozen tower runs without a graph even under activation checkpointing, which would
        # otherwise make its embeddings require gradients and back-propagate through it.
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(self.vision_tower)):
            hidden = self.vision_tower(pixel_values.to(self.vision_tower.dtype)).last_hidden_state
        return hidden[:, 1:]

    def get_audio_tower_features(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the audio tower hears before projection, mel windows (W, mels, M) to frames (W, F,
        C).

        Args:
            input_features_mask: (W, M), 1 where a mel frame holds sound. Only a model with
                `audio_padded=False` reads it: F is then that of the longest sound, and zeros
                follow the others.
        """
        self._require_audio_encoder()
        if self.config.audio_route in WRITTEN_ROUTES:
            raise ValueError(
                f"got mel windows, but audio_route is {self.config.audio_route!r}, which starts "
                "from the transcript: write it down with processor.transcribe(messages, model)"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(self.audio_tower)):
            mel = input_features.to(self.audio_tower.dtype)
            if self.config.audio_padded or input_features_mask is None:
                return _some_at_a_time(lambda w: self.audio_tower(w).last_hidden_state, mel)
            return _encode_sound(self.audio_tower, mel, input_features_mask.sum(dim=1))

    def _require_vision(self):
        if self.vision_tower is None:
            raise ValueError(
                "got images, but this model has no vision tower: its config holds no vision_config"
            )

    def _require_audio_encoder(self):
        if self.audio_tower is None:
            raise ValueError(
                "got audio, but this model has no audio tower: its config holds no audio_config"
            )
        if self.config.audio_route == "transcript":
            raise ValueError(
                "got audio features, but audio_route is 'transcript': put the transcripts into "
                "the messages with processor.transcribe(messages, model)"
            )

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Image tokens (N, tokens, D) in `pooler_output`.

        Args:
            pixel_values: (N, 3, H, W).
            image_embeds: cached patch features (N, P, C) in place of pixels.
        """
        self._require_vision()
        refuse_mixed_projectors(self.multi_modal_projector)
        _check_one_form("pixel_values", pixel_values, "image_embeds", image_embeds)
        features = image_embeds
        if image_embeds is None:
            features = self.get_vision_features(pixel_values)
        features = features.to(_input_dtype(self.multi_modal_projector))
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=self.multi_modal_projector(features)
        )

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        audio_embeds_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Audio tokens (tokens of all windows, D) in `pooler_output`.

        Args:
            input_features: mel windows (W, mels, M), each as long as Whisper's window.
            input_features_mask: (W, M), 1 where a mel frame (10 ms) holds sound; all of them when
                absent.
            audio_embeds: cached encoder frames (W, F, C) in place of mel windows; on the routes
                `transcript_embeddings` and `decoder` what `get_transcript_features` gives.
            audio_embeds_mask: (W, F), 1 where a frame (20 ms) holds sound, or a token of the
                transcript stands; all of them when absent.
        """
        self._require_audio_encoder()
        refuse_mixed_projectors(self.audio_projector)
        _check_one_form("input_features", input_features, "audio_embeds", audio_embeds)
        features, mask = audio_embeds, audio_embeds_mask
        if audio_embeds is None:
            features = self.get_audio_tower_features(input_features, input_features_mask)
            if input_features_mask is not None:
                mask = _frame_mask(input_features_mask, features.shape[1])
        features = features.to(_input_dtype(self.audio_projector))
        if mask is None:
            mask = features.new_ones(features.shape[:2])
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=self.audio_projector(features, mask)
        )

    def encode_media(
        self,
        media: dict[str, torch.Tensor],
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
    ) -> dict[str, BaseModelOutputWithPooling]:
        """Projects the media inputs that are there, beside what was projected before.

        Returns:
            `{"image": ..., "audio": ...}`, each with its tokens in `pooler_output`.

        Raises:
            ValueError: when a modality comes both raw and projected.
        """
        fresh = {}
        if "pixel_values" in media or "image_embeds" in media:
            own = {k: v for k, v in media.items() if k in ("pixel_values", "image_embeds")}
            fresh["image"] = self.get_image_features(**own, return_dict=True)
        if "input_features" in media or "audio_embeds" in media:
            own = {k: v for k, v in media.items() if k.startswith(("input_", "audio_"))}
            fresh["audio"] = self.get_audio_features(**own, return_dict=True)
        encoded = dict(mm_encoder_outputs or {})
        if twice := encoded.keys() & fresh.keys():
            raise ValueError(
                f"got both mm_encoder_outputs and raw inputs for {sorted(twice)}, expected one of "
                "them"
            )
        return encoded | fresh

    def find_placeholders(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        token_id: int,
    ) -> torch.BoolTensor:
        """(B, L): true at the placeholder `token_id`, also where only its embedding is there."""
        if input_ids is not None and input_ids.numel() > 0:
            return input_ids == token_id
        token = torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def find_modalities(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None = None,
        conversations: torch.LongTensor | None = None,
    ) -> torch.BoolTensor:
        """(B, 2): which rows hold a picture, and which a recording.

        With `conversations` (B, L) it is (B, L, 2), the same at all tokens of a conversation.

        Raises:
            ValueError: when embeddings hold no placeholder: media may have been merged into them.
        """
        columns = []
        for token_id in (self.config.image_token_id, self.config.audio_token_id):
            given = inputs_embeds if input_ids is None else input_ids
            columns.append(
                given.new_zeros(given.shape[:2], dtype=torch.bool)
                if token_id is None
                else self.find_placeholders(input_ids, inputs_embeds, token_id)
            )
        found = torch.stack(columns, dim=-1)  # (B, L, 2)
        mask = found.any(1) if conversations is None else any_in_conversation(found, conversations)
        if input_ids is None and not mask.any():
            raise ValueError(
                "got inputs_embeds without a placeholder, expected modality_mask (B, 2) beside "
                "them: adapters by modality cannot tell merged media from text"
            )
        return mask

    def choose_adapters(
        self,
        modality_mask: torch.BoolTensor | None,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        past_key_values: Cache | None,
        conversations: torch.LongTensor | None,
    ):
        """Tells the adapters by modality which rows, or conversations of a row, are theirs."""
        if self.modality_router is None:
            raise ValueError(
                f"got a config with adapters for {self.config.modality_adapters} and a model "
                "without them: load it by PhiMMForConditionalGeneration.from_pretrained"
            )
        if modality_mask is None:
            if past_key_values is not None and past_key_values.get_seq_length() > 0:
                raise ValueError(
                    "got a cache and no modality_mask, expected modality_mask=model.model."
                    "find_modalities(input_ids) of the whole prompt: what is in the cache decides "
                    "which adapters go on"
                )
            modality_mask = self.find_modalities(input_ids, inputs_embeds, conversations)
        self.modality_router.mask = modality_mask

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        token_id: int | None,
        features: torch.Tensor | None,
        modality: str,
    ) -> torch.Tensor:
        """Where `features` (tokens, D) go: (B, L, 1), true at the placeholders.

        Raises:
            ValueError: when the number of placeholders is not the number of features; names both.
        """
        mask = self.find_placeholders(input_ids, inputs_embeds, token_id)
        count, expected = mask.sum(), 0 if features is None else len(features)
        torch_compilable_check(
            count == expected,
            lambda: (
                f"got {expected} {modality} tokens from the encoder and {count} {modality} "
                "placeholders in the "
                f"prompt, expected as many of both: pass every {modality} that the prompt names, "
                "and never truncate a "
                "prompt inside a placeholder run"
            ),
        )
        return mask.unsqueeze(-1)

    def merge_media(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling],
    ) -> torch.Tensor:
        """Scatters the projected media into the placeholders of `inputs_embeds` (B, L, D)."""
        for modality, token_id in (
            ("image", self.config.image_token_id),
            ("audio", self.config.audio_token_id),
        ):
            output = mm_encoder_outputs.get(modality)
            if token_id is None or (output is None and input_ids is None):
                continue
            features = None
            if output is not None:
                features = output.pooler_output
                if isinstance(features, (list, tuple)):
                    features = torch.cat(features)
                features = features.reshape(-1, features.shape[-1]).to(
                    inputs_embeds.device, inputs_embeds.dtype
                )
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, token_id, features, modality)
            if features is not None:
                inputs_embeds = inputs_embeds.masked_scatter(mask, features)
        return inputs_embeds


def _some_at_a_time(
    encode: Callable[[torch.Tensor], torch.Tensor], windows: torch.Tensor
) -> torch.Tensor:
    """`encode` of all windows; where no graph is kept, of a few at a time, so that an hour needs no
    more memory for activations than four minutes.
    """
    if torch.is_grad_enabled():
        return encode(windows)
    return torch.cat([encode(some) for some in windows.split(WINDOWS_AT_ONCE)])


def _encode_sound(encoder: nn.Module, mel: torch.Tensor, lengths: torch.LongTensor) -> torch.Tensor:
    """Windows (W, mels, M), of which so many frames sound (W), to (W, F, C). Those of one length go
    through the encoder together, so that none needs a mask.
    """
    longest = (int(lengths.max()) + 1) // 2
    features = mel.new_zeros(len(mel), longest, encoder.config.d_model)
    for length in lengths.unique().tolist():
        same = lengths == length
        heard = _some_at_a_time(partial(_encode_unpadded, encoder), mel[same, :, :length])
        features[same, : heard.shape[1]] = heard
    return features


def _encode_unpadded(encoder: nn.Module, mel: torch.Tensor) -> torch.Tensor:
    """Mel frames (W, mels, M) of any number to (W, M / 2, C). transformers' `WhisperEncoder` takes
    windows of its full length alone; this is its forward pass, and equal to it for such windows
    (but that no layer is dropped in training).
    """
    hidden = nn.functional.gelu(encoder.conv1(mel))
    hidden = nn.functional.gelu(encoder.conv2(hidden)).permute(0, 2, 1)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    hidden = nn.functional.dropout(hidden, p=encoder.dropout, training=encoder.training)
    for layer in encoder.layers:
        hidden = layer(hidden, None)
    return encoder.layer_norm(hidden)


def is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _input_dtype(projector: nn.Module) -> torch.dtype:
    return next(projector.parameters()).dtype


def _check_one_form(
    raw_name: str, raw: torch.Tensor | None, cached_name: str, cached: torch.Tensor | None
):
    if (raw is None) == (cached is None):
        raise ValueError(
            f"got both or neither of {raw_name} and {cached_name}, expected exactly one"
        )


def _frame_mask(mel_mask: torch.Tensor, frames: int) -> torch.Tensor:
    """Encoder frames (20 ms) that hold sound, (W, M) to (W, F): Whisper's second convolution halves
    the rate.
    """
    sounding = (mel_mask.sum(-1, keepdim=True) - 1) // 2 + 1
    return (torch.arange(frames, device=mel_mask.device) < sounding).long()


__all__ = ["MEDIA_INPUTS", "MediaMixin", "is_trained"]
