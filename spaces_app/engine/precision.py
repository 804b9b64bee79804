"""In which numbers the model computes, and whether it fits: both before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .int8 import Int8Linear

ON_GPU = ("bf16", "nf4")
ON_CPU = ("int8", "fp32")
AUTO = "auto"
# Bytes of one weight of a linear layer of the language model, and of any other weight. The scales
# of int8 are 16 bytes an output channel, those of nf4 one byte for 64 weights with a few over. On
# GPUs that do not compute in bf16 all else is float32 beside nf4.
LINEAR_BYTES = {"bf16": 2.0, "nf4": 0.52, "int8": 1.01, "fp32": 4.0}
OTHER_BYTES = {"bf16": 2, "nf4": 4, "int8": 4, "fp32": 4}
WORKING_BYTES = 800 << 20  # activations of a prefill and what the libraries take while they work
GIGABYTE = 1e9
FEW_WEIGHTS = 4_000_000  # of linear layers: rounding what they are given takes longer than they do


@dataclass(frozen=True)
class Memory:
    """Bytes that a precision needs: at the most while loading, and afterwards."""

    loading: int
    serving: int

    @property
    def peak(self) -> int:
        return max(self.loading, self.serving)


@dataclass(frozen=True)
class Choice:
    """A precision, why it is that one, and what it is predicted to need."""

    precision: str
    why: str
    memory: Memory

    def __str__(self) -> str:
        return (
            f"{self.precision}: {self.why}; predicted {self.memory.loading / GIGABYTE:.2f} GB "
            f"while loading, {self.memory.serving / GIGABYTE:.2f} GB afterwards"
        )


def choose(
    artefact: str, revision: str | None, wanted: str, stores: int, free: int | None = None
) -> Choice:
    """The precision for this machine.

    Args:
        artefact, revision: folder or Hub id, and the commit of the latter.
        wanted: a precision, or "auto".
        stores: bytes that caches may take besides.
        free: bytes of memory there are; measured when absent.

    Raises:
        ValueError: it does not fit, or this machine cannot compute in it; says what would do.
    """
    gpu = torch.cuda.is_available()
    possible = ON_GPU if gpu else ON_CPU
    if wanted not in (AUTO, *possible):
        device = "a GPU" if gpu else "no GPU"
        raise ValueError(
            f"got the precision {wanted!r} on a machine with {device}, expected {AUTO} or one of "
            f"{', '.join(possible)}"
        )
    free = free_memory(gpu) if free is None else free
    model = _without_weights(artefact, revision)
    needs = {name: _predict(model, name, stores) for name in possible}
    if wanted == AUTO:
        wanted, why = _prefer_on_gpu(needs["bf16"].peak <= free) if gpu else _prefer_on_cpu(model)
    else:
        why = "as set"
    choice = Choice(wanted, why, needs[wanted])
    if choice.memory.peak > free:
        fitting = [name for name, memory in needs.items() if memory.peak <= free]
        if fitting:
            remedy = f"set PHI_MM_PRECISION={fitting[0]}"
        elif max(choice.memory.loading, choice.memory.serving - stores) <= free:
            remedy = "lower PHI_MM_PREFIX_MB or PHI_MM_MEDIA_MB"
        else:
            remedy = "take a larger machine"
        raise ValueError(
            f"got {free / GIGABYTE:.2f} GB of free memory, expected at least "
            f"{choice.memory.peak / GIGABYTE:.2f} GB for this model in {choice.precision}: "
            f"{remedy}, or serve a smaller model"
        )
    return choice


def _prefer_on_gpu(has_room: bool) -> tuple[str, str]:
    """The precision, and why."""
    if torch.cuda.get_device_capability() < (8, 0):
        return "nf4", "this GPU does not compute in bf16"
    if has_room:
        return "bf16", "the GPU has room for it"
    return "nf4", "the GPU has no room for bf16"


def _prefer_on_cpu(model: PreTrainedModel) -> tuple[str, str]:
    """The precision, and why."""
    if not int8_works():
        return "fp32", "this CPU has no int8 kernels"
    if sum(_linear_weights(model, "int8")) < FEW_WEIGHTS:
        return "fp32", "so small a model is quicker in it than in int8"
    return "int8", "the quickest on a CPU"


def int8_works() -> bool:
    """Whether torch has its int8 kernels for this CPU."""
    try:
        Int8Linear(nn.Linear(4, 4))(torch.ones(1, 4))
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


def _without_weights(artefact: str, revision: str | None) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(artefact, revision=revision, trust_remote_code=True)
    code = get_class_from_dynamic_module(config.auto_map["AutoModel"], artefact, revision=revision)
    with torch.device("meta"):
        return code(config)


def _predict(model: PreTrainedModel, precision: str, stores: int) -> Memory:
    every = sum(parameter.numel() for parameter in model.parameters())
    linear = _linear_weights(model, precision)
    others = every - sum(linear)
    if precision == "int8" and model.config.tie_word_embeddings:
        others += model.lm_head.weight.numel()  # the embeddings stay when the head is rounded
    serving = sum(linear) * LINEAR_BYTES[precision] + others * OTHER_BYTES[precision]
    loading = serving
    if precision == "int8":  # all of it as it was saved, and one layer in every form
        saved = torch.finfo(model.config.dtype or torch.float32).bits // 8
        loading = every * saved + max(linear) * (4 + 4 + 1)
    return Memory(round(loading) + WORKING_BYTES, round(serving) + WORKING_BYTES + stores)


def _linear_weights(model: PreTrainedModel, precision: str) -> list[int]:
    """How many weights each linear layer has that the precision keeps in 4 or 8 bits: the language
    model's layers, and in int8 the head; towers, projectors and embeddings do not.
    """
    layers = model.model.language_model.layers
    parts = [layers, model.lm_head] if precision == "int8" else [layers]
    return [
        module.weight.numel()
        for part in parts
        for module in part.modules()
        if isinstance(module, nn.Linear)
    ]


def free_memory(gpu: bool) -> int:
    """Bytes that this process may still take: of the GPU, or of the machine and the container."""
    if gpu:
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        if Path(limit).is_file() and (given := Path(limit).read_text().strip()) != "max":
            free = min(free, int(given) - int(Path(used).read_text()) + _file_cache(Path(limit)))
    return free


def _file_cache(limit: Path) -> int:
    """Bytes of a container that are files read before, which it lets go of when it needs room."""
    lines = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
    return int(lines["inactive_file"])
