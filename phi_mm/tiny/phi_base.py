"""The tiny Phi: a language model of 1 M weights that knows the tiny world, from nothing on a CPU.

Built by `phi-mm tiny build-bases`; it stands in for microsoft/phi-2, in the same formats.
"""

import math
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from phi_mm.tiny.language import describe, text_dialogue
from phi_mm.tiny.phi_gate import measure, write_report
from phi_mm.tiny.phi_training import END, Recipe, render, train
from phi_mm.tiny.scenes import sample_scene

CORPUS_DIALOGUES = 6_000
SPARE_IDS = 16  # rows of the embedding that no token of the tokenizer uses, for media tokens
# The turns' marks are one token each, a word goes with the space before it, digits are single.
PIECES = r"\n(?:Instruct|Output):|Instruct:| ?[a-z]+| ?[A-Z]+[a-z]*| ?[0-9]| ?[^\sA-Za-z0-9]|\s"
# Layer-0 and layer-1 heads that start out looking this many tokens back.
LOOK_BACK = ((1, 2, 3, 4), (3, 4))
LOOK_BACK_SIZE = 5.0  # of the biases that make them do so


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every word of the training split is one token.

    Any other text, upper case and any script included, falls apart into bytes and round-trips
    exactly. "<|endoftext|>" is the only special token, as in Phi-2, and pads as well.
    """
    rng = Random(f"{seed} tokenizer")
    talks = [render(text_dialogue(rng, "train")) for _ in range(CORPUS_DIALOGUES)]
    corpus = [talk.replace(END, "") for talk in talks]
    corpus += [f" {describe(sample_scene(rng, 'train'), rng)}" for _ in range(500)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,  # far more than the corpus has words: merging goes on to whole words
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> PhiForCausalLM:
    """An untrained tiny Phi with at least SPARE_IDS spare rows in its vocabulary.

    The gelu is the kernel of the formula that Phi's "gelu_new" spells out.
    """
    end = tokenizer.eos_token_id
    config = PhiConfig(
        vocab_size=math.ceil((len(tokenizer) + SPARE_IDS) / 32) * 32,
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=1024,
        rope_theta=recipe.rope_theta,
        partial_rotary_factor=0.5,
        initializer_range=0.06,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = PhiForCausalLM(config)
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: PhiForCausalLM) -> None:
    """Gives some heads of the first layers biases by which they attend a few tokens back.

    A query bias that is the key bias turned back by `offset` positions makes the rotary score
    peak there. Words are bound to their neighbours from the start, which is what a small model
    is slowest to find.
    """
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    half = size // 4  # rotary pairs are (i, i + half) in the first half of a head
    theta = config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(half) / half)
    for layer, offsets in zip(model.model.layers, LOOK_BACK, strict=False):
        attention = layer.self_attn
        for head, offset in enumerate(offsets):
            start = head * size
            attention.k_proj.bias[start : start + half] = LOOK_BACK_SIZE
            turned = torch.stack(
                (torch.cos(offset * frequencies), -torch.sin(offset * frequencies))
            )
            attention.q_proj.bias[start : start + 2 * half] = LOOK_BACK_SIZE * turned.flatten()
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight[start : start + size] *= 0.25


def save_checkpoint(model: PhiForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Hub format: half-precision safetensors, tokenizer files, generation settings."""
    out.mkdir(parents=True, exist_ok=True)
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=end, eos_token_id=end, pad_token_id=end, do_sample=False, max_new_tokens=64
    )
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)


def build(
    out: Path, seed: int, work: Path, steps: int = 17_400, gate_questions: int = 150
) -> dict[str, list]:
    """Trains the tiny Phi, writes it to `out` with its measured gate, returns the gate.

    About 0.23 CPU-seconds a step on one core. Runs that are cut off go on from `work`; the result
    is the same for the same seed, steps and number of threads. `gate_questions` is the number of
    questions that the gate asks of each kind in each split.
    """
    recipe = Recipe(seed=seed, steps=steps)
    tokenizer = build_tokenizer(seed)
    model = build_model(tokenizer, recipe)
    train(model, tokenizer, recipe, work)
    save_checkpoint(model, tokenizer, out)
    with tqdm(desc="tiny-phi gate", unit="question") as bar:
        gate = measure(out, seed, gate_questions, bar.update)
    write_report(out, gate, seed, steps)
    return gate
