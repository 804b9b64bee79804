"""A random run, and its artefact as a stranger's process sees it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from phi_mm.checkout import LICENSE
from phi_mm.hub import export
from phi_mm.hub.card import write_card
from phi_mm.hub.export import save_artefact
from phi_mm.hub.verify import Answered
from phi_mm.recipes import load_recipe

ROWS = [
    {"task": "image_qa", "metric": "exact_match", "value": 0.9375, "n": 400, "low": 0.909,
     "high": 0.957, "baseline": 0.38, "control": None},
    {"task": "image_qa", "metric": "exact_match", "value": 0.27, "n": 400, "low": 0.229,
     "high": 0.316, "baseline": 0.38, "control": "blank"},
    {"task": "asr", "metric": "wer", "value": 0.052, "n": 400, "low": 0.041, "high": 0.064,
     "baseline": 1.0, "control": None},
    {"task": "asr_base", "metric": "wer", "value": 0.04, "n": 400, "low": 0.03, "high": 0.05,
     "baseline": 1.0, "control": None},
]  # fmt: skip

# What a stranger does: every Auto class, then saving it all again.
STRANGER = """
import json, sys
from transformers import (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoModelForMultimodalLM, AutoProcessor)
for name in ("modeling_phi_mm", "processing", "phi_mm"):
    sys.modules[name] = None
folder, again = sys.argv[1:]
classes = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
models = [c.from_pretrained(folder, trust_remote_code=True) for c in classes]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
models[0].save_pretrained(again)
processor.save_pretrained(again)
found = [[type(m).__name__, type(m).__module__.split(".")[0]] for m in [*models, processor]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def run(make_phi_mm: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, as full fine-tuning leaves it, of a random model, with measured numbers."""
    folder = tmp_path_factory.mktemp("runs") / "stage2"
    model, processor = make_phi_mm()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"momentum")
    (folder / "metrics.json").write_text(json.dumps(ROWS))
    recipe = {
        "model": {"text": "microsoft/phi-2", "vision": "clip/of-someone", "audio": str(folder)},
        "data": {"train": "rows.json"},
        "tune": {"language_model": "full"},
        "training": {"output_dir": str(folder), "seed": 7},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Answered]]:
    """The run's artefact, written and verified by the exporter, and its answers."""
    out = tmp_path_factory.mktemp("hub") / "artefact"
    return out, export(run, out)


@pytest.fixture(scope="module")
def artefact(run: Path, make_phi_mm: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the exporter writes of the run, in several shards, without its fresh process."""
    folder = tmp_path_factory.mktemp("sharded") / "artefact"
    model, processor = make_phi_mm()
    save_artefact(model, processor, folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    write_card(folder, load_recipe(run / "recipe.yaml"), model, run / "metrics.json")
    shutil.copy(LICENSE, folder / "LICENSE")
    return folder


@pytest.fixture(scope="module")
def stranger(exported: tuple, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """What a process outside the repository loads, and the folder it saves it to again."""
    folder = tmp_path_factory.mktemp("stranger")
    again = folder / "again"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-I", "-c", STRANGER, str(exported[0]), str(again)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return again, json.loads(done.stdout.splitlines()[-1])
