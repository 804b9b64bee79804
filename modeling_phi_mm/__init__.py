"""The phi-mm model: a Phi language model with a CLIP vision tower and a Whisper audio tower.

Importing the package registers it with the Auto classes, so no `trust_remote_code` is needed where
it is installed.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from .configuration_phi_mm import PhiMMConfig
from .modeling_phi_mm import PhiMMForConditionalGeneration, PhiMMModel, PhiMMPreTrainedModel

AutoConfig.register("phi_mm", PhiMMConfig)
for _auto_class in (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
):
    _auto_class.register(PhiMMConfig, PhiMMForConditionalGeneration)

__all__ = ["PhiMMConfig", "PhiMMForConditionalGeneration", "PhiMMModel", "PhiMMPreTrainedModel"]
