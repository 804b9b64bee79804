"""The language models, with attention scores and rotary frequencies that are always float32.

Phi-2's queries and keys fit float16, their products do not: whatever multiplies them in float16
answers with NaN (https://github.com/huggingface/transformers/issues/28673). Here they are
multiplied in float32, in models of either family, also under autocast; weights and cache stay in
float16. In every other dtype the attention is that of transformers.

Phi-2's activation is spelt out as a formula in transformers, and every step of it is kept for the
backward pass. In training it is computed by one kernel here; the numbers are the same but for
rounding.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PhiConfig, PreTrainedConfig
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.models.phi.modeling_phi import PhiModel, eager_attention_forward
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3Model

from .packing_phi_mm import by_conversation

# The fused kernels that are left out here multiply in float32 by themselves.
GUARDED = {"eager": "phi_mm_eager", "sdpa": "phi_mm_sdpa"}


def computes_in_float16(tensor: torch.Tensor) -> bool:
    """Whether products with `tensor` are float16, by its own dtype or by autocast."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == torch.float16
    return tensor.dtype == torch.float16


def _scores_in_float32(attend: Callable) -> Callable:
    """`attend`, an attention function of transformers, in float32 where it would be in float16."""

    def guarded(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not computes_in_float16(query):
            return attend(module, query, key, value, attention_mask, **kwargs)
        with torch.autocast(query.device.type, enabled=False):
            output, weights = attend(
                module, query.float(), key.float(), value.float(), _widen(attention_mask), **kwargs
            )
        return output.to(value.dtype), weights

    return guarded


def _widen(mask: torch.Tensor | None) -> torch.Tensor | None:
    """An additive mask in float32.

    The -65504 that closes a position in float16 would not close it beside larger scores.
    """
    if mask is None or not mask.is_floating_point():
        return mask
    closed = mask <= torch.finfo(torch.float16).min
    return mask.float().masked_fill(closed, torch.finfo(torch.float32).min)


AttentionInterface.register(GUARDED["eager"], _scores_in_float32(eager_attention_forward))
AttentionInterface.register(
    GUARDED["sdpa"], _scores_in_float32(by_conversation(sdpa_attention_forward))
)
AttentionMaskInterface.register(GUARDED["eager"], eager_mask)
AttentionMaskInterface.register(GUARDED["sdpa"], sdpa_mask)


class _Precise:
    """A language model that keeps float32 where a smaller dtype would answer wrongly."""

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """`.to(dtype)` leaves the frequencies of the rotary embedding as they are.

        Rounded to bfloat16, they would turn far positions by another angle altogether.
        """
        before = dict(self.rotary_emb.named_buffers())
        super()._apply(fn, recurse)
        for name, frequencies in before.items():
            after = getattr(self.rotary_emb, name)
            if after.dtype != frequencies.dtype:
                setattr(self.rotary_emb, name, frequencies.to(after.device))
        return self

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """The guarded form of whichever attention is asked for, at loading and later."""
        chosen = super().get_correct_attn_implementation(requested_attention, is_init_check)
        return GUARDED.get(chosen, chosen)


class _OneKernelInTraining(NewGELUActivation):
    """`gelu_new`; spelt out, it keeps four tensors as wide as the MLP where one will do."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training:
            return nn.functional.gelu(input, approximate="tanh")
        return super().forward(input)


class PhiMMPhiModel(_Precise, PhiModel):
    """Phi-1, 1.5 and 2."""

    config: PhiConfig

    def __init__(self, config: PhiConfig):
        super().__init__(config)
        if config.hidden_act == "gelu_new":
            for layer in self.layers:
                layer.mlp.activation_fn = _OneKernelInTraining()


class PhiMMPhi3Model(_Precise, Phi3Model):
    """Phi-3, 3.5 and 4-mini."""

    config: Phi3Config


def build_language_model(config: PreTrainedConfig) -> PhiModel | Phi3Model:
    """The language model of a text config of type `phi` or `phi3`."""
    model_class = {"phi": PhiMMPhiModel, "phi3": PhiMMPhi3Model}[config.model_type]
    return model_class._from_config(config)


__all__ = ["PhiMMPhi3Model", "PhiMMPhiModel", "build_language_model", "computes_in_float16"]
