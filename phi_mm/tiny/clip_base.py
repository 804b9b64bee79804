"""Builds the tiny CLIP checkpoint from drawn scenes, for `phi-mm tiny build-bases`."""

import copy
import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from phi_mm.tiny.clip_gate import measure, write_report
from phi_mm.tiny.clip_training import (
    MEAN,
    PHRASES,
    STD,
    Mixture,
    RegionHeads,
    caption_loss,
    encode,
    encode_text,
    make_batch,
    region_loss,
)
from phi_mm.tiny.drawing import SIZE
from phi_mm.tiny.muon import Muon
from phi_mm.tiny.resume import load_state, save_state
from phi_mm.tiny.scenes import COLOURS, SHAPES, caption, sample_scene

logger = logging.getLogger(__name__)

WIDTH = 128
PATCH = 8
VISION_LAYERS = 5  # phi-mm reads the output of the fourth
TEXT_LAYERS = 2
TEXT_POSITIONS = 64
VOCABULARY = 640
END, START = "<|endoftext|>", "<|startoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that fixes a run; a saved run is only taken up again under the same recipe."""

    seed: int
    steps: int
    mixture: Mixture = Mixture()
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    warmup: int = 30
    decay_from: float = 0.4  # share of the steps after which the rates fall linearly to 0
    free_from: float = 0.05  # placement leaves the cells' middles between these shares
    free_at: float = 0.35
    caption_weight: float = 0.5
    save_every: int = 100

    def rate(self, step: int) -> float:
        """Factor on the learning rates at `step`."""
        left = (self.steps - step) / (self.steps * (1 - self.decay_from))
        return min(1.0, (step + 1) / self.warmup, left)

    def freedom(self, step: int) -> float:
        """How far things leave the middles of their cells at `step`, 0..1."""
        progress = step / self.steps
        return min(1.0, max(0.0, (progress - self.free_from) / (self.free_at - self.free_from)))


def build_tokenizer(seed: int) -> CLIPTokenizer:
    """CLIP's lower-case byte-level BPE with `</w>` word ends, learned from training captions."""
    rng = Random(f"tiny-clip tokenizer {seed}")
    texts = [caption(sample_scene(rng, "train")) for _ in range(3000)]
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learned.train_from_iterator(
        [*texts, *PHRASES],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, initial_alphabet=letters, end_of_word_suffix="</w>"
        ),
    )
    merges = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    pieces = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    pieces = list(dict.fromkeys(pieces)) + [START, END]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        model_max_length=TEXT_POSITIONS,
    )


def build_model(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """A CLIPModel with starting weights under which this little training gets going."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    shared |= {"hidden_act": "gelu", "projection_dim": WIDTH}
    config = CLIPConfig(
        text_config=shared
        | {
            "vocab_size": len(tokenizer),
            "num_hidden_layers": TEXT_LAYERS,
            "max_position_embeddings": TEXT_POSITIONS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config=shared
        | {"num_hidden_layers": VISION_LAYERS, "image_size": SIZE, "patch_size": PATCH},
        projection_dim=WIDTH,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
        _widen(model)
    return model


@torch.no_grad()
def _widen(model: CLIPModel) -> None:
    """Larger starting weights than CLIP's (meant for long trainings), 2-D sine positions."""
    for tower in (model.vision_model, model.text_model):
        layers = tower.encoder.layers
        for layer in layers:
            for name, matrix in layer.named_parameters():
                if matrix.dim() == 2:
                    leaves = "out_proj" in name or "fc2" in name
                    depth = (2 * len(layers)) ** -0.5 if leaves else 1.0
                    matrix.normal_(std=matrix.shape[1] ** -0.5 * depth)
    embeddings = model.vision_model.embeddings
    patch = embeddings.patch_embedding.weight
    patch.normal_(std=patch[0].numel() ** -0.5)
    embeddings.position_embedding.weight[1:] = _sine_positions(SIZE // PATCH, WIDTH)


def _sine_positions(side: int, width: int) -> Tensor:
    """Sines and cosines of row and column at width/4 wavelengths each. (side * side, width)"""
    waves = 2 * math.pi / torch.logspace(math.log10(3), math.log10(8 * side), width // 4)
    angles = torch.arange(side)[:, None] * waves
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = line[:, None].expand(side, side, -1)
    columns = line[None, :].expand(side, side, -1)
    return 0.5 * torch.cat([rows, columns], dim=2).reshape(side * side, width)


class _Run:
    """A training run: model, heads and optimizers, saved and taken up again as one."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer = build_tokenizer(recipe.seed)
        self.model = build_model(self.tokenizer, recipe.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed + 1)
            self.heads = RegionHeads(WIDTH, WIDTH)
        self.met = torch.zeros(len(COLOURS), len(SHAPES), dtype=torch.bool)
        self.step = 0
        matrices, rest = [], list(self.heads.parameters())
        for name, parameter in self.model.named_parameters():
            inner = ".encoder." in name and parameter.dim() == 2
            (matrices if inner else rest).append(parameter)
        self.muon = Muon(matrices, lr=recipe.muon_rate)
        self.adam = torch.optim.AdamW(
            rest, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.01
        )

    def train_step(self) -> float:
        """One step on fresh pictures; returns the shape loss."""
        recipe = self.recipe
        rng = Random(f"tiny-clip {recipe.seed} {self.step}")
        batch = make_batch(rng, recipe.mixture, recipe.freedom(self.step))
        named = batch.colour >= 0
        self.met[batch.colour[named], batch.shape[named]] = True
        cells, images = encode(self.model, batch.pixels, len(batch.captions))
        phrases = encode_text(self.model, self.tokenizer, list(PHRASES))
        texts = encode_text(self.model, self.tokenizer, batch.captions)
        loss, shape = region_loss(cells, phrases, batch, self.heads, self.met)
        contrast = caption_loss(images, texts, self.model.logit_scale)
        loss = loss + recipe.caption_weight * contrast
        loss.backward()
        self._update()
        self.step += 1
        return shape.item()

    def _update(self) -> None:
        factor = self.recipe.rate(self.step)
        pairs = ((self.muon, self.recipe.muon_rate), (self.adam, self.recipe.adam_rate))
        for optimizer, rate in pairs:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        for optimizer, _ in pairs:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def save(self, path: Path) -> None:
        """See `save_state`."""
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "met": self.met,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
        }
        save_state(state, path)

    def load(self, path: Path) -> None:
        """Raises ValueError when the saved run followed another recipe."""
        state = load_state(path, asdict(self.recipe))
        for name in ("model", "heads", "muon", "adam"):
            self.__dict__[name].load_state_dict(state[name])
        self.met, self.step = state["met"], state["step"]


def train(recipe: Recipe, work: Path, stop_at: int | None = None) -> _Run:
    """Trains, or goes on training, up to `stop_at` steps (all of the recipe's if None)."""
    work.mkdir(parents=True, exist_ok=True)
    saved = work / "clip.pt"
    run = _Run(recipe)
    if saved.exists():
        run.load(saved)
        logger.info("going on from step %d of %s", run.step, saved)
    last = recipe.steps if stop_at is None else stop_at
    with tqdm(total=recipe.steps, initial=run.step, desc="tiny-clip") as bar:
        while run.step < last:
            shape_loss = run.train_step()
            bar.update()
            if run.step % 20 == 0:
                bar.set_postfix(shape_loss=f"{shape_loss:.3f}")
            if run.step % recipe.save_every == 0 or run.step == last:
                run.save(saved)
    return run


@torch.no_grad()
def level(model: CLIPModel, pixels: Tensor) -> None:
    """Rescales the vision tower so that its layer -2 features have a mean square of 1.

    Training lets them grow, and a projector learns best from inputs near 1. All that is written
    to the residual stream shrinks by one factor, which the layer norms that read it take out
    again: the model's outputs stay what they were.
    """
    vision = model.vision_model
    cells, _ = encode(model, pixels, 1)
    factor = cells.square().mean().rsqrt()
    writers = [vision.pre_layrnorm]
    for layer in vision.encoder.layers:
        writers += [layer.self_attn.out_proj, layer.mlp.fc2]
    for writer in writers:
        writer.weight *= factor
        writer.bias *= factor


def save_checkpoint(run: _Run, out: Path) -> None:
    """Hub format: half-precision safetensors, tokenizer and image processor files."""
    out.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(run.model)
    sample = make_batch(Random(f"tiny-clip level {run.recipe.seed}"), Mixture(), 1.0)
    level(model, sample.pixels)
    model.half().save_pretrained(out)
    square = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size=square, image_mean=list(MEAN), image_std=list(STD)
    )
    run.tokenizer.backend_tokenizer.no_padding()  # as training used it last is nobody's default
    CLIPProcessor(image_processor=images, tokenizer=run.tokenizer).save_pretrained(out)
    images.save_pretrained(out)


def build(
    out: Path, seed: int, work: Path, steps: int = 4000, gate_things: int = 2500
) -> dict[str, list]:
    """Trains the tiny CLIP, writes it to `out` with its measured gate, returns the gate.

    About 25 CPU-minutes on one core. Runs that are cut off go on from `work`; the result
    is the same for the same seed, steps and number of threads. `gate_things` is the number of
    things of unseen pairs that the gate reads in each split.
    """
    run = train(Recipe(seed=seed, steps=steps), work)
    save_checkpoint(run, out)
    gate = measure(out, seed, gate_things)
    write_report(out, gate, seed, steps)
    return gate
