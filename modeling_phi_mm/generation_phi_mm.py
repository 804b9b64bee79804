"""`generate` for a model with media: what would lose them, or fail half-way, is refused at once."""

from collections.abc import Iterator

import torch
from transformers import Cache, GenerationConfig, GenerationMixin

MEDIA = ("pixel_values", "image_embeds", "input_features", "audio_embeds", "mm_encoder_outputs")


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
        media = any(settings.get(name) is not None for name in MEDIA)
        if not media or input_ids is None or past_key_values is None:
            return False
        seen = int(past_key_values.get_seq_length())
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            seen = 0  # these are the ids of the new turn alone
        return seen > 0 and not self._holds_placeholders(input_ids[:, seen:])

    def _holds_placeholders(self, ids: torch.Tensor) -> bool:
        placeholders = (self.config.image_token_id, self.config.audio_token_id)
        return any((ids == token).any().item() for token in placeholders if token is not None)


__all__ = ["PhiMMGenerationMixin"]
