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

# 7 bits: on CPUs without VNNI the kernels add two products in 16 bits, which 8 bits overflow.
STEPS, ZERO_POINT = 63, 64


class Int8Linear(nn.Module):
    """Stands in for an `nn.Linear` of a model that is not trained any more.

    Args:
        linear: the layer whose weight (N, K) is rounded; it is left as it is.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        with warnings.catch_warnings():
            # torch announces another API for quantised tensors; its linear kernels take this one.
            warnings.simplefilter("ignore")
            rounded = torch.quantize_per_channel(
                weight, scale.double(), torch.zeros_like(scale, dtype=torch.long), 0, torch.qint8
            )
        self.packed = torch.ops.quantized.linear_prepack(rounded, None)
        self.bias = None
        if linear.bias is not None:  # copied: it may lie in the file that was read
            self.bias = linear.bias.detach().to(torch.float32, copy=True)

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


def quantize_linears(root: nn.Module) -> None:
    """Puts `Int8Linear` in the place of every linear layer below `root`, one after the other, so
    that both forms of the model are never in memory at once. LoRA's own small layers stay. Phi's
    activation becomes torch's, which is the same function in one pass over the states, not eight.
    """
    for name, child in root.named_children():
        if type(child) is nn.Linear:
            setattr(root, name, Int8Linear(child))
        elif type(child) is NewGELUActivation:
            setattr(root, name, nn.GELU(approximate="tanh"))
        elif not name.startswith("lora_"):
            quantize_linears(child)
