"""`generate` for a model with media: what would lose them, or fail half-way, is refused at once."""

from collections.abc import Iterator

import torch
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .media_phi_mm import MEDIA_INPUTS


class PhiMMGenerationMixin(GenerationMixin):
    """transformers' generation, with the checks that need to know of images and audio."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        **kwargs,
    ):
        """As in transformers.

        Raises:
            ValueError: for token healing, early exit, continuous batching, a phi-mm as assistant,
                a negative prompt with placeholders, `inputs_embeds` in chunks, media that a cache
                holds already, or a cache offloaded from the CPU to the CPU.
        """
        settings = (generation_config or self.generation_config).to_dict() | {
            name: value for name, value in kwargs.items() if value is not None
        }
        for refusal in self._refusals(settings):
            raise ValueError(refusal)
        return super().generate(inputs, generation_config, *args, **kwargs)

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs):
        """As in transformers: continuous batching, of text alone.

        Raises:
            ValueError: when a prompt holds a placeholder.
        """
        for ids in inputs:
            if self._holds_placeholders(torch.as_tensor(ids)):
                raise ValueError(
                    "got a prompt with image or audio placeholders, expected text: continuous "
                    "batching carries no media; call generate"
                )
        return super().generate_batch(inputs, *args, **kwargs)

    def _refusals(self, settings: dict) -> Iterator[str]:
        """Why these arguments of `generate` are refused, where they are."""
        if settings.get("token_healing"):
            yield (
                "got token_healing, expected a prompt that is taken as it is: healing writes it "
                "anew from its text, without placeholders and turns; leave it out"
            )
        if settings.get("assistant_early_exit") is not None:
            yield (
                "got assistant_early_exit, expected an assistant_model or prompt_lookup_num_tokens:"
                " no Phi was trained to answer from an early layer"
            )
        assistant = settings.get("assistant_model")
        if assistant is not None and assistant.config.model_type == self.config.model_type:
            yield (
                "got a phi-mm as assistant_model, expected a text-only Phi: an assistant is not "
                "given the media"
            )
        if assistant is not None and self.config.modality_adapters:
            yield (
                "got an assistant_model and adapters by modality, expected one of them: an "
                "assistant cannot be told which rows hold what; prompt_lookup_num_tokens can be "
                "used"
            )
        negative = settings.get("negative_prompt_ids")
        if negative is not None and self._holds_placeholders(negative):
            yield (
                "got negative_prompt_ids with image or audio placeholders, expected text: only "
                "the prompt itself is given the media"
            )
        if settings.get("prefill_chunk_size") and settings.get("inputs_embeds") is not None:
            yield (
                "got inputs_embeds and prefill_chunk_size, expected one of them: only input_ids "
                "can be cut into chunks"
            )
        yield from self._cache_refusals(settings)

    def _cache_refusals(self, settings: dict) -> Iterator[str]:
        if self._is_given_again(**settings):
            yield (
                "got media with a prompt of which past_key_values hold all placeholders, expected "
                "no media but those of the new turn: leave out what the cache has seen"
            )
        cache_implementation = str(settings.get("cache_implementation"))
        if cache_implementation == "paged":
            yield (
                "got cache_implementation='paged', expected 'dynamic' or 'static': continuous "
                "batching carries no media; for text alone call generate_batch"
            )
        if cache_implementation.startswith("offloaded") and self.device.type == "cpu":
            yield (
                f"got cache_implementation={cache_implementation!r} with the model on the CPU, "
                "expected 'dynamic' or 'static': the CPU is where a cache is offloaded to"
            )

    def _is_given_again(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **settings,
    ) -> bool:
        """Whether there are media, and a cache that ends behind the last placeholder."""
        media = any(
            settings.get(name) is not None for name in (*MEDIA_INPUTS, "mm_encoder_outputs")
        )
        if not media or input_ids is None or past_key_values is None:
            return False
        seen = int(past_key_values.get_seq_length())
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            seen = 0  # these are the ids of the new turn alone
        return seen > 0 and not self._holds_placeholders(input_ids[:, seen:])

    def _holds_placeholders(self, ids: torch.Tensor) -> bool:
        placeholders = (self.config.image_token_id, self.config.audio_token_id)
        return any((ids == token).any().item() for token in placeholders if token is not None)

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs
    ):
        """Notes before the first step which rows hold what: later steps see new tokens only."""
        if self.config.modality_adapters and model_kwargs.get("modality_mask") is None:
            model_kwargs["modality_mask"] = self.model.find_modalities(
                input_ids if model_kwargs.get("inputs_embeds") is None else None,
                model_kwargs.get("inputs_embeds"),
            )
        return super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
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
            placeholders = self.model.find_placeholders(input_ids, inputs_embeds, token_id)
            counts = placeholders.sum(-1).tolist()
            flat = torch.cat(list(features)) if modality == "image" else features
            groups = torch.split(flat, counts)
            expanded[modality] = BaseModelOutputWithPooling(
                pooler_output=torch.cat([group for group in groups for _ in range(expand_size)])
            )
        return expanded


__all__ = ["PhiMMGenerationMixin"]
