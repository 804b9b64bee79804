"""The models of `train_step.py`: LLaVA of transformers and phi-mm with the same weights, in Phi-2's
proportions, and what share of the work each part has.
"""

import zlib
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from modeling_phi_mm import PhiMMConfig, PhiMMForConditionalGeneration
from phi_mm.assembly import LORA_TARGETS

PATCH = 14  # pixels
IMAGE_TOKEN = 1  # as in `word_processor`


@dataclass(frozen=True)
class Size:
    """Shapes of the language model, the vision tower, and LoRA."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    side: int  # of a picture, in pixels
    rank: int

    @property
    def patches(self) -> int:
        return (self.side // PATCH) ** 2


# "small" keeps what decides time and memory: all 32 and 24 layers, the head's share of the weights
# (V / (12 L D)), and the tower's share of the work. Only the widths shrink.
SIZES = {
    "phi-2": Size(2560, 32, 32, 51200, 1024, 24, 16, 336, 128),
    "small": Size(160, 32, 2, 3200, 56, 24, 1, 336, 8),
    "toy": Size(32, 4, 2, 128, 16, 3, 1, 84, 4),
}


@dataclass(frozen=True)
class Way:
    """One way to train: LLaVA with some of our differences, or phi-mm with all of the model's.

    Attributes:
        ours: phi-mm.
        head: the vocabulary head runs on supervised positions only.
        layers: layers of the tower past the selected one are left out.
        no_grad: the frozen tower runs without a graph, also under activation checkpointing.
        cached: tower outputs come with the batch.
        alike: rows of like length are batched together.
        packed: the rows of a batch share one, without padding.
        pool: `image_pool`; any but 1 is another model.
    """

    name: str
    ours: bool = False
    head: bool = False
    layers: bool = False
    no_grad: bool = False
    cached: bool = False
    alike: bool = False
    packed: bool = False
    pool: int = 1


class SupervisedHead(LlavaForConditionalGeneration):
    """LLaVA whose head runs on supervised positions only."""

    def forward(
        self, labels: torch.LongTensor, num_items_in_batch: int, **inputs: torch.Tensor
    ) -> CausalLMOutputWithPast:
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        supervised = targets != -100
        logits = self.lm_head(self.model(**inputs).last_hidden_state[supervised])
        loss = self.loss_function(
            logits=logits,
            labels=None,
            shift_labels=targets[supervised],
            vocab_size=self.config.text_config.vocab_size,
            num_items_in_batch=num_items_in_batch,
        )
        return CausalLMOutputWithPast(loss=loss)


def text_config(size: Size) -> PhiConfig:
    return PhiConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        partial_rotary_factor=0.4,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,  # as the Trainer has it
    )


def vision_config(size: Size, layers: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=layers,
        num_attention_heads=size.vision_heads,
        image_size=size.side,
        patch_size=PATCH,
    )


def build(
    way: Way, size: Size, stage: int, four_bit: bool, checkpointing: bool, device: torch.device
) -> PreTrainedModel | PeftModel:
    """A model ready for training; weights follow from their names, so that all ways have the same.

    Args:
        stage: 1 trains the projector, 2 LoRA on the language model beside it.
        four_bit: the language model in NF4 (QLoRA), the rest in bfloat16 but what learns.
        checkpointing: of activations, as LLaVA's scripts have it.
    """
    with device:
        model = PhiMMForConditionalGeneration(_our_config(way, size)) if way.ours else None
        if model is None:
            model = (SupervisedHead if way.head else LlavaForConditionalGeneration)(
                _llava_config(way, size)
            )
    _fill(model)
    if four_bit:
        model = _quantised(model, device)
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    if way.no_grad:
        tower = model.model.vision_tower
        tower.forward = torch.no_grad()(tower.forward)
    if stage == 2:
        model = _with_lora(model, size.rank)
    if checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


def _our_config(way: Way, size: Size) -> PhiMMConfig:
    return PhiMMConfig(
        text_config=text_config(size),
        vision_config=vision_config(size, size.vision_layers),
        image_token_id=IMAGE_TOKEN,
        image_pool=way.pool,
    )


def _llava_config(way: Way, size: Size) -> LlavaConfig:
    return LlavaConfig(
        text_config=text_config(size),
        vision_config=vision_config(size, size.vision_layers - way.layers),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=size.patches,
        vision_feature_layer=-1 if way.layers else -2,
    )


def _fill(model: nn.Module, only: str = "") -> None:
    """Random weights that follow from the parameters' names; biases and norms stay as they are."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if only in name and (weight.ndim > 1 or "class_embedding" in name):
                generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
                weight.normal_(std=0.02, generator=generator)


def _quantised(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """`model` in bfloat16, its language model in NF4 (QLoRA, arXiv:2305.14314)."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    return type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.bfloat16().state_dict(),
        dtype=torch.bfloat16,
        quantization_config=settings,
        device_map={"": device},
    )


def _with_lora(model: PreTrainedModel, rank: int) -> PeftModel:
    """LoRA as `phi_mm.assembly.adapt` puts it, without dropout: all ways must compute the same."""
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=LORA_TARGETS["phi"],
        modules_to_save=["multi_modal_projector"],
        r=rank,
        lora_alpha=2 * rank,
    )
    adapted = get_peft_model(model, settings)
    _fill(adapted, "lora_")  # a fresh B is zero, and then A has no gradient
    return adapted


def loss_of(
    model: PreTrainedModel | PeftModel, way: Way, batch: dict[str, torch.Tensor], items: int
) -> torch.Tensor:
    """The loss of one batch, as the Trainer calls for it; LLaVA takes cached features projected.

    Args:
        items: supervised tokens of the whole optimiser step.
    """
    inputs = dict(batch)
    if "image_embeds" in inputs and not way.ours:
        bare = model.get_base_model() if isinstance(model, PeftModel) else model
        features = inputs.pop("image_embeds")
        tokens = list(bare.model.multi_modal_projector(features))
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=tokens)}
    return model(**inputs, num_items_in_batch=items).loss


def forward_work(size: Size, tokens: int) -> dict[str, float]:
    """Multiplications of a forward pass over a row of `tokens` with one picture, by part."""
    width, vision, patches = size.width, size.vision_width, size.patches
    seen = patches + 1  # the class token
    return {
        "layers": tokens * size.layers * 12 * width**2,
        "attention": size.layers * 2 * tokens**2 * width,
        "head": tokens * size.vocabulary * width,
        "tower": size.vision_layers * (seen * 12 * vision**2 + 2 * seen**2 * vision),
        "projector": patches * (vision + width) * width,
    }


def step_work(way: Way, size: Size, row: dict, rows: int, checkpointing: bool) -> float:
    """Multiplications of an optimiser step: what is computed, padding and second times included.

    LoRA is left out, and that the kernels of packed rows skip half of the attention.

    Args:
        row: what `Trial.check` tells; `image_pool` changes its tokens, and nothing else here.
        rows: of the step.
    """
    forward = forward_work(size, row["padded_tokens"] / rows)
    again = int(checkpointing)
    head = row["supervised_tokens"] / row["padded_tokens"] if way.ours or way.head else 1
    # A tower in the graph is run again, and backward.
    tower = 1 if way.ours or way.no_grad or not checkpointing else 3
    layers = size.vision_layers - (way.ours or way.layers)
    passes = {
        "layers": 2 + again,
        "attention": 3 + again,
        "head": 2 * head,
        "tower": 0 if way.cached else tower * layers / size.vision_layers,
        "projector": 3,
    }
    return rows * sum(passes[part] * work for part, work in forward.items())
