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
from peft.utils import ModulesToSaveWrapper
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from modeling_phi_mm import PhiMMConfig, PhiMMForConditionalGeneration
from modeling_phi_mm.adapters_phi_mm import MODALITIES
from modeling_phi_mm.transcription_phi_mm import WRITTEN_ROUTES
from phi_mm.parts import (
    AUDIO_TOKEN,
    IMAGE_TOKEN,
    QuietLoading,
    check_loaded,
    load_audio,
    load_text,
    load_tokenizer,
    load_vision,
    transcript_settings,
)
from phi_mm.plan import ADAPTED, PROJECTORS, TOWERS, TuneSection
from phi_mm.precision import automatic_attention
from phi_mm.recipes import ModelSection, Recipe, load_recipe
from phi_mm.summary import describe_plan, summarise
from phi_mm.weights import load_aligned, load_parts, projectors
from processing import PhiMMProcessor, chat_template_for

logger = logging.getLogger(__name__)

# Leaf names collide (CLIP and Whisper have q_proj and fc1 too), so the whole name is matched.
_LAYER = r".*language_model\.layers\.\d+\."
LORA_TARGETS = {
    "phi": _LAYER + r"(self_attn\.(q_proj|k_proj|v_proj|dense)|mlp\.(fc1|fc2))",
    "phi3": _LAYER + r"(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))",
}
TOWER_TARGETS = {
    "vision_tower": r".*vision_tower\.encoder\.layers\.\d+\."
    r"(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))",
    "audio_tower": r".*audio_tower\.layers\.\d+\."
    r"(self_attn\.(q_proj|k_proj|v_proj|out_proj)|fc1|fc2)",
}
# Of a tower that learns in full: CLIP's norm for the class token, which nobody reads, and
# Whisper's sinusoids. Distributed training would wait for their gradients.
NEVER_LEARNS = ("post_layernorm", "embed_positions")


def assemble(recipe: Recipe) -> tuple[PreTrainedModel | PeftModel, PhiMMProcessor]:
    """The model ready to be trained, with its processor; logs what trains and what is frozen.

    New weights (projectors, LoRA) come from torch's global generator: seed it before.

    Raises:
        ValueError: parts that do not fit, missing or unexpected weights, or a model that does not
            learn as `tune` says.
    """
    model, processor = join_parts(recipe)
    if recipe.aligned_runs:
        load_aligned(model, recipe.aligned_runs, recipe.tune)
    attention = automatic_attention(recipe.computes, recipe.on_cpu)
    if attention != "sdpa":  # which is what transformers chooses
        model.set_attn_implementation(attention)
    model = adapt(model, recipe)
    summary = summarise(model)
    logger.info("\n%s\n\n%s", describe_plan(recipe), summary)
    logger.info("computes in %s, attention %s\n", recipe.computes, attention)
    summary.check(recipe.tune)
    return model, processor


def join_parts(
    recipe: Recipe, four_bit: bool = True
) -> tuple[PhiMMForConditionalGeneration, PhiMMProcessor]:
    """The pretrained parts as one model in eval mode (language model in 4-bit for `qlora`, unless
    `four_bit` is false).
    """
    spec = recipe.model
    text = load_text(spec.text, recipe.dtype)
    half = torch.float16 in (recipe.dtype, getattr(torch, recipe.computes))
    if half and text.config.model_type == "phi":
        raise ValueError(
            "got float16, expected bfloat16 or float32: Phi-2 overflows in it, and only what a "
            "finished model computes is kept from that, not its gradients"
        )
    tokenizer = load_tokenizer(spec.text, text)
    vision = load_vision(spec.vision, recipe.dtype) if spec.vision else None
    audio = load_audio(spec.audio, recipe.dtype) if spec.audio else None
    config = join_configs(
        spec,
        text.config,
        vision.config if vision else None,
        audio.config if audio else None,
        tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, AUDIO_TOKEN]),
    )
    if audio and spec.audio_route in WRITTEN_ROUTES:
        said = spec.transcript_language, spec.transcript_task
        config.transcript_generation_config = transcript_settings(audio, *said)
    quantized = four_bit and recipe.tune.language_model == "qlora"
    weights = _joined_weights(config, text, vision, audio)
    settings = {"quantization_config": recipe.bitsandbytes_config()} if quantized else {}
    model = _from_weights(config, weights, dtype=recipe.dtype, **settings)
    keep_learning_in_float32(model, recipe.tune)
    if quantized:
        _keep_training_arithmetic(model)
    model.generation_config = _generation_config(text, tokenizer)
    return model.eval(), _processor(spec, config, tokenizer)


def load_processor(recipe: Recipe) -> PhiMMProcessor:
    """The processor that `assemble` gives, without loading any weights."""
    spec = recipe.model
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(spec.text))
    vision = CLIPVisionConfig.from_pretrained(spec.vision) if spec.vision else None
    audio = WhisperConfig.from_pretrained(spec.audio) if spec.audio else None
    tokenizer = load_tokenizer(spec.text, text)
    placeholders = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, AUDIO_TOKEN])
    config = join_configs(spec, text.config, vision, audio, placeholders)
    return _processor(spec, config, tokenizer)


def adapt(
    model: PhiMMForConditionalGeneration, recipe: Recipe
) -> PhiMMForConditionalGeneration | PeftModel:
    """Freezes everything, then opens what `tune` asks for, LoRA included.

    With shared LoRA, PEFT keeps and saves all else that stands in no pretrained part: projectors,
    and towers that learn in full.
    """
    tune = recipe.tune
    model.requires_grad_(False)
    if tune.adapted and recipe.adapters == "by_modality":
        config = _lora(model, recipe)
        model.add_modality_adapters({name: copy.deepcopy(config) for name in _modalities(model)})
    elif tune.adapted:
        config = _lora(model, recipe)
        kept = [*projectors(model), *(t for t in TOWERS if tune.fate(t) == "full")]
        config.modules_to_save = kept
        adapted = get_peft_model(model, config)
        for name in kept:
            _open(adapted.get_base_model(), name, tune)
        return adapted
    for name in tune.modules("full"):
        _open(model, name, tune)
    return model


def _lora(model: PhiMMForConditionalGeneration, recipe: Recipe) -> LoraConfig:
    """One configuration for all modules that have LoRA."""
    targets = {"language_model": LORA_TARGETS[model.config.text_config.model_type], **TOWER_TARGETS}
    adapted = [targets[module] for module in recipe.tune.modules(*ADAPTED)]
    return LoraConfig(task_type="CAUSAL_LM", target_modules="|".join(adapted), **recipe.lora)


def _open(model: PhiMMForConditionalGeneration, name: str, tune: TuneSection) -> None:
    """Lets a module learn, or not, where the model has it."""
    module = dict(model.model.named_children()).get(name)
    if module is None:
        return
    if name == "language_model":
        model.lm_head.requires_grad_(True)
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save["default"]  # the original stays as it was
    module.requires_grad_(tune.fate(name) == "full")
    for child, inner in module.named_children():
        if child in NEVER_LEARNS:
            inner.requires_grad_(False)


def _modalities(model: PreTrainedModel) -> list[str]:
    """The modalities that reach the language model through a projector, as image, audio."""
    own = projectors(model)
    return [m for m, name in zip(MODALITIES, PROJECTORS, strict=True) if name in own]


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
    if recipe.tune.language_model == "full":
        model = PhiMMForConditionalGeneration.from_pretrained(run_dir, dtype=recipe.dtype)
        return model.eval(), processor
    apart = recipe.adapters == "by_modality"
    model, _ = join_parts(recipe, four_bit=not apart)
    if apart or not recipe.tune.adapted:
        load_parts(model, run_dir, recipe.tune.modules("full"))
    if apart:
        model.config.modality_adapters = _modalities(model)
        model.load_modality_adapters(run_dir)
    elif recipe.tune.adapted:
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


def join_configs(
    spec: ModelSection,
    text: PreTrainedConfig,
    vision: PreTrainedConfig | None,
    audio: PreTrainedConfig | None,
    placeholders: list[int],
) -> PhiMMConfig:
    """The parts' configs as one; `placeholders` are the ids of the image and the audio token."""
    image_token_id, audio_token_id = placeholders
    return PhiMMConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        image_token_id=image_token_id if vision else None,
        audio_token_id=audio_token_id if audio else None,
        vision_feature_layer=spec.vision_feature_layer,
        image_pool=spec.image_pool,
        image_tokens_per_cell=spec.image_tokens_per_cell,
        projector_norm=spec.projector_norm,
        projector_positions=spec.projector_positions,
        projector_hidden_size=spec.projector_hidden_size,
        projector_hidden_act=spec.projector_hidden_act,
        audio_stack=spec.audio_stack,
        audio_route=spec.audio_route,
        audio_padded=spec.audio_padded,
    )


def keep_learning_in_float32(model: PhiMMForConditionalGeneration, tune: TuneSection) -> None:
    """Projectors, and towers that learn in full: a step of 2e-5 is lost in bf16."""
    for name, module in model.model.named_children():
        if name in PROJECTORS or (name in TOWERS and tune.fate(name) == "full"):
            module.float()


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
        whole = config.audio_route in WRITTEN_ROUTES
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
    written = spec.audio is not None and spec.audio_route in WRITTEN_ROUTES
    return PhiMMProcessor(
        image_processor=spec.vision and AutoImageProcessor.from_pretrained(spec.vision),
        feature_extractor=spec.audio and WhisperFeatureExtractor.from_pretrained(spec.audio),
        tokenizer=tokenizer,
        transcript_tokenizer=AutoTokenizer.from_pretrained(spec.audio) if written else None,
        num_image_tokens=config.num_image_tokens if spec.vision else 0,
        audio_stack=config.audio_stack,
        chat_template=chat_template_for(tokenizer),
    )
