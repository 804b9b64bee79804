"""Proof that an artefact stands alone: a fresh process outside the repository loads and asks it.

phi-mm verify DIR [--run RUN]
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from phi_mm.hub import fresh
from phi_mm.hub.probes import Probe, make_probes
from processing import PhiMMProcessor

logger = logging.getLogger(__name__)

# Largest difference of logits, as a share of the largest logit: the same weights and the same code
# leave only another order of summation.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Source:
    """What a fresh process loads, and from where.

    Args:
        artefact: an exported folder, or a repository of the Hub.
        revision: a commit or branch of that repository.
        auto_class: the Auto class that gives a model that generates.
        base: for an adapter, the folder or repository of the model that it adapts.
        quantization: for an adapter trained in 4-bit, the arguments of BitsAndBytesConfig.
        token: for private repositories; it reaches the process in its environment alone.
    """

    artefact: Path | str
    revision: str | None = None
    auto_class: str = "AutoModel"
    base: str | None = None
    quantization: dict | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def asks_the_hub(self) -> bool:
        return isinstance(self.artefact, str) or self.base is not None


@dataclass(frozen=True)
class Answered:
    """A probe, the artefact's answer, and how far its logits are off (None: not compared)."""

    probe: Probe
    answer: str
    difference: float | None


def verify(
    artefact: Path | Source, processor: PhiMMProcessor, model: PreTrainedModel | None = None
) -> list[Answered]:
    """Has a fresh process answer the probes with the artefact, and compares logits with `model`.

    Args:
        artefact: an exported folder, or a source that says where the artefact is.
        processor: says which probes can be asked, and feeds `model`.
        model: the trained model in this process; None compares nothing.

    Raises:
        ValueError: when the artefact does not load or answer by itself, or its logits are further
            off than TOLERANCE allows; the message gives the difference.
    """
    with tempfile.TemporaryDirectory(prefix="phi-mm-verify-") as folder:
        probes = make_probes(Path(folder), processor)
        answers, logits = ask_fresh(artefact, probes, Path(folder), logits=True)
        differences: list[float | None] = [None] * len(probes)
        if model is not None:
            differences = [
                compare(probe, model, processor, found)
                for probe, found in zip(probes, logits, strict=True)
            ]
    return [Answered(*row) for row in zip(probes, answers, differences, strict=True)]


def ask_fresh(
    artefact: Path | Source, probes: list[Probe], folder: Path, logits: bool = False
) -> tuple[list[str], list[torch.Tensor]]:
    """Answers of a fresh process that has the artefact, transformers, and nothing of this project.

    Args:
        artefact: an exported folder, or a source; what comes from the Hub is downloaded into an
            empty cache inside `folder`.
        probes: conversations; their media are files.
        folder: an empty place outside the repository to work in.
        logits: also return those of each prompt, (L, V).

    Raises:
        ValueError: with the process's own last words, when it fails.
    """
    source = artefact if isinstance(artefact, Source) else Source(artefact)
    request = asdict(source) | {"logits": logits, "out": str(folder)}
    del request["token"]
    if isinstance(source.artefact, Path):
        request["artefact"] = str(source.artefact.resolve())
    request["probes"] = [
        {key: value for key, value in asdict(probe).items() if key != "name"} for probe in probes
    ]
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    # -I: neither PYTHONPATH nor the current folder; what is installed is shut out by fresh.py.
    command = [sys.executable, "-I", fresh.__file__, str(folder / "request.json")]
    done = subprocess.run(
        command, cwd=folder, env=_environment(source, folder), capture_output=True, text=True
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()[-15:]
        raise ValueError(
            f"{source.artefact} does not load and answer in a fresh process:\n" + "\n".join(words)
        )
    answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    if not logits:
        return answers, []
    rows = load_file(folder / "logits.safetensors")
    return answers, [rows[str(number)] for number in range(len(probes))]


def _environment(source: Source, folder: Path) -> dict[str, str]:
    """This process's environment, with empty caches, and the Hub and a token only where needed."""
    alone = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules")}
    caches = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE")
    dropped = (*caches, "HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    if not source.asks_the_hub:
        alone["HF_HUB_OFFLINE"] = "1"
    elif source.token is not None:
        alone["HF_TOKEN"] = source.token
    return kept | alone


def compare(
    probe: Probe, model: PreTrainedModel, processor: PhiMMProcessor, found: torch.Tensor
) -> float:
    """How far the artefact's logits are from the model's, over the largest logit.

    Args:
        probe: what was asked.
        model, processor: of this process.
        found: the artefact's logits of the prompt, (L, V).

    Raises:
        ValueError: where that is more than TOLERANCE; the message gives the difference.
    """
    _, expected = fresh.respond(model, processor, probe.messages, probe.max_new_tokens)
    if expected.shape != found.shape:
        raise ValueError(
            f"probe {probe.name!r}: the artefact's logits are {tuple(found.shape)}, expected "
            f"{tuple(expected.shape)}: its processor differs from the run's"
        )
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    allowed = TOLERANCE[model.dtype]
    if not difference <= allowed:
        raise ValueError(
            f"probe {probe.name!r}: the artefact's logits differ from the run's by "
            f"{difference:.2e} of the largest, expected at most {allowed:.0e} in {model.dtype}: "
            "it is not what was trained"
        )
    logger.info("probe %r: logits within %.2e of the largest", probe.name, difference)
    return difference
