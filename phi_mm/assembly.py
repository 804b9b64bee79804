"""Pretrained parts become one model: load, join, quantise, adapt, and load a finished run again.

A recipe names a Phi, a CLIP and a Whisper checkpoint (any of the last two may be missing). Their
weights are handed to `PhiMMForConditionalGeneration` as one state dict, so that transformers' own
loader checks every key, draws the new projectors and quantises what is to be 4-bit.
"""

import copy
import logging
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)

from modeling_phi_mm import PhiMMConfig, PhiMMForConditionalGeneration
from modeling_phi_mm.adapters_phi_mm import MODALITIES
from phi_mm.parts import (
    AUDIO_TOKEN,
    IMAGE_TOKEN,
    QuietLoading,
    check_loaded,
    load_audio,
    load_text,
    load_tokenizer,
    load_vision,
)
from phi_mm.recipes import ModelSection, Recipe, load_recipe
from phi_mm.summary import summarise
from processing import PhiMMProcessor, chat_template_for

logger = logging.getLogger(__name__)

PROJECTORS = ("multi_modal_projector", "audio_projector")
PROJECTOR_FILE = "projectors.safetensors"
# Leaf names collide (CLIP and Whisper have q_proj and fc1 too), so the whole name is matched.
_LAYER = r".*language_model\.layers\.\d+\."
LORA_TARGETS = {
    "phi": _LAYER + r"(self_attn\.(q_proj|k_proj|v_proj|dense)|mlp\.(fc1|fc2))",
    "phi3": _LAYER + r"(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))",
}


def assemble(recipe: Recipe) -> tuple[PreTrainedModel | PeftModel, PhiMMProcessor]:
    """The model ready to be trained, with its processor; logs what trains and what is frozen.

    New weights (projectors, LoRA) come from torch's global generator: seed it before.

    Raises:
        ValueError: parts that do not fit, missing or unexpected weights, a run in which a tower
            would be adapted or nothing learns.
    """
    model, processor = join_parts(recipe)
    if recipe.model.init_from:
        load_projectors(model, Path(recipe.model.init_from))
    model = adapt(model, recipe)
    summary = summarise(model)
    logger.info("\n%s", summary)
    summary.check()
    return model, processor


def join_parts(
    recipe: Recipe, four_bit: bool = True
) -> tuple[PhiMMForConditionalGeneration, PhiMMProcessor]:
    """The pretrained parts as one model in eval mode (language model in 4-bit for `qlora`, unless
    `four_bit` is false).
    """
    spec = recipe.model
    text = load_text(spec.text, recipe.dtype)
    half = recipe.dtype == torch.float16 or recipe.training.get("fp16", False)
    if half and text.config.model_type == "phi":
        raise ValueError(
            "got float16, expected bfloat16 or float32: Phi-2 overflows in it, and only what a "
            "finished model computes is kept from that, not its gradients"
        )
    tokenizer = load_tokenizer(spec.text, text)
    vision = load_vision(spec.vision, recipe.dtype) if spec.vision else None
    audio = load_audio(spec.audio, recipe.dtype) if spec.audio else None
    config = _config(spec, text, vision, audio, tokenizer)
    quantized = four_bit and recipe.tune.language_model == "qlora"
    weights = _joined_weights(config, text, vision, audio)
    settings = {"quantization_config": recipe.bitsandbytes_config()} if quantized else {}
    model = _from_weights(config, weights, dtype=recipe.dtype, **settings)
    for projector in projectors(model).values():
        projector.float()  # what learns stays fp32: a step of 2e-5 is lost in bf16
    if quantized:
        _keep_training_arithmetic(model)
    model.generation_config = _generation_config(text, tokenizer)
    return model.eval(), _processor(spec, config, tokenizer)


def adapt(
    model: PhiMMForConditionalGeneration, recipe: Recipe
) -> PhiMMForConditionalGeneration | PeftModel:
    """Freezes everything but the projectors, then opens what `tune.language_model` asks for."""
    mode = recipe.tune.language_model
    model.requires_grad_(False)
    for projector in projectors(model).values():
        projector.requires_grad_(True)
    if mode == "full":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    if mode in ("frozen", "full"):
        return model
    targets = LORA_TARGETS[model.config.text_config.model_type]
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **recipe.lora)
    if recipe.adapters == "shared":
        config.modules_to_save = list(projectors(model))
        return get_peft_model(model, config)
    model.add_modality_adapters({name: copy.deepcopy(config) for name in _modalities(model)})
    for projector in projectors(model).values():
        projector.requires_grad_(True)  # PEFT has frozen all that is not LoRA
    return model


def projectors(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The projectors that this model has, by their name inside `model.model`."""
    children = dict(model.model.named_children())
    return {name: children[name] for name in PROJECTORS if name in children}


def _modalities(model: PreTrainedModel) -> list[str]:
    """The modalities that reach the language model through a projector, as image, audio."""
    own = projectors(model)
    return [m for m, name in zip(MODALITIES, PROJECTORS, strict=True) if name in own]


def projector_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """State dict of the projectors, keys as `multi_modal_projector.linear_1.weight`."""
    return {
        f"{name}.{key}": value.detach().contiguous()
        for name, module in projectors(model).items()
        for key, value in module.state_dict().items()
    }


def load_projectors(model: PreTrainedModel, run_dir: Path) -> None:
    """Puts the projectors of an aligned run (or of one of its checkpoints) into `model`.

    Raises:
        ValueError: no projectors there, or projectors of other shapes than this model's.
    """
    path = run_dir / PROJECTOR_FILE
    if not path.is_file():
        raise ValueError(
            f"got {run_dir}, expected the run folder of a stage with tune.language_model: frozen "
            f"(holding {PROJECTOR_FILE}): train that stage first"
        )
    state = load_file(path)
    for name, module in projectors(model).items():
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        shapes = {k: tuple(v.shape) for k, v in own.items()}
        expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
        if shapes != expected:
            raise ValueError(
                f"got {name} of {shapes} in {path}, expected {expected}: the model sections of "
                "both recipes must agree"
            )
        module.load_state_dict(own)


def load_run(run_dir: Path | str, merge: bool = False) -> tuple[PreTrainedModel, PhiMMProcessor]:
    """A trained run in eval mode, with the processor it was trained with.

    Args:
        run_dir: the folder that `train.py` filled.
        merge: give a plain PhiMMForConditionalGeneration in float. LoRA is then merged into the
            weights that training saw: for QLoRA the dequantised 4-bit weights, never the original
            ones, so that the merged model answers as the trained one did. The largest difference
            of logits on a text probe is logged. Adapters by modality are never merged: text has
            none, and meets the language model's original weights.

    Raises:
        ValueError: `run_dir` holds no finished run.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "recipe.yaml").is_file():
        raise ValueError(f"got {run_dir}, expected a run folder with recipe.yaml: train it first")
    recipe = load_recipe(run_dir / "recipe.yaml")
    processor = PhiMMProcessor.from_pretrained(run_dir)
    mode = recipe.tune.language_model
    if mode == "full":
        model = PhiMMForConditionalGeneration.from_pretrained(run_dir, dtype=recipe.dtype)
        return model.eval(), processor
    apart = recipe.adapters == "by_modality"
    model, _ = join_parts(recipe, four_bit=not apart)
    if mode == "frozen" or apart:
        load_projectors(model, run_dir)
    if apart:
        model.config.modality_adapters = _modalities(model)
        model.load_modality_adapters(run_dir)
    elif mode != "frozen":
        model = PeftModel.from_pretrained(model, run_dir)
        if merge:
            model = _merged(model, run_dir, recipe, processor)
    if merge:
        model = model.to(recipe.dtype)
    return model.eval(), processor


def _merged(
    trained: PeftModel, run_dir: Path, recipe: Recipe, processor: PhiMMProcessor
) -> PhiMMForConditionalGeneration:
    """LoRA inside float weights. PEFT would merge into 4-bit and round the adapter away."""
    probe = processor.tokenizer("the quick brown fox jumps over the lazy dog", return_tensors="pt")
    probe = probe.to(trained.device)
    with torch.no_grad():
        before = trained.eval()(**probe).logits
    base = trained.unload()
    if recipe.tune.language_model == "qlora":
        base = base.dequantize(dtype=recipe.dtype)
    merged = PeftModel.from_pretrained(base, run_dir).merge_and_unload()
    with torch.no_grad():
        difference = (merged.eval()(**probe).logits - before).abs().max().item()
    logger.info("merged LoRA: logits differ from the trained model's by at most %.2e", difference)
    return merged


def _config(
    spec: ModelSection,
    text: PreTrainedModel,
    vision: PreTrainedModel | None,
    audio: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
) -> PhiMMConfig:
    transcript = audio is not None and spec.audio_route == "transcript"
    return PhiMMConfig(
        text_config=text.config,
        vision_config=vision.config if vision else None,
        audio_config=audio.config if audio else None,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) if vision else None,
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO_TOKEN) if audio else None,
        vision_feature_layer=spec.vision_feature_layer,
        image_pool=spec.image_pool,
        image_tokens_per_cell=spec.image_tokens_per_cell,
        projector_norm=spec.projector_norm,
        projector_positions=spec.projector_positions,
        projector_hidden_size=spec.projector_hidden_size,
        projector_hidden_act=spec.projector_hidden_act,
        audio_stack=spec.audio_stack,
        audio_route=spec.audio_route,
        transcript_generation_config=audio.generation_config.to_dict() if transcript else None,
    )


def _joined_weights(
    config: PhiMMConfig,
    text: PreTrainedModel,
    vision: PreTrainedModel | None,
    audio: PreTrainedModel | None,
) -> dict[str, torch.Tensor]:
    """One state dict under the names of PhiMMForConditionalGeneration, towers cut to what runs."""
    parts = {"model.language_model": text.model}
    if not config.tie_word_embeddings:
        parts["lm_head"] = text.lm_head
    if vision is not None:
        del vision.encoder.layers[config.num_vision_layers :]
        parts["model.vision_tower"] = vision
    if audio is not None:
        whole = config.audio_route == "transcript"
        parts["model.audio_tower"] = audio if whole else audio.get_encoder()
    return {
        f"{prefix}.{key}": value
        for prefix, module in parts.items()
        for key, value in module.state_dict().items()
    }


def _from_weights(
    config: PhiMMConfig, weights: dict[str, torch.Tensor], **settings: object
) -> PhiMMForConditionalGeneration:
    with QuietLoading():
        model, info = PhiMMForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True, **settings
        )
    new = tuple(f"model.{name}." for name in PROJECTORS)
    check_loaded(info, "the joined model", ignore_missing=new)
    return model


def _keep_training_arithmetic(model: PhiMMForConditionalGeneration) -> None:
    """Evaluation must compute as training does.

    On CPUs with AVX512-BF16, bitsandbytes repacks a layer at its first evaluation and then computes
    it in bf16 by a kernel without gradient, also when training goes on.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def _generation_config(
    text: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """The language model's own settings, with padding set and placeholders never generated."""
    settings = text.generation_config.to_dict() | {
        "pad_token_id": tokenizer.pad_token_id,
        "suppress_tokens": tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, AUDIO_TOKEN]),
    }
    if settings.get("eos_token_id") is None:
        settings["eos_token_id"] = tokenizer.eos_token_id
    return GenerationConfig.from_dict(settings)


def _processor(
    spec: ModelSection, config: PhiMMConfig, tokenizer: PreTrainedTokenizerBase
) -> PhiMMProcessor:
    transcript = spec.audio is not None and spec.audio_route == "transcript"
    return PhiMMProcessor(
        image_processor=spec.vision and AutoImageProcessor.from_pretrained(spec.vision),
        feature_extractor=spec.audio and WhisperFeatureExtractor.from_pretrained(spec.audio),
        tokenizer=tokenizer,
        transcript_tokenizer=AutoTokenizer.from_pretrained(spec.audio) if transcript else None,
        num_image_tokens=config.num_image_tokens if spec.vision else 0,
        audio_stack=spec.audio_stack,
        chat_template=chat_template_for(tokenizer),
    )
