"""One training step on tensors without values: what it keeps in memory and what it computes.

The step is the model's own forward and backward pass under torch's FakeTensorMode: shapes, dtypes
and lifetimes are real, values are not, and no memory is used.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from modeling_phi_mm import PhiMMConfig
from phi_mm.estimate.skeleton import build_skeleton
from phi_mm.recipes import Recipe

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
aten = torch.ops.aten
# The counter knows the fused attention of GPUs; that of CPUs takes the same tensors.
FLOPS = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class Row:
    """What one row of a batch holds.

    Args:
        length: tokens, placeholders of media among them.
        supervised: tokens with a label.
        images: pictures.
        windows: windows of the audio tower (30 s of Whisper).
        sound: tokens of each window; those of silence after the sound are none.
    """

    length: int
    supervised: int
    images: int
    windows: int
    sound: int


@dataclass(frozen=True)
class Step:
    """What a step needs beside weights and optimiser states.

    Args:
        activations: bytes at the fullest moment, all but the two kinds below.
        logits: bytes of vocabulary width at that moment, their gradients among them.
        gradients: bytes of the gradients that are there at that moment.
        largest_logits: bytes of vocabulary width when there are most, at whatever moment.
        flops: floating point operations of forward and backward pass.
    """

    activations: int
    logits: int
    gradients: int
    largest_logits: int
    flops: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.activations + self.logits + self.gradients


def make_batch(
    config: PhiMMConfig, row: Row, size: int, cached: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """`size` such rows as the collator gives them; tower outputs of dtype `cached`, or pixels and
    mel windows, which sound to their ends.
    """
    ids = torch.zeros(size, row.length, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    if images := row.images * size:
        vision = config.vision_config
        if cached is None:
            side = vision.image_size
            batch["pixel_values"] = torch.zeros(images, 3, side, side)
        else:
            shape = (images, config.image_grid**2, vision.hidden_size)
            batch["image_embeds"] = torch.zeros(shape, dtype=cached)
    if windows := row.windows * size:
        audio = config.audio_config
        frames = audio.max_source_positions
        if cached is None:
            batch["input_features"] = torch.zeros(windows, audio.num_mel_bins, 2 * frames)
        else:
            batch["audio_embeds"] = torch.zeros(windows, frames, audio.d_model, dtype=cached)
            batch["audio_embeds_mask"] = torch.ones(windows, frames, dtype=torch.long)
    return batch


class Stage:
    """A recipe's model with so many layers, and steps of it on tensors without values."""

    def __init__(self, recipe: Recipe, config: PhiMMConfig, layers: int, checkpointing: bool):
        self.recipe, self.config = recipe, config
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._model = build_skeleton(recipe, config, layers).train()
        _replace_tensors(self._model, self._fake)
        if checkpointing:
            self._model.activation_checkpointing_enable()

    def take(self, size: int, row: Row) -> Step:
        """Forward and backward of one batch of `size` such rows."""
        training = self.recipe.training
        half = next((HALVES[key] for key in HALVES if training.get(key)), None)
        cached = self.recipe.dtype if self.recipe.features == "cached" else None
        with self._fake:
            if training.get("gradient_accumulation_steps", 1) > 1:  # those of earlier batches
                for parameter in self._model.parameters():
                    parameter.grad = (
                        torch.empty_like(parameter) if parameter.requires_grad else None
                    )
            else:
                self._model.zero_grad()
            batch = make_batch(self.config, row, size, cached)
            with Selections(known_selections(self.config, row, size)):
                return measure(self._model, self.config, batch, half)


def measure(
    model: nn.Module,
    config: PhiMMConfig,
    batch: dict[str, torch.Tensor],
    half: torch.dtype | None,
) -> Step:
    """What forward and backward of a batch keep and compute, with or without values.

    Args:
        half: dtype of mixed precision; None for none.
    """
    meter = Meter(model, config.text_config.vocab_size)
    learning = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(meter.note_gradient) for p in learning]
    for parameter in learning:
        if parameter.grad is not None:
            meter.note_gradient(parameter)
    with meter:
        with torch.autocast("cpu", half, enabled=half is not None):
            loss = model(**batch).loss
        loss.backward()
    for hook in hooks:
        hook.remove()
    return Step(**meter.peak, largest_logits=meter.largest_logits, flops=meter.flops)


def known_selections(config: PhiMMConfig, row: Row, size: int) -> dict[tuple[int, ...], int]:
    """How many places the masks of a batch select, by the masks' shapes."""
    selected = {(size, row.length): size * row.supervised}
    if row.windows:
        stacks = -(-config.audio_config.max_source_positions // config.audio_stack)
        selected[(size * row.windows, stacks)] = size * row.windows * row.sound
    return selected


def _replace_tensors(model: nn.Module, mode: FakeTensorMode) -> None:
    """Gives a model on the meta device the tensors of `mode`, which compute as a CPU's would."""
    made: dict[int, torch.Tensor] = {}  # tied weights stay one

    def replace(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            with mode:
                fake = torch.empty_like(tensor, device="cpu")
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            made[id(tensor)] = fake
        return made[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                held[name] = None if tensor is None else replace(tensor)


class Selections(TorchDispatchMode):
    """Answers what depends on values: a mask of a known shape selects a known number of places,
    and what the model checks holds.
    """

    def __init__(self, selected: dict[tuple[int, ...], int]):
        super().__init__()
        self.selected = selected

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is aten._local_scalar_dense.default:
            return True
        if func is aten.masked_scatter_backward.default:
            return args[0].new_empty(args[2])
        if func is aten.index.Tensor and args[1][0].dtype == torch.bool:
            source, (mask,) = args[0], args[1]
            count = self.selected[tuple(mask.shape)]
            return source.new_empty(count, *source.shape[mask.dim() :])
        return func(*args, **kwargs or {})


class Meter(TorchDispatchMode):
    """Follows every storage from its making to its end, and counts multiplications.

    Args:
        model: its weights and buffers are not counted.
        vocabulary: last dimension by which logits are known.
    """

    def __init__(self, model: nn.Module, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.flops = self.largest_logits = 0
        self.live: Counter[str] = Counter(activations=0, logits=0, gradients=0)
        self.peak = self.live.copy()
        self._entries = WeakIdKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self._entries[tensor.untyped_storage()] = None

    def note_gradient(self, parameter: nn.Parameter) -> None:
        """From now on the storage of this gradient counts as one."""
        self._follow(parameter.grad)
        entry = self._entries[parameter.grad.untyped_storage()]
        self.live[entry["kind"]] -= entry["bytes"]
        entry["kind"] = "gradients"
        self.live["gradients"] += entry["bytes"]

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf)
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        self.largest_logits = max(self.largest_logits, self.live["logits"])
        return out

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._entries:
            return
        wide = tensor.dim() > 0 and tensor.shape[-1] == self.vocabulary
        entry = {"kind": "logits" if wide else "activations", "bytes": storage.nbytes()}
        self._entries[storage] = entry
        self.live[entry["kind"]] += entry["bytes"]
        weakref.finalize(storage, self._forget, entry)

    def _forget(self, entry: dict[str, Any]) -> None:
        self.live[entry["kind"]] -= entry["bytes"]
