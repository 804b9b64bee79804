"""The phi-mm model: towers see and hear, projectors translate, Phi answers.

Shapes: B samples, L text positions, N images, P patches, W audio windows, M mel frames, F encoder
    frames, C tower width, D language model width, V vocabulary.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.whisper import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .attention_phi_mm import build_language_model, computes_in_float16
from .configuration_phi_mm import PhiMMConfig
from .generation_phi_mm import PhiMMGenerationMixin
from .projectors_phi_mm import AudioProjector, ImageProjector

MEDIA_INPUTS = (
    "pixel_values",
    "image_embeds",
    "input_features",
    "input_features_mask",
    "audio_embeds",
    "audio_embeds_mask",
)


@dataclass
class PhiMMModelOutputWithPast(BaseModelOutputWithPast):
    """
    image_hidden_states (`torch.Tensor` of shape `(N, image tokens, D)`, *optional*): the projected
    images. audio_hidden_states (`torch.Tensor` of shape `(audio tokens, D)`, *optional*): the
    projected recordings.
    """

    image_hidden_states: torch.FloatTensor | None = None
    audio_hidden_states: torch.FloatTensor | None = None


@dataclass
class PhiMMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    logits: `(B, L, V)`, or `(supervised positions, V)` when labels are given.
    image_hidden_states (`torch.Tensor` of shape `(N, image tokens, D)`, *optional*): the projected
    images. audio_hidden_states (`torch.Tensor` of shape `(audio tokens, D)`, *optional*): the
    projected recordings.
    """

    image_hidden_states: torch.FloatTensor | None = None
    audio_hidden_states: torch.FloatTensor | None = None


# What stays in float when the language model is quantised; quantisers match names from the start.
FLOAT_MODULES = (
    r"(model\.)?(vision_tower|audio_tower|multi_modal_projector|audio_projector)|lm_head"
)


class PhiMMPreTrainedModel(PreTrainedModel):
    config: PhiMMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "audio", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules = [FLOAT_MODULES]  # every quantiser of transformers leaves these alone

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args,
        use_safetensors: bool | None = True,
        **kwargs,
    ) -> "PhiMMPreTrainedModel":
        """As in transformers, but from safetensors only: a pickle runs whatever code it holds.

        Raises:
            ValueError: `use_safetensors=False`, or a folder that holds pickled weights alone.
        """
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        pickled = pretrained_model_name_or_path is not None and sorted(
            folder.glob("pytorch_model*.bin")
        )
        if use_safetensors is False or (pickled and not any(folder.glob("*.safetensors"))):
            got = pickled[0].name if pickled else "use_safetensors=False"
            raise ValueError(
                f"got {got}, expected weights in safetensors, for unpickling can run any code: "
                "load them where you trust them, and save them again with save_pretrained"
            )
        return super().from_pretrained(
            pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs
        )

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """As in transformers, but what the quantisers leave alone is float16 in a float16 model."""
        plan = super()._get_dtype_plan(dtype)
        return {name: kept for name, kept in plan.items() if name != FLOAT_MODULES}


class PhiMMModel(PhiMMPreTrainedModel):
    """Towers, projectors and language model, without the vocabulary head."""

    def __init__(self, config: PhiMMConfig):
        super().__init__(config)
        self.vision_tower = self.multi_modal_projector = None
        if config.vision_config is not None:
            self.vision_tower = AutoModel.from_config(config.vision_config)
            del self.vision_tower.encoder.layers[config.num_vision_layers :]
            self.multi_modal_projector = ImageProjector(config)
        self.audio_tower = self.audio_projector = None
        if config.audio_config is not None:
            if config.audio_route == "transcript":
                self.audio_tower = WhisperForConditionalGeneration._from_config(config.audio_config)
            else:
                self.audio_tower = WhisperEncoder._from_config(config.audio_config)
                self.audio_projector = AudioProjector(config)
        self.language_model = build_language_model(config.text_config)
        self.post_init()

    def train(self, mode: bool = True) -> "PhiMMModel":
        """As `nn.Module.train`, but a frozen tower stays in eval mode: its features are fixed."""
        super().train(mode)
        for tower in (self.vision_tower, self.audio_tower):
            if tower is not None and not _is_trained(tower):
                tower.eval()
        return self

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the vision tower sees before projection, (N, 3, H, W) to patches (N, P, C) without
        the class token.
        """
        self._require_vision()
        # A frozen tower runs without a graph even under activation checkpointing, which would
        # otherwise make its embeddings require gradients and back-propagate through it.
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.vision_tower)):
            hidden = self.vision_tower(pixel_values.to(self.vision_tower.dtype)).last_hidden_state
        return hidden[:, 1:]

    def get_audio_tower_features(self, input_features: torch.Tensor) -> torch.Tensor:
        """What the audio tower hears before projection, mel windows (W, mels, M) to frames (W, F,
        C).
        """
        self._require_audio_encoder()
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.audio_tower)):
            return self.audio_tower(input_features.to(self.audio_tower.dtype)).last_hidden_state

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
            audio_embeds: cached encoder frames (W, F, C) in place of mel windows.
            audio_embeds_mask: (W, F), 1 where a frame (20 ms) holds sound; all of them when absent.
        """
        self._require_audio_encoder()
        _check_one_form("input_features", input_features, "audio_embeds", audio_embeds)
        features, mask = audio_embeds, audio_embeds_mask
        if audio_embeds is None:
            features = self.get_audio_tower_features(input_features)
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
        if input_ids is None:
            token = torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == token_id
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

    def _touch_idle_projectors(self, inputs_embeds: torch.Tensor, used: dict) -> torch.Tensor:
        """Puts the projector of an absent modality into the graph with weight zero.

        Under DistributedDataParallel and ZeRO every trained weight needs a gradient in every step,
        also on a rank whose batch holds no image or no audio.
        """
        for modality, projector in (
            ("image", self.multi_modal_projector),
            ("audio", self.audio_projector),
        ):
            if projector is not None and modality not in used:
                trained = [p for p in projector.parameters() if p.requires_grad]
                if trained:
                    inputs_embeds = (
                        inputs_embeds + sum(p.sum() for p in trained).to(inputs_embeds.dtype) * 0
                    )
        return inputs_embeds

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        audio_embeds_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PhiMMModelOutputWithPast:
        """See [`PhiMMForConditionalGeneration.forward`]; returns hidden states (B, L, D) in place
        of logits.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "got both or neither of input_ids and inputs_embeds, expected exactly one"
            )
        media = {
            name: value
            for name, value in zip(
                MEDIA_INPUTS,
                (
                    pixel_values,
                    image_embeds,
                    input_features,
                    input_features_mask,
                    audio_embeds,
                    audio_embeds_mask,
                ),
                strict=True,
            )
            if value is not None
        }
        encoded = self.encode_media(media, mm_encoder_outputs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        inputs_embeds = self.merge_media(input_ids, inputs_embeds, encoded)
        if self.training:
            inputs_embeds = self._touch_idle_projectors(inputs_embeds, encoded)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return PhiMMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=encoded["image"].pooler_output if "image" in encoded else None,
            audio_hidden_states=encoded["audio"].pooler_output if "audio" in encoded else None,
        )


class PhiMMForConditionalGeneration(PhiMMPreTrainedModel, PhiMMGenerationMixin):
    """phi-mm with its vocabulary head: text, images and audio in, text out."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: PhiMMConfig):
        super().__init__(config)
        self.model = PhiMMModel(config)
        # Phi-1, 1.5 and 2 have a bias in their head, Phi-3 and later have none.
        self.lm_head = nn.Linear(
            config.text_config.hidden_size,
            config.text_config.vocab_size,
            bias=config.text_config.model_type == "phi",
        )
        self.post_init()

    def get_image_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`PhiMMModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    def get_audio_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        """See [`PhiMMModel.get_audio_features`]."""
        return self.model.get_audio_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        audio_embeds_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PhiMMCausalLMOutputWithPast:
        """One pass over a batch.

        Args:
            input_ids: (B, L), with one placeholder for every image and audio token.
            pixel_values: (N, 3, H, W), all images of the batch in reading order.
            input_features, input_features_mask: (W, mels, M) and (W, M), all audio windows in
                reading order.
            image_embeds: (N, P, C) patch features in place of `pixel_values`.
            audio_embeds, audio_embeds_mask: (W, F, C) and (W, F), encoder frames in place of
                `input_features`.
            inputs_embeds: (B, L, D) in place of `input_ids`.
            labels: (B, L), -100 where nothing is supervised. The vocabulary head then runs on the
                supervised positions only, and `logits` holds those, (supervised positions, V).
            logits_to_keep: as in transformers' models; ignored when labels are given.
            mm_encoder_outputs: projected media, as `generate` hands them to the prefill.

        Raises:
            ValueError: when placeholders and media do not match, or a modality comes in two forms
                at once.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            input_features=input_features,
            input_features_mask=input_features_mask,
            image_embeds=image_embeds,
            audio_embeds=audio_embeds,
            audio_embeds_mask=audio_embeds_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden, loss = outputs.last_hidden_state, None
        if labels is None:
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
            self._check_finite(logits)
        else:
            targets = nn.functional.pad(
                labels[:, 1:], (0, 1), value=-100
            )  # position t predicts token t+1
            supervised = targets != -100
            logits = self.lm_head(hidden[supervised])
            loss = self.loss_function(
                logits=logits,
                labels=None,
                shift_labels=targets[supervised],
                vocab_size=self.config.text_config.vocab_size,
                **kwargs,
            )
        return PhiMMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            audio_hidden_states=outputs.audio_hidden_states,
        )

    def _check_finite(self, logits: torch.Tensor):
        """Float16 that overflows is an error, never an answer; in training it is the business of
        the gradient scaler, which skips the step.
        """
        if not self.training and computes_in_float16(logits):
            torch_compilable_check(
                logits.isfinite().all(),
                "got float16, in which this model overflows on this input: its logits are not "
                "finite; load it with dtype=torch.bfloat16 or torch.float32",
            )

    @torch.no_grad()
    def transcribe(self, input_features: torch.Tensor, **generate_kwargs) -> torch.LongTensor:
        """Whisper's own transcript, for the `transcript` route.

        Args:
            input_features: mel windows (W, mels, M).

        Returns:
            (W, tokens): ids of Whisper's vocabulary, decoded by `processor.transcript_tokenizer`.

        Raises:
            ValueError: when the model was not built for the `transcript` route.
        """
        if self.config.audio_config is None or self.config.audio_route != "transcript":
            raise ValueError(
                f"got audio_route={self.config.audio_route!r}, expected 'transcript' and an "
                "audio_config: only then "
                "does the model hold Whisper's decoder"
            )
        whisper = self.model.audio_tower
        return whisper.generate(
            input_features=input_features.to(whisper.device, whisper.dtype),
            generation_config=GenerationConfig.from_dict(
                self.config.transcript_generation_config or {}
            ),
            **generate_kwargs,
        )

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict) -> dict:
        """Projects all media once before the prefill.

        transformers does so for images only; audio would be repeated window by window for beams,
        which mixes up the recordings of a sample that holds two. Media inputs leave the arguments
        here, so no decoding step sees them.
        """
        media = {k: model_kwargs.pop(k) for k in MEDIA_INPUTS if model_kwargs.get(k) is not None}
        model_kwargs["mm_encoder_outputs"] = self.model.encode_media(
            media, model_kwargs.get("mm_encoder_outputs")
        )
        return model_kwargs

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.LongTensor,
        mm_encoder_output: dict,
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict:
        """Repeats the media of each sample as one group, for beams and `num_return_sequences`."""
        expanded = {}
        for modality, token_id in (
            ("image", self.config.image_token_id),
            ("audio", self.config.audio_token_id),
        ):
            if mm_encoder_output.get(modality) is None:
                continue
            features = mm_encoder_output[modality].pooler_output
            if input_ids is None or input_ids.numel() == 0:
                token = torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device)
                is_placeholder = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
            else:
                is_placeholder = input_ids == token_id
            counts = is_placeholder.sum(-1).tolist()
            flat = torch.cat(list(features)) if modality == "image" else features
            groups = torch.split(flat, counts)
            expanded[modality] = BaseModelOutputWithPooling(
                pooler_output=torch.cat([group for group in groups for _ in range(expand_size)])
            )
        return expanded


def _is_trained(module: nn.Module) -> bool:
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


__all__ = ["PhiMMForConditionalGeneration", "PhiMMModel", "PhiMMPreTrainedModel"]
