"""Trains the tiny Phi: rows of many questions about a scene told in words, loss on answers only."""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PhiForCausalLM, PreTrainedTokenizerFast

from phi_mm.tiny.language import KINDS, Question, ask, beside, small_talk, told
from phi_mm.tiny.muon import Muon
from phi_mm.tiny.resume import load_state, save_state
from phi_mm.tiny.scenes import Scene, caption, renamed, sample_scene

logger = logging.getLogger(__name__)

END = "<|endoftext|>"  # closes every answer
TALK_KINDS = ("fact", "arithmetic", "repeat", "greeting")


def render(dialogue: list[tuple[str, str]]) -> str:
    """A conversation as the model reads it, ending with a line break."""
    return "".join(f"Instruct: {user}\nOutput: {answer}{END}\n" for user, answer in dialogue)


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of its training. `row_tokens` x `rows` tokens make a step; every
    `long_every`-th step has half the rows of twice the length instead."""

    seed: int
    steps: int
    hidden_size: int = 128
    layers: int = 5
    heads: int = 4
    rope_theta: float = 100.0
    rows: int = 8
    row_tokens: int = 192
    long_every: int = 8
    muon_rate: float = 0.006
    adam_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup: int = 30
    restarts: tuple[int, ...] = (6_400, 10_400, 14_400)  # steps at which a cycle of the rate begins
    constant: float = 0.5  # share of a cycle before the rate falls linearly to zero
    plain_until: float = 0.25  # share of the first cycle whose scene rows are all plain
    mixed_from: float = 0.5  # share of the first cycle after which none is
    talk_rows: float = 0.14  # share of rows without a scene
    block_rows: float = 0.45  # share of scene rows whose questions do not see each other
    ahead_rows: float = 0.1  # share of scene rows of questions asked ahead of the scene
    talk_turns: float = 0.12  # share of small talk among a scene conversation's turns
    colourless: float = 0.12  # share of scenes told and asked about without colours
    renamed: float = 0.5  # share of scenes in other words, in the last cycle
    gaps: float = 0.25  # share of rows whose turns stand further apart than they are
    save_every: int = 250

    def rate(self, step: int) -> float:
        """Factor on the learning rates at the step.

        Cycles as in Loshchilov & Hutter (2017), "SGDR": what is right at the end of one is kept,
        and what it left open falls quickly in the next.
        """
        edges = [0, *(restart for restart in self.restarts if restart < self.steps), self.steps]
        start = max(edge for edge in edges[:-1] if edge <= step)
        end = edges[edges.index(start) + 1]
        rest = (end - step) / max(1.0, (end - start) * (1 - self.constant))
        return min(1.0, (step - start + 1) / self.warmup, rest)

    def plain_share(self, step: int) -> float:
        """Share of plain rows among the step's scene rows.

        What a word is bound to is learned first where all scenes are told alike; told in all
        wordings from the start, it takes more than twice the steps.
        """
        first = min(*self.restarts, self.steps)
        past = (step / first - self.plain_until) / (self.mixed_from - self.plain_until)
        return min(1.0, max(0.0, 1.0 - past))

    def renamed_share(self, step: int) -> float:
        """Share of the step's scenes that are told in other words, see `renamed`."""
        return self.renamed if step >= self.restarts[-1] else 0.0


@dataclass
class Row:
    """A tokenised row. `block` is 0 where later tokens see a token, otherwise the number of the
    question that alone sees it. `answers` are (kind, first, end) of the supervised spans."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    answers: list[tuple[str, int, int]] = field(default_factory=list)

    def add(self, ids: list[int], start: int, block: int = 0) -> None:
        """Appends tokens at positions from `start` on."""
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.blocks += [block] * len(ids)


def _sample(rng: Random, renamed_share: float, max_things: int = 4) -> Scene:
    """A train-split scene, by chance in words for things that are never drawn."""
    scene = sample_scene(rng, "train", max_things)
    # No chance is drawn where there is none: rows without other words stay what they were.
    return renamed(scene, rng) if renamed_share and rng.random() < renamed_share else scene


class RowMaker:
    """Makes training rows; asks more of the kinds that the model still gets wrong."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.accuracy = dict.fromkeys((*KINDS, *TALK_KINDS), 0.0)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def note(self, kind: str, right: bool) -> None:
        """Takes an answer into the running accuracy of its kind."""
        self.accuracy[kind] += 0.005 * (right - self.accuracy[kind])

    def weights(self) -> list[float]:
        """How often to ask each of KINDS; a description is as long as many other answers."""
        weights = [max(0.08, 1 - self.accuracy[kind]) for kind in KINDS]
        weights[KINDS.index("describe")] *= 0.35
        return weights

    def questions(
        self, rng: Random, scene: Scene, coloured: bool, talk: float
    ) -> Iterator[Question]:
        """Endless questions about the scene, with a share of small talk between, none twice."""
        asked = set()
        weights = self.weights()
        while True:
            if rng.random() < talk:
                yield small_talk(rng, "train")
                continue
            [kind] = rng.choices(KINDS, weights)
            question = ask(scene, kind, rng, "train", coloured)
            if question is not None and question.text not in asked:
                asked.add(question.text)
                yield question

    def row(
        self, rng: Random, tokens: int, plain_share: float = 0.0, renamed_share: float = 0.0
    ) -> Row:
        """A random row of at most about `tokens` tokens; `plain_share` of the scenes is plain,
        `renamed_share` is told in words for things that are never drawn."""
        recipe = self.recipe
        if rng.random() < recipe.talk_rows:
            questions = iter(lambda: small_talk(rng, "train"), None)
            return self._conversation(rng, questions, "", tokens)
        if rng.random() < plain_share:
            return self._plain(rng, tokens, renamed_share)
        form = rng.random()
        if form < recipe.ahead_rows:
            return self._asked_ahead(rng, tokens, renamed_share)
        scene = _sample(rng, renamed_share)
        coloured = rng.random() >= recipe.colourless
        if form < recipe.ahead_rows + recipe.block_rows:
            questions = self.questions(rng, scene, coloured, talk=0.0)
            return self._blocks(rng, questions, told(scene, rng, coloured), tokens)
        questions = self.questions(rng, scene, coloured, recipe.talk_turns)
        return self._conversation(rng, questions, told(scene, rng, coloured), tokens)

    def _answer(self, row: Row, question: Question, asked: str, start: int, block: int) -> int:
        """Appends the turn's question and answer; the position after it."""
        prompt = self.encode(f"{asked}\nOutput:")
        answer = self.encode(f" {question.answer}{END}")
        row.add(prompt, start, block)
        row.answers.append((question.kind, len(row.ids), len(row.ids) + len(answer)))
        row.add(answer, start + len(prompt), block)
        return start + len(prompt) + len(answer)

    def _blocks(self, rng: Random, questions: Iterable[Question], scene: str, tokens: int) -> Row:
        """Each question sees the scene and itself: as many single turns as fit."""
        row = Row()
        row.add(self.encode(f"Instruct: {scene}"), 0)
        start = len(row.ids)
        if rng.random() < self.recipe.gaps:
            start += rng.randint(1, 60)
        for block, question in enumerate(questions, 1):
            self._answer(row, question, f" {question.text}", start, block)
            if len(row.ids) > tokens - 20:
                return row
        return row

    def _plain(self, rng: Random, tokens: int, renamed_share: float) -> Row:
        """Questions in blocks about few things, named one after the other in any order."""
        scene = _sample(rng, renamed_share, max_things=3)
        shuffled = Scene(tuple(rng.sample(scene.things, len(scene.things))))
        questions = self.questions(rng, scene, coloured=True, talk=0.0)
        return self._blocks(rng, questions, f"{caption(shuffled)}.", tokens)

    def _asked_ahead(self, rng: Random, tokens: int, renamed_share: float) -> Row:
        """Single turns, each with a scene of its own that is told after the question."""
        row, block = Row(), 0
        while len(row.ids) <= tokens - 50:
            block += 1
            scene = _sample(rng, renamed_share)
            coloured = rng.random() >= self.recipe.colourless
            question = next(iter(self.questions(rng, scene, coloured, talk=0.0)))
            text = f"Instruct: {question.text} {told(scene, rng, coloured)}"
            self._answer(row, question, text, 0, block)
        return row

    def _conversation(
        self, rng: Random, questions: Iterable[Question], scene: str, tokens: int
    ) -> Row:
        """One turn after another; the first tells the scene, if there is one."""
        row, start = Row(), 0
        gaps = rng.random() < self.recipe.gaps
        mark = "Instruct:"
        for question in questions:
            text = question.text
            if not row.ids and scene:
                [(text, answer), *_] = beside(scene, [question], rng)
                if answer == "ok":
                    question = Question("greeting", text, answer)
            start = self._answer(row, question, f"{mark} {text}", start, 0)
            start += rng.randint(0, 12) if gaps else 0
            mark = "\nInstruct:"
            if len(row.ids) > tokens - 20:
                return row
        return row


def collate(rows: list[Row], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (B, T), positions (B, T) and who sees whom (B, 1, T, T), right padded.

    A token sees itself and what stands before it, unless that belongs to another question's block.
    """
    length = max(len(row.ids) for row in rows)

    def padded(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([v + [filler] * (length - len(v)) for v in values])

    ids = padded([row.ids for row in rows], pad)
    positions = padded([row.positions for row in rows], 0)
    blocks = padded([row.blocks for row in rows], -1)
    shared = (blocks[:, None, :] == 0) | (blocks[:, None, :] == blocks[:, :, None])
    return ids, positions, (shared & torch.ones(length, length).tril().bool())[:, None]


def answer_logits(
    model: PhiForCausalLM, rows: list[Row], pad: int
) -> tuple[Tensor, Tensor, list[tuple[str, int]]]:
    """Logits (N, vocabulary) and targets (N,) of all answers' tokens, and each answer's kind and
    number of tokens in that order."""
    ids, positions, mask = collate(rows, pad)
    hidden = model.model(
        input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state
    spans = [(i, *answer) for i, row in enumerate(rows) for answer in row.answers]
    picked = [(i, t) for i, _, first, end in spans for t in range(first, end)]
    index = torch.tensor(picked).T
    logits = model.lm_head(hidden[index[0], index[1] - 1])
    return logits, ids[index[0], index[1]], [(kind, end - first) for _, kind, first, end in spans]


class _Run:
    """A training under way: everything that its continuation depends on."""

    def __init__(
        self, model: PhiForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe
    ) -> None:
        self.model, self.recipe, self.step = model, recipe, 0
        self.pad = tokenizer.pad_token_id
        self.maker = RowMaker(tokenizer, recipe)
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        chosen = set(matrices)
        others = [p for p in model.parameters() if p not in chosen]
        self.muon = Muon(matrices, recipe.muon_rate, weight_decay=recipe.weight_decay)
        self.adam = torch.optim.AdamW(others, recipe.adam_rate, (0.9, 0.98), weight_decay=0.0)

    def train_step(self) -> float:
        """One step; the loss. What is drawn depends on seed, step and running accuracy only."""
        recipe = self.recipe
        rng = Random(f"{recipe.seed} {self.step}")
        long = self.step % recipe.long_every == recipe.long_every - 1
        rows, tokens = recipe.rows, recipe.row_tokens
        if long:
            rows, tokens = max(1, rows // 2), 2 * tokens
        shares = recipe.plain_share(self.step), recipe.renamed_share(self.step)
        batch = [self.maker.row(rng, tokens, *shares) for _ in range(rows)]
        logits, targets, answers = answer_logits(self.model, batch, self.pad)
        # A long answer counts as the root of its length: more than a short one, not as many.
        weights = torch.cat([torch.full((n,), 1 / math.sqrt(n)) for _, n in answers])
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        self._update()
        right = (logits.argmax(-1) == targets).split([n for _, n in answers])
        for (kind, _), tokens_right in zip(answers, right, strict=True):
            self.maker.note(kind, tokens_right.all().item())
        self.step += 1
        return loss.item()

    def _update(self) -> None:
        factor = self.recipe.rate(self.step)
        nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        for optimizer, rate in (
            (self.muon, self.recipe.muon_rate),
            (self.adam, self.recipe.adam_rate),
        ):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def save(self, path: Path) -> None:
        """See `save_state`."""
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "accuracy": self.maker.accuracy,
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
        }
        save_state(state, path)

    def load(self, path: Path) -> None:
        """Raises ValueError when the saved run followed another recipe."""
        state = load_state(path, asdict(self.recipe))
        for part, name in ((self.model, "model"), (self.muon, "muon"), (self.adam, "adam")):
            part.load_state_dict(state[name])
        self.step, self.maker.accuracy = state["step"], state["accuracy"]


def train(
    model: PhiForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    work: Path,
    stop_at: int | None = None,
) -> None:
    """Trains `model` in place, or goes on with the run saved in `work`, up to `stop_at` steps
    (all of the recipe's if None)."""
    work.mkdir(parents=True, exist_ok=True)
    saved = work / "phi.pt"
    run = _Run(model, tokenizer, recipe)
    if saved.exists():
        run.load(saved)
        logger.info("going on from step %d of %s", run.step, saved)
    last = recipe.steps if stop_at is None else stop_at
    model.train()
    with tqdm(total=recipe.steps, initial=run.step, desc="tiny-phi", mininterval=2) as bar:
        while run.step < last:
            loss = run.train_step()
            bar.update()
            if run.step % 100 == 0:
                worst = min(KINDS, key=run.maker.accuracy.__getitem__)
                bar.set_postfix_str(f"{worst} {run.maker.accuracy[worst]:.2f}")
                shown = {kind: round(value, 2) for kind, value in run.maker.accuracy.items()}
                logger.info("step %d loss %.3f right %s", run.step, loss, shown)
            if run.step % recipe.save_every == 0 or run.step == last:
                run.save(saved)
    model.eval()
