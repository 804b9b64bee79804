"""Configuration of a phi-mm model: the architecture, and nothing about how it is trained."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


@strict
class PhiMMConfig(PreTrainedConfig):
    r"""
    Architecture of a [`PhiMMForConditionalGeneration`].

    Args:
        text_config: config of the language model, of model type `phi` or `phi3`.
        vision_config: config of the CLIP vision tower as its checkpoint has it; `None` for a model
            without images.
        audio_config: config of the Whisper model as its checkpoint has it; `None` for a model
            without audio.
        image_token_id, audio_token_id: ids of the placeholder tokens, one of which stands in the
            prompt for every projected image or audio token.
        vision_feature_layer: which hidden state of the vision tower is projected, counted from the
            end as in LLaVA (-1 is the last layer's output). Layers past it are not built.
        image_pool: side of the square of neighbouring patches that is merged before the projector.
        image_tokens_per_cell: tokens that each merged cell becomes.
        projector_norm: layer normalisation of the vision features before the projector.
        projector_positions: a learned position for each merged cell inside the projector.
        projector_hidden_size: width of the projectors' hidden layer; `None` for the language
            model's own width.
        projector_hidden_act: activation between the two linear layers of a projector.
        audio_stack: encoder frames (20 ms each) stacked into one audio token; 1 on the routes
            that project transcript tokens, whatever is given.
        audio_route: what a recording becomes: `encoder` projects Whisper's encoder frames;
            `transcript` puts Whisper's transcript into the prompt as ordinary text, and needs no
            training; `transcript_embeddings` projects the transcript's tokens as Whisper's decoder
            embeds them; `decoder` projects the last hidden states of Whisper's decoder at those
            tokens.
        audio_padded: whether the audio tower hears a recording padded to Whisper's window, as every
            stock Whisper was trained; false, on the route `encoder` alone, for a tower that is
            trained on the sound by itself: a recording then costs as much as it is long.
        transcript_generation_config: Whisper's generation settings, for the routes with a
            transcript.
        modality_adapters: the modalities (`image`, `audio`) that have a LoRA of their own, saved in
            `adapters/<modality>`; rows of text alone use none. `None` for a model without them.

    Raises:
        StrictDataclassClassValidationError: where the parts do not fit together; the message names
            both.

    Example:

    ```python
    >>> from modeling_phi_mm import PhiMMConfig, PhiMMForConditionalGeneration
    >>> config = PhiMMConfig(text_config={"model_type": "phi"}, vision_config={},
        image_token_id=50295)
    >>> config.num_image_tokens
    49
    ```
    """

    model_type = "phi_mm"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="phi"),
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="clip_vision_model", optional=True
        ),
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper", optional=True),
    }
    keys_to_ignore_at_inference = ["past_key_values", "image_hidden_states", "audio_hidden_states"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    vision_feature_layer: int = -2
    image_pool: int = 1
    image_tokens_per_cell: int = 1
    projector_norm: bool = False
    projector_positions: bool = False
    projector_hidden_size: int | None = None
    projector_hidden_act: str = "gelu"
    audio_stack: int = 4
    audio_route: Literal["encoder", "transcript", "transcript_embeddings", "decoder"] = "encoder"
    audio_padded: bool = True
    transcript_generation_config: dict | None = None
    modality_adapters: list[Literal["image", "audio"]] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # Tying is read from the top level; Phi-4-mini states it in its own (text) config.
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        if self.audio_route in ("transcript_embeddings", "decoder"):
            self.audio_stack = 1  # one token of the transcript is one audio token

    def validate_architecture(self):
        """Checks that the parts fit together. Called on construction by the strict dataclass."""
        super().validate_architecture()
        if self.text_config.model_type not in ("phi", "phi3"):
            raise ValueError(
                f"got a language model of type {self.text_config.model_type!r}, expected 'phi' or "
                "'phi3': "
                "use a Phi-1, 1.5, 2, 3, 3.5 or 4-mini checkpoint"
            )
        if self.vision_config is not None:
            self._validate_vision()
        if self.audio_config is not None:
            if self.audio_token_id is None:
                raise ValueError(
                    "got an audio_config without audio_token_id: give the placeholder's id"
                )
            if self.audio_stack < 1:
                raise ValueError(f"got audio_stack={self.audio_stack}, expected 1 or more")
        if not self.audio_padded and self.audio_route != "encoder":
            raise ValueError(
                f"got audio_padded=False with audio_route={self.audio_route!r}, expected the route "
                "'encoder': Whisper writes down nothing but windows of its full length"
            )

    def _validate_vision(self):
        if self.image_token_id is None:
            raise ValueError(
                "got a vision_config without image_token_id: give the placeholder's id"
            )
        if self.image_pool < 1 or self.image_grid % self.image_pool:
            raise ValueError(
                f"got image_pool={self.image_pool}, expected a divisor of the vision tower's grid "
                "of "
                f"{self.image_grid}x{self.image_grid} patches"
            )
        if self.image_tokens_per_cell < 1:
            raise ValueError(
                f"got image_tokens_per_cell={self.image_tokens_per_cell}, expected 1 or more"
            )
        layers = self.vision_config.num_hidden_layers
        if not -layers <= self.vision_feature_layer <= -1:
            raise ValueError(
                f"got vision_feature_layer={self.vision_feature_layer}, expected -{layers} to -1 "
                "for a vision "
                f"tower of {layers} layers"
            )

    @property
    def image_grid(self) -> int:
        """Patches along one side of a picture."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Placeholder tokens of one picture."""
        return (self.image_grid // self.image_pool) ** 2 * self.image_tokens_per_cell

    @property
    def num_vision_layers(self) -> int:
        """Layers of the vision tower that are run: those up to `vision_feature_layer`."""
        return self.vision_config.num_hidden_layers + 1 + self.vision_feature_layer


__all__ = ["PhiMMConfig"]
