"""Build the tiny Whisper, a speech base trained from scratch on synthetic voices (`build`)."""

import json
import logging
import shutil
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from phi_mm.tiny.muon import Muon
from phi_mm.tiny.resume import save_state
from phi_mm.tiny.whisper_data import Batch, Batches, load_utterances, word_counts, words_of
from phi_mm.tiny.whisper_gate import measure, write_gate

logger = logging.getLogger(__name__)

_TASKS = ("<|translate|>", "<|transcribe|>")
# Whisper's order: generate() takes the token before <|notimestamps|> for "no speech".
_SPECIAL = (
    "<|startoftranscript|>", "<|en|>", *_TASKS, "<|startoflm|>", "<|startofprev|>", "<|nospeech|>",
    "<|notimestamps|>",
)  # fmt: skip
_MAX_TOKENS = 64
_WARM_UP = 50
_MUON_RATE = 0.02


def build(
    out: Path,
    seed: int,
    work: Path,
    steps: int = 1600,
    utterances: int = 12_000,
    cases: int = 600,
) -> None:
    """Train the tiny Whisper on one CPU thread's worth of work and write it to `out`.

    Args:
        out: Receives the checkpoint in Hub format (fp16), `gate.json` and `README.md`.
        work: Keeps the synthesised speech and the state of training, so that a run that was
            stopped at any time goes on, to the same weights.
        steps: Training steps of 32 utterances.
        utterances: How many different utterances training reuses.
        cases: Utterances measured for each condition of the gate.
    """
    work.mkdir(parents=True, exist_ok=True)
    counts = word_counts(seed, 20_000)
    processor = make_processor(list(counts.elements()))
    model = make_model(processor, seed)
    speech = load_utterances(work, seed, utterances, counts)
    tokenizer = processor.tokenizer
    words = sorted(set(counts).union(*map(words_of, speech.texts)))
    batches = Batches(
        speech,
        [tokenizer(f" {text}").input_ids for text in speech.texts],
        tokenizer("").input_ids,
        {word: index for index, word in enumerate(words, 1)},
        processor.feature_extractor.mel_filters,
        seed,
    )
    mark = zlib.crc32(repr((sorted(counts.items()), utterances, model.config.to_dict())).encode())
    state = work / f"whisper-{seed}-{steps}-{mark:08x}.pt"
    train(model, batches, steps, len(words) + 1, state)
    save(model, processor, out)
    write_gate(out, measure(out, seed, cases, counts), seed, steps)


def make_processor(words: list[str]) -> WhisperProcessor:
    """A feature extractor for 4 s windows and a byte-level BPE in which every word is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([f" {word}" for word in words], trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # Padding that is not <|endoftext|>, unlike openai's: generate() need not guess where text ends.
    tokenizer = WhisperTokenizer(vocab=bpe.get_vocab(), merges=merges, pad_token="<|padding|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    tokenizer.model_max_length = _MAX_TOKENS
    tokenizer.set_prefix_tokens(language="en", task="transcribe")
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=40, chunk_length=4), tokenizer)


def make_model(processor: WhisperProcessor, seed: int) -> WhisperForConditionalGeneration:
    """The untrained model, with everything `generate` and the ASR pipeline look up."""
    tokenizer = processor.tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    end, start = tokenizer.eos_token_id, ids["<|startoftranscript|>"]
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=processor.feature_extractor.feature_size,
        d_model=128,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_source_positions=200,
        max_target_positions=_MAX_TOKENS,
        init_std=0.05,
        decoder_start_token_id=start,
        begin_suppress_tokens=None,
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        max_length=_MAX_TOKENS,
        is_multilingual=True,
        lang_to_id={"<|en|>": ids["<|en|>"]},
        task_to_id={task.strip("<|>"): ids[task] for task in _TASKS},
        language="en",
        task="transcribe",
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        return_timestamps=False,
        suppress_tokens=[tokenizer.pad_token_id, *sorted(ids.values())],
        **ends,
    )
    return model


def encode(model: WhisperForConditionalGeneration, mel: torch.Tensor) -> torch.Tensor:
    """Encoder states `[B, F, d_model]` of mels `[B, mels, 2 F]` of any F up to the full window.

    The same modules as `WhisperEncoder.forward`, which takes full windows only: most utterances
    fill less than half of one.
    """
    encoder = model.model.encoder
    hidden = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    for layer in encoder.layers:
        hidden = layer(hidden, None)
    return encoder.layer_norm(hidden)


def losses(
    model: WhisperForConditionalGeneration, frame_head: nn.Linear, batch: Batch, prompt: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of the words at each encoder position, and of the decoder's next tokens.

    The first makes the encoder say which word it hears where; the decoder's loss alone takes many
    times as long to find that out. `prompt` is the number of tokens that are given, not predicted.
    """
    hidden = encode(model, batch.mel)
    frame_loss = F.cross_entropy(frame_head(hidden).transpose(1, 2), batch.frames)
    inputs, targets = batch.tokens[:, :-1], batch.tokens[:, 1:].clone()
    targets[:, : prompt - 1] = -100
    inputs = inputs.clamp(min=0)
    decoded = model.model.decoder(
        input_ids=inputs, encoder_hidden_states=hidden, use_cache=False
    ).last_hidden_state
    supervised = targets >= 0
    text_loss = F.cross_entropy(model.proj_out(decoded[supervised]), targets[supervised])
    return frame_loss, text_loss


def train(
    model: WhisperForConditionalGeneration,
    batches: Batches,
    steps: int,
    labels: int,
    state_path: Path,
    save_every: int = 100,
) -> None:
    """Train in place for a fixed number of steps, going on from `state_path` where it exists.

    Args:
        labels: Number of frame labels: the words and silence.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(batches.seed + 1)
        frame_head = nn.Linear(model.config.d_model, labels)
    both = nn.ModuleDict({"model": model, "head": frame_head})
    weights = [each for each in both.parameters() if each.requires_grad]
    optimizers = _optimizers(both)
    schedules = [LambdaLR(each, lambda step: _rate(step, steps)) for each in optimizers]
    parts = {"weights": both, "muon": optimizers[0], "adamw": optimizers[1],
             "muon rate": schedules[0], "adamw rate": schedules[1]}  # fmt: skip
    first = 0
    if state_path.exists():
        saved = torch.load(state_path, weights_only=True)
        first = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        logger.info("going on from step %d of %s", first, state_path)
    prompt = len(batches.silent_ids) - 1
    progress = tqdm(range(first, steps), initial=first, total=steps, desc="whisper", disable=None)
    model.train()
    for step in progress:
        frame_loss, text_loss = losses(model, frame_head, batches[step], prompt)
        both.zero_grad(set_to_none=True)
        (1.5 * frame_loss + text_loss).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_state({"step": step + 1, **states}, state_path)
            shown = f"frame loss {frame_loss.item():.3f}, text loss {text_loss.item():.3f}"
            progress.set_postfix_str(shown)
            logger.info("step %d of %d: %s", step + 1, steps, shown)
    model.eval()


def _optimizers(both: nn.ModuleDict) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices of the layers, AdamW for everything else."""
    matrices, rest = [], []
    for name, weight in both.named_parameters():
        if weight.requires_grad:
            inner = ".layers." in name and weight.ndim == 2
            (matrices if inner else rest).append(weight)
    adamw = torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    return Muon(matrices, lr=_MUON_RATE, weight_decay=0.01), adamw


def _rate(step: int, steps: int) -> float:
    """Learning rate factor: warm-up, constant to 40 % of the steps, then linear to zero."""
    return min((step + 1) / _WARM_UP, 1.0, (steps - step) / (0.6 * steps))


def save(model: WhisperForConditionalGeneration, processor: WhisperProcessor, out: Path) -> None:
    """Write the checkpoint in Hub format, weights in fp16. Replaces what `out` held.

    Its config asks for fp32 all the same: fp16 here saves space on disk, and the feature extractor
    gives fp32, which an fp16 model refuses.
    """
    if out.exists():
        shutil.rmtree(out)
    model.half().save_pretrained(out)
    model.float()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
    processor.save_pretrained(out)
    processor.tokenizer.save_vocabulary(str(out))
