"""From an artefact to a model that answers, in the precision that was chosen."""

import torch
from transformers import (
    AutoModel,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from .int8 import Int8Linear, quantize_linears


def load(
    artefact: str, revision: str | None, precision: str
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model, in eval mode and on its device, and processor.

    Args:
        artefact, revision: folder or Hub id, and the commit of the latter.
        precision: one of `precision.ON_GPU` or `precision.ON_CPU`.
    """
    where = {"revision": revision, "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(artefact, **where)
    if precision == "fp32":
        model = AutoModel.from_pretrained(artefact, dtype=torch.float32, **where)
    elif precision == "int8":
        model = _to_int8(AutoModel.from_pretrained(artefact, dtype="auto", **where))
    elif precision == "bf16":
        model = AutoModel.from_pretrained(artefact, dtype=torch.bfloat16, **where).to("cuda")
    else:
        model = _load_nf4(artefact, where)
    return model.eval(), processor


def _to_int8(model: PreTrainedModel) -> PreTrainedModel:
    """Layers and head to int8 one after the other, then all that is left to float32.

    It is copied, for the file that was read stays in memory as long as one tensor lies in it.
    """
    quantize_linears(model.model.language_model.layers)
    model.lm_head = Int8Linear(model.lm_head)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32, copy=True)
    return model


def _load_nf4(artefact: str, where: dict) -> PreTrainedModel:
    computes = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computes,
    )
    return AutoModel.from_pretrained(
        artefact, dtype=computes, quantization_config=four_bit, device_map={"": 0}, **where
    )
