"""Linear layers in int8 for CPUs: weights by output channel, activations by token.

The kernels are torch's own (fbgemm, oneDNN). `torch.ao.quantization.quantize_dynamic` uses them
too, but with one scale for all tokens of a call: what a token becomes then depends on which others
are computed beside it, and a conversation continued from its cache would not answer as one computed
anew. Here every token has its own scale.

Shapes: T tokens, K inputs, N outputs.
"""

import warnings

import torch
from torch import nn
from transformers.activations import NewGELUActivation
from transformers.models.phi.modeling_phi import PhiDecoderLayer

# 7 bits: on CPUs without VNNI the kernels add two products in 16 bits, which 8 bits overflow.
STEPS, ZERO_POINT = 63, 64


class Int8Linear(nn.Module):
    """Stands in for `nn.Linear` of a model that is not trained any more; several that read the same
    states are one product.

    Args:
        linears: the layers whose weights (N, K) are rounded, with biases all or none; they are left
            as they are.
    """

    def __init__(self, *linears: nn.Linear):
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        weight = torch.cat([linear.weight.detach().float() for linear in linears])
        scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        with warnings.catch_warnings():
            # torch announces another API for quantised tensors; its linear kernels take this one.
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_channel(
                weight, scale.double(), torch.zeros_like(scale, dtype=torch.long), 0, torch.qint8
            )
        self.packed = torch.ops.quantized.linear_prepack(rounded, None)
        self.bias = None
        if linears[0].bias is not None:  # copied: it may lie in the file that was read
            self.bias = torch.cat([linear.bias.detach().float() for linear in linears])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., N), float32."""
        rows = states.reshape(-1, self.in_features)
        size = rows.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows / size, 1 / STEPS, ZERO_POINT, self.packed
        )
        product = product.mul_(size)
        if self.bias is not None:
            product += self.bias
        return product.view(*states.shape[:-1], self.out_features)


class Int8Together(Int8Linear):
    """Several linear layers that are given the same states one after the other: the first that is
    asked computes for all, and what it computed is let go of with the last.

    Args:
        linears: as for `Int8Linear`.
    """

    def __init__(self, *linears: nn.Linear):
        super().__init__(*linears)
        self.readers = len(linears)
        self.states = self.product = None
        self.asked = 0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., N) of all layers, float32."""
        if states is not self.states:
            self.states, self.product, self.asked = states, super().forward(states), 0
        product = self.product
        self.asked += 1
        if self.asked == self.readers:
            self.states = self.product = None
        return product


class Part(nn.Module):
    """Stands in for one layer of an `Int8Together`, with the outputs from `start` to `end`."""

    def __init__(self, together: Int8Together, start: int, end: int):
        super().__init__()
        self.together, self.start, self.end = together, start, end

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(..., K) to (..., end - start), float32."""
        return self.together(states)[..., self.start : self.end]


def quantize_linears(root: nn.Module) -> None:
    """Puts `Int8Linear` in the place of every linear layer below `root`, one after the other, so
    that both forms of the model are never in memory at once. LoRA's own small layers stay. Phi's
    activation becomes torch's, which is the same function in one pass over the states, not eight.
    """
    if isinstance(root, PhiDecoderLayer):
        _join_readers(root)
    for name, child in root.named_children():
        if type(child) is nn.Linear:
            setattr(root, name, Int8Linear(child))
        elif type(child) is NewGELUActivation:
            setattr(root, name, nn.GELU(approximate="tanh"))
        elif not name.startswith("lora_"):
            quantize_linears(child)


def _join_readers(layer: PhiDecoderLayer) -> None:
    """Makes one product of what reads the normed states of a layer, where Phi's attention and its
    MLP do so both; unless LoRA stands between.
    """
    readers = [
        (layer.self_attn, "q_proj"),
        (layer.self_attn, "k_proj"),
        (layer.self_attn, "v_proj"),
        (layer.mlp, "fc1"),
    ]
    linears = [getattr(module, name) for module, name in readers]
    if any(type(linear) is not nn.Linear for linear in linears):
        return
    together, start = Int8Together(*linears), 0
    for (module, name), linear in zip(readers, linears, strict=True):
        setattr(module, name, Part(together, start, start + linear.out_features))
        start += linear.out_features
