"""The pretrained parts of a model: loaded strictly, the tokenizer with room for media."""

import logging
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from modeling_phi_mm.transcription_phi_mm import language_token

logger = logging.getLogger(__name__)

IMAGE_TOKEN, AUDIO_TOKEN = "<|image|>", "<|audio|>"
TEXT_TYPES = ("phi", "phi3")
# What a whole CLIP repository holds besides the vision tower.
CLIP_TEXT_KEYS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


def load_text(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model with its head (Phi-1, 1.5 and 2 have a bias there)."""
    model_type = AutoConfig.from_pretrained(name).model_type
    if model_type not in TEXT_TYPES:
        raise ValueError(
            f"got {name} of model type {model_type!r} as model.text, expected one of {TEXT_TYPES}"
        )
    return _load_strictly(AutoModelForCausalLM, name, dtype)


def load_vision(name: str, dtype: torch.dtype) -> CLIPVisionModel:
    """The vision tower, also out of a whole CLIP repository."""
    return _load_strictly(CLIPVisionModel, name, dtype, ignore=CLIP_TEXT_KEYS)


def load_audio(name: str, dtype: torch.dtype) -> WhisperForConditionalGeneration:
    """The whole Whisper: WhisperEncoder.from_pretrained would find no key and stay random."""
    return _load_strictly(WhisperForConditionalGeneration, name, dtype)


def _load_strictly(
    cls: type, name: str, dtype: torch.dtype, ignore: tuple[str, ...] = ()
) -> PreTrainedModel:
    """`from_pretrained` that raises ValueError where transformers would only warn."""
    with QuietLoading():
        model, info = cls.from_pretrained(name, dtype=dtype, output_loading_info=True)
    check_loaded(info, name, ignore_unexpected=ignore)
    return model


def check_loaded(
    info: dict[str, set],
    name: str,
    ignore_missing: tuple[str, ...] = (),
    ignore_unexpected: tuple[str, ...] = (),
) -> None:
    """Raise ValueError on any missing, unexpected or misshapen weight, but for ignored prefixes."""
    wrong = {
        "missing": {k for k in info["missing_keys"] if not k.startswith(ignore_missing)},
        "unexpected": {k for k in info["unexpected_keys"] if not k.startswith(ignore_unexpected)},
        "of another shape": {key[0] for key in info["mismatched_keys"]},
    }
    for what, keys in wrong.items():
        if keys:
            listed = ", ".join(sorted(keys)[:5])
            raise ValueError(f"{len(keys)} weights of {name} are {what}: {listed} ...")


class QuietLoading:
    """Hushes transformers' loading report: `check_loaded` is strict, and speaks once."""

    def __enter__(self) -> None:
        self.verbosity = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self.verbosity)
        if self.bars:
            transformers_logging.enable_progress_bar()


def load_tokenizer(name: str, text: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The text tokenizer with <|image|> and <|audio|> in spare rows of the vocabulary.

    Only when no rows are spare are the embeddings made larger. What those rows hold never matters
    (the projected media overwrite them), but it must be finite.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokens = [IMAGE_TOKEN, AUDIO_TOKEN]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    ids = tokenizer.convert_tokens_to_ids(tokens)
    rows = text.config.vocab_size
    if max(ids) >= rows:
        logger.warning("no spare rows: embeddings grow from %d to %d", rows, max(ids) + 1)
        text.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        embeddings = text.get_input_embeddings().weight
        embeddings[ids] = embeddings[ids].nan_to_num()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # attention masks come from lengths, not from it
    return tokenizer


def transcript_settings(
    whisper: PreTrainedModel, language: str | None, task: str | None
) -> dict[str, Any]:
    """A Whisper's own generation settings, with the language and the task where they are given.

    Raises:
        ValueError: for a language that this Whisper does not know, or one that knows English alone.
    """
    settings = whisper.generation_config.to_dict()
    if language is None and task is None:
        return settings
    known = settings.get("lang_to_id") or {}
    if not known:
        raise ValueError(
            "got transcript_language or transcript_task for a Whisper that knows English alone: "
            "leave them out, or take a multilingual one"
        )
    if language is not None and language_token(language) not in known:
        codes = sorted(name.strip("<|>") for name in known)
        raise ValueError(
            f"got transcript_language={language!r}, expected one of {', '.join(codes)}"
        )
    return settings | {k: v for k, v in (("language", language), ("task", task)) if v is not None}
