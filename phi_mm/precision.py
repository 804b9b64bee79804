"""How a run computes where nobody has said how: chosen by the hardware, and printed."""

import torch
from transformers import AutoConfig
from transformers.utils import is_flash_attn_2_available

OVERFLOWS = ("phi",)  # language models whose activations do not fit into float16


def automatic_dtype(text: str, on_cpu: bool) -> str:
    """bfloat16 on a GPU that has it, float16 on others where the language model bears it, float32
    elsewhere.

    Args:
        text: folder or Hub id of the language model.
        on_cpu: the run stays on the CPU, whatever the machine has.
    """
    if on_cpu or not torch.cuda.is_available():
        return "float32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32" if AutoConfig.from_pretrained(text).model_type in OVERFLOWS else "float16"


def automatic_attention(computes: str, on_cpu: bool) -> str:
    """`flash_attention_2` where it is installed and can run, else `sdpa`.

    Args:
        computes: the dtype of activations. In float16 the language model has attention of its own.
        on_cpu: as in [`automatic_dtype`].
    """
    usable = not on_cpu and computes == "bfloat16" and is_flash_attn_2_available()
    return "flash_attention_2" if usable else "sdpa"
