"""Answers to many prompts: batched, greedy, left padded, similar lengths together."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    WhisperForConditionalGeneration,
)

from phi_mm.datasets.conversations import estimate_length
from phi_mm.recipes import Recipe
from processing import PhiMMProcessor

Messages = list[dict[str, Any]]


def answer(
    model: PreTrainedModel,
    processor: PhiMMProcessor,
    prompts: Sequence[Messages],
    max_new_tokens: int,
    batch_size: int,
    title: str,
) -> list[str]:
    """What the model says to each prompt.

    Args:
        model: a phi-mm model, or a bare language model for prompts without media.
        prompts: conversations that end with the user's turn.
        max_new_tokens: where an answer is cut off.
        batch_size: prompts in one batch.
        title: of the progress bar.
    """
    answers = [""] * len(prompts)
    for batch in _batches(prompts, batch_size, title):
        chosen = [prompts[index] for index in batch]
        if processor.transcript_tokenizer is not None:
            chosen = processor.transcribe(chosen, model)
        inputs = processor.apply_chat_template(
            chosen,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text.strip()
    return answers


def transcribe(
    recipe: Recipe,
    processor: PhiMMProcessor,
    prompts: Sequence[Messages],
    batch_size: int,
    title: str,
) -> list[str]:
    """What the recipe's Whisper alone writes down of the one recording in each prompt.

    Raises:
        ValueError: for a prompt without a recording or with several.
    """
    whisper = WhisperForConditionalGeneration.from_pretrained(
        recipe.model.audio, dtype=recipe.dtype
    )
    whisper = whisper.eval().to(device())
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.audio)
    recordings = [_only_recording(messages) for messages in prompts]
    transcripts = [""] * len(prompts)
    for batch in _batches(prompts, batch_size, title):
        samples = [processor.load_audio(recordings[index]) for index in batch]
        mel = processor(audio=samples, return_tensors="pt")["input_features"]
        ids = whisper.generate(input_features=mel.to(whisper.device, whisper.dtype))
        windows = iter(tokenizer.batch_decode(ids, skip_special_tokens=True))
        for index, recording in zip(batch, samples, strict=True):
            count = len(processor.split_windows(recording))
            transcripts[index] = " ".join(next(windows).strip() for _ in range(count))
    return transcripts


def text_base(recipe: Recipe, processor: PhiMMProcessor) -> PreTrainedModel:
    """The recipe's Phi as it was before any multimodal training."""
    model = AutoModelForCausalLM.from_pretrained(recipe.model.text, dtype=recipe.dtype)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model.eval().to(device())


def device() -> str:
    """Where there is a GPU, it measures."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _batches(prompts: Sequence[Messages], size: int, title: str) -> Iterator[list[int]]:
    """Indices of the prompts, the longest first: if memory does not suffice, it shows at once."""
    order = sorted(range(len(prompts)), key=lambda i: estimate_length(prompts[i]), reverse=True)
    with tqdm(total=len(order), desc=title, unit="question", leave=False) as bar:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            yield batch
            bar.update(len(batch))


def _only_recording(messages: Messages) -> Any:
    parts = [part for message in messages for part in message["content"]]
    found = [part["audio"] for part in parts if part["type"] == "audio"]
    if len(found) != 1:
        raise ValueError(f"got a row with {len(found)} recordings, expected one to write down")
    return found[0]
