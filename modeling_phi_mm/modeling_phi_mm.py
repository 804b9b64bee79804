"""The phi-mm model: towers see and hear, projectors translate, Phi answers.

Shapes: B samples, L text positions, N images, P patches, W audio windows, M mel frames, F encoder
    frames, C tower width, D language model width, V vocabulary.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
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

from .adapters_phi_mm import ModalityAdaptersMixin
from .attention_phi_mm import build_language_model, computes_in_float16
from .configuration_phi_mm import PhiMMConfig
from .generation_phi_mm import PhiMMGenerationMixin
from .media_phi_mm import MEDIA_INPUTS, MediaMixin, is_trained
from .packing_phi_mm import find_conversations, packed_arguments
from .projectors_phi_mm import AudioProjector, ImageProjector
from .transcription_phi_mm import WRITTEN_ROUTES


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


class PhiMMModel(MediaMixin, PhiMMPreTrainedModel):
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
            whole = config.audio_route in WRITTEN_ROUTES
            tower = WhisperForConditionalGeneration if whole else WhisperEncoder
            self.audio_tower = tower._from_config(config.audio_config)
            if config.audio_route != "transcript":
                self.audio_projector = AudioProjector(config)
        self.language_model = build_language_model(config.text_config)
        self.modality_router = None  # there once adapters by modality are
        self.post_init()

    def train(self, mode: bool = True) -> "PhiMMModel":
        """As `nn.Module.train`, but a frozen tower stays in eval mode: its features are fixed."""
        super().train(mode)
        for tower in (self.vision_tower, self.audio_tower):
            if tower is not None and not is_trained(tower):
                tower.eval()
        return self

    def _touch_idle_modules(self, inputs_embeds: torch.Tensor, used: dict) -> torch.Tensor:
        """Puts tower and projector of an absent modality into the graph with weight zero, as far as
        they are trained.

        Under DistributedDataParallel and ZeRO every trained weight needs a gradient in every step,
        also on a rank whose batch holds no image or no audio.
        """
        for modality, modules in (
            ("image", (self.vision_tower, self.multi_modal_projector)),
            ("audio", (self.audio_tower, self.audio_projector)),
        ):
            if modality in used:
                continue
            weights = [p for module in modules if module is not None for p in module.parameters()]
            trained = [p.sum() for p in weights if p.requires_grad]
            if trained:
                inputs_embeds = inputs_embeds + sum(trained).to(inputs_embeds.dtype) * 0
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
        modality_mask: torch.BoolTensor | None = None,
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
        conversations = find_conversations(attention_mask, position_ids, past_key_values)
        if self.config.modality_adapters:
            self.choose_adapters(
                modality_mask, input_ids, inputs_embeds, past_key_values, conversations
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        inputs_embeds = self.merge_media(input_ids, inputs_embeds, encoded)
        if self.training:
            inputs_embeds = self._touch_idle_modules(inputs_embeds, encoded)
        kwargs["attention_mask"] = attention_mask
        if conversations is not None:
            attention = self.language_model.config._attn_implementation
            every_row = conversations.expand(len(inputs_embeds), -1)
            kwargs |= packed_arguments(every_row, attention)
        outputs = self.language_model(
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


class PhiMMForConditionalGeneration(
    ModalityAdaptersMixin, PhiMMPreTrainedModel, PhiMMGenerationMixin
):
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

    def get_transcript_features(self, *args, **kwargs) -> list[torch.Tensor]:
        """See [`PhiMMModel.get_transcript_features`]."""
        return self.model.get_transcript_features(*args, **kwargs)

    def transcribe(self, input_features: torch.Tensor, **generate_kwargs) -> torch.LongTensor:
        """See [`PhiMMModel.transcribe`]."""
        return self.model.transcribe(input_features, **generate_kwargs)

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
        modality_mask: torch.BoolTensor | None = None,
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
            position_ids: (B, L). Where they start anew in a row, without `attention_mask` and
                cache, a conversation begins that attends to none before it.
            labels: (B, L), -100 where nothing is supervised. The vocabulary head then runs on the
                supervised positions only, and `logits` holds those, (supervised positions, V).
            logits_to_keep: as in transformers' models; ignored when labels are given.
            mm_encoder_outputs: projected media, as `generate` hands them to the prefill.
            modality_mask: (B, 2), which rows hold a picture and which a recording, for a model with
                adapters by modality ((B, L, 2) where rows hold several conversations); found in the
                placeholders when absent, and needed with a filled cache, where they are no longer
                in sight. `generate` passes it.

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
            modality_mask=modality_mask,
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


__all__ = ["PhiMMForConditionalGeneration", "PhiMMModel", "PhiMMPreTrainedModel"]
