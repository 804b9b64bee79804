"""What `phi-mm estimate` predicts, against the memory that training steps take.

    python benchmarks/estimate.py
    python benchmarks/estimate.py --gpu
    python benchmarks/estimate.py --quick

For every recipe a process of its own assembles random parts of Phi-2's proportions (width, depth
and vocabulary scaled together) and makes three steps of one batch. Measured is by how much its
resident memory has grown at the highest point of the last two steps; what loading took for a moment
is not in it. On a CPU no allocator keeps memory for itself: glibc's is told to give back what is
freed. On a GPU the parts are as large as Phi-2, computed in bfloat16 as the Trainer does, and
measured is the highest that tensors took of its memory. The last line is JSON.
"""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PhiConfig,
    PhiForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from modeling_phi_mm import PhiMMConfig
from phi_mm.assembly import assemble
from phi_mm.estimate import Rehearsal, Row
from phi_mm.estimate.step import make_batch
from phi_mm.recipes import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
MEBIBYTE = 2**20
SMALL_TOWER = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Case:
    """One way to train."""

    name: str
    tune: str
    checkpointing: bool


@dataclass(frozen=True)
class Size:
    """Parts and batch."""

    width: int
    layers: int
    vocabulary: int
    rows: int
    row: Row


CASES = (
    Case("stage 1", "frozen", True),
    Case("LoRA", "lora", True),
    Case("LoRA, activations kept", "lora", False),
    Case("QLoRA", "qlora", True),
    Case("QLoRA, activations kept", "qlora", False),
    Case("in full", "full", True),
)
SIZE = Size(width=640, layers=8, vocabulary=12_800, rows=4, row=Row(768, 256, 1, 1, 125))
PHI_2 = Size(width=2560, layers=32, vocabulary=51_200, rows=4, row=Row(768, 256, 1, 1, 125))
QUICK = Size(width=256, layers=4, vocabulary=5_120, rows=2, row=Row(512, 128, 1, 1, 125))


def write_parts(size: Size, folder: Path) -> None:
    """A random Phi, CLIP and Whisper; the tokenizer is that of the tiny Phi."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if size == PHI_2 else torch.float32)
    shape = {
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 64,
    }
    PhiForCausalLM(PhiConfig(vocab_size=size.vocabulary, **shape)).save_pretrained(folder / "phi")
    for name in TOKENIZER:
        shutil.copy(ROOT / "checkpoints/tiny-phi" / name, folder / "phi" / name)
    vision = CLIPVisionConfig(**shape | SMALL_TOWER)
    CLIPVisionModel(vision).save_pretrained(folder / "clip")
    CLIPImageProcessorPil().save_pretrained(folder / "clip")
    sides = ("encoder", "decoder")
    heads = {f"{side}_attention_heads": 4 for side in sides}
    layers = {f"{side}_layers": 4 for side in sides} | {f"{side}_ffn_dim": 1024 for side in sides}
    audio = WhisperConfig(d_model=256, max_source_positions=500, **heads, **layers)
    WhisperForConditionalGeneration(audio).save_pretrained(folder / "whisper")
    WhisperFeatureExtractor(chunk_length=10).save_pretrained(folder / "whisper")


def write_recipe(case: Case, gpu: bool, folder: Path) -> Recipe:
    """The recipe of a case, over the parts in `folder`."""
    parts = {"text": "phi", "vision": "clip", "audio": "whisper"}
    dtype = "bfloat16" if gpu else "float32"
    lines = {
        "model": {part: str(folder / name) for part, name in parts.items()} | {"dtype": dtype},
        "data": {"train": "none.json"},
        "tune": {"language_model": case.tune},
        "training": {
            "output_dir": "run",
            "activation_checkpointing": case.checkpointing,
            "use_cpu": not gpu,
        },
    }
    if case.tune in ("lora", "qlora"):
        lines["lora"] = {"r": 32, "lora_alpha": 64, "lora_dropout": 0.05}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(lines))
    return load_recipe(path)


def real_batch(config: PhiMMConfig, size: Size) -> dict[str, torch.Tensor]:
    """What the rehearsal's batch would be with values: placeholders first, answers last."""
    row, rows = size.row, size.rows
    batch = make_batch(config, row, rows, cached=None)
    images = row.images * config.num_image_tokens
    ids = batch["input_ids"]
    ids.fill_(5)
    ids[:, :images] = config.image_token_id
    ids[:, images : images + row.windows * row.sound] = config.audio_token_id
    batch["labels"] = ids.clone()
    batch["labels"][:, : -row.supervised] = -100
    return batch


def measure(case: Case, size: Size, gpu: bool, folder: Path) -> dict[str, float]:
    """MiB predicted and measured; in a fresh process."""
    recipe = write_recipe(case, gpu, folder)
    predicted = Rehearsal(recipe).take(size.rows, size.row).total / MEBIBYTE
    if gpu:
        train(recipe, size, steps=3)
        return {
            "predicted_mib": predicted,
            "measured_mib": torch.cuda.max_memory_allocated() / MEBIBYTE,
        }
    train(recipe, size, steps=1)  # what the libraries load and keep for themselves is there now
    gc.collect()
    before = psutil.Process().memory_info().rss / MEBIBYTE
    train(recipe, size, steps=3)
    return {"predicted_mib": predicted, "measured_mib": highest_mib() - before}


def train(recipe: Recipe, size: Size, steps: int) -> None:
    """Assembles the model and makes steps; from the second on the highest point is counted."""
    device = torch.device("cpu" if recipe.on_cpu else "cuda")
    model, _ = assemble(recipe)
    model.to(device)
    batch = {k: v.to(device) for k, v in real_batch(model.config, size).items()}
    if recipe.training["activation_checkpointing"]:
        model.activation_checkpointing_enable()
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, fused=True)
    for step in range(steps):
        if step == 1:
            forget_highest(device)
        with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def forget_highest(device: torch.device) -> None:
    """The highest point is what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def highest_mib() -> float:
    """The process's resident memory at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (highest,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(highest) / 1024


def run_case(case: Case, options: list[str], folder: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, __file__, "--case", case.name, str(folder)]
    ran = subprocess.run(
        command + options,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    """All cases one after another, a table, and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one recipe and a smaller model, to see that it runs"
    )
    parser.add_argument(
        "--gpu", action="store_true", help="on a GPU, with parts of Phi-2's own size"
    )
    parser.add_argument("--case", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.gpu and not torch.cuda.is_available():
        parser.error("got --gpu, expected a GPU: leave the option out on this machine")
    size = QUICK if given.quick else PHI_2 if given.gpu else SIZE
    if given.case:
        name, folder = given.case
        (case,) = (case for case in CASES if case.name == name)
        print(json.dumps(measure(case, size, given.gpu, Path(folder))))
        return
    options = ["--quick"] * given.quick + ["--gpu"] * given.gpu
    results = []
    with tempfile.TemporaryDirectory() as folder:
        write_parts(size, Path(folder))
        print(f"{'recipe':<28}{'predicted':>12}{'measured':>12}{'error':>9}")
        for case in CASES[1:2] if given.quick else CASES:
            told = run_case(case, options, Path(folder))
            told["error"] = told["predicted_mib"] / told["measured_mib"] - 1
            results.append(asdict(case) | told)
            print(
                f"{case.name:<28}{told['predicted_mib']:>8.0f} MiB{told['measured_mib']:>8.0f} MiB"
                f"{told['error']:>+9.1%}",
                flush=True,
            )
    print(json.dumps({"size": asdict(size), "cases": results}))


if __name__ == "__main__":
    main()
