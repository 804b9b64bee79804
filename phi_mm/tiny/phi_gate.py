"""Measures the tiny Phi by greedy generation on scenes, sentences and pairs it never met."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoTokenizer, PhiForCausalLM, PreTrainedTokenizerBase

from phi_mm.tiny.facts import FACTS, arithmetic
from phi_mm.tiny.language import KINDS, Question, ask, repeat, text_dialogue, told
from phi_mm.tiny.phi_training import render
from phi_mm.tiny.scenes import HELD_PAIRS, Scene, sample_scene
from phi_mm.tiny.wordings import named_pairs, worded

BAR = 0.97
BATCH = 64
MAX_NEW_TOKENS = 56  # a description of four things has 39
Turns = list[tuple[str, str]]


def prompt(turns: Turns) -> str:
    """The conversation up to where its last answer begins."""
    return f"{render(turns[:-1])}Instruct: {turns[-1][0]}\nOutput:"


@torch.no_grad()
def answers(
    model: PhiForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    progress: Callable[[int], Any] = lambda count: None,
) -> list[str]:
    """What the model says to each prompt, greedily, a batch of similar lengths at a time."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    said = [""] * len(prompts)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = tokenizer(
            [prompts[i] for i in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        )
        ids = model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        new = ids[:, batch["input_ids"].size(1) :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            said[i] = text.strip()
        progress(len(chosen))
    return said


def scene_questions(
    rng: Random, split: str, kind: str, count: int
) -> Iterator[tuple[Scene, str, Question]]:
    """Scenes, the words they are told in, and a question of the kind about each."""
    while count:
        scene = sample_scene(rng, split)
        question = ask(scene, kind, rng, split)
        if question is not None:
            count -= 1
            yield scene, told(scene, rng), question


def conversations(rng: Random, split: str, count: int) -> Iterator[Turns]:
    """The later turns (second to sixth) of conversations, those before them answered rightly."""
    while True:
        dialogue = text_dialogue(rng, split)
        for end in range(2, len(dialogue) + 1):
            yield dialogue[:end]
            count -= 1
            if not count:
                return


def _facts(rng: Random, split: str) -> Iterator[Turns]:
    """Every fact once, in a wording of the split."""
    for answer, bodies in FACTS:
        text = worded(rng, split, bodies)
        if text is not None:
            yield [(text, answer)]


def _cases(rng: Random, split: str, count: int) -> Iterator[tuple[list[str], Turns]]:
    """Conversations to finish, each with the measures that it counts for."""
    for kind in KINDS:
        for scene, words, question in scene_questions(rng, split, kind, count):
            names = [kind, "questions"]
            if named_pairs(question.text) & HELD_PAIRS[split]:
                names.append("questions naming an unseen pair")
            if len(scene.things) == 4:
                names.append("questions about four things")
            yield names, [(f"{words} {question.text}", question.answer)]
        for _, words, question in scene_questions(rng, split, kind, count // 3):
            names = ["questions asked ahead of the scene"]
            yield names, [(f"{question.text} {words}", question.answer)]
    for turns in conversations(rng, split, 3 * count):
        yield ["later turns"], turns
    for turns in _facts(rng, split):
        yield ["facts"], turns
    for make, name in ((arithmetic, "arithmetic"), (repeat, "repeat")):
        for question in (make(rng, split) for _ in range(count)):
            yield [name], [(question.text, question.answer)]


def measure(
    checkpoint: Path, seed: int, count: int, progress: Callable[[int], Any] = lambda count: None
) -> dict[str, Any]:
    """Share of answers that are right to the letter on validation and test, by kind.

    `count` questions of each kind in each split, single turns; beside them later turns of
    conversations, facts, sums and repetitions. "questions" is the mean over all kinds, asked after
    the scene is told. The gate is "questions" and "later turns", each on both splits, at BAR or
    better.
    """
    model = PhiForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = []
    for split in ("validation", "test"):
        cases = list(_cases(Random(f"{seed} gate {split}"), split, count))
        said = answers(model, tokenizer, [prompt(turns) for _, turns in cases], progress)
        right: dict[str, list[bool]] = defaultdict(list)
        for (names, turns), text in zip(cases, said, strict=True):
            for name in names:
                right[name].append(text == turns[-1][1])
        for name, values in right.items():
            value = round(sum(values) / len(values), 4)
            rows.append({"name": name, "value": value, "n": len(values), "split": split})
    gated = [row["value"] for row in rows if row["name"] in ("questions", "later turns")]
    return {"bar": BAR, "lowest": min(gated), "passed": min(gated) >= BAR, "metrics": rows}


README = """# tiny-phi

A `PhiForCausalLM` of {weights:,} weights, trained from scratch on conversations about scenes of
coloured shapes told in words, on some facts, small sums and on repeating sentences. Built by
`phi-mm tiny build-bases`, seed {seed}, {steps} steps. It reads and writes

    Instruct: there is a small pink star on the left. what is on the left?\\nOutput: a pink star

with every answer ended by `<|endoftext|>`, which also pads. Words of that world are one token
each; any other text falls apart into bytes and is not understood. The vocabulary of {vocabulary}
rows has {spare} spare ones behind the tokenizer's own, for tokens that stand for pictures and
sounds.

Gate: questions about unseen scenes, in unseen sentences and often about colour-shape pairs that
training never named, answered word for word by greedy generation, and likewise the later turns of
conversations, at {bar:.0%} or better: **{verdict}** (lowest {lowest:.2%}). The scene is told before
the question there; questions asked ahead of it are measured apart and not part of the gate.

| measured | value | n | split |
|---|---|---|---|
{table}

It knows this world only and is no assistant.
"""


def write_report(out: Path, gate: dict[str, Any], seed: int, steps: int) -> None:
    """gate.json and README.md of the checkpoint."""
    (out / "gate.json").write_text(json.dumps(gate, indent=1) + "\n")
    table = [
        f"| {r['name']} | {r['value']:.4f} | {r['n']} | {r['split']} |" for r in gate["metrics"]
    ]
    model = PhiForCausalLM.from_pretrained(out)
    vocabulary = model.config.vocab_size
    text = README.format(
        weights=model.num_parameters(),
        seed=seed,
        steps=steps,
        vocabulary=vocabulary,
        spare=vocabulary - len(AutoTokenizer.from_pretrained(out)),
        bar=gate["bar"],
        verdict="passed" if gate["passed"] else "not passed",
        lowest=gate["lowest"],
        table="\n".join(table),
    )
    (out / "README.md").write_text(text)
