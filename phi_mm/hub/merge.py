"""An adapter and the artefact that it was trained on become one artefact.

phi-mm merge ADAPTER OUT [--base BASE]
"""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PreTrainedModel

from modeling_phi_mm import PhiMMForConditionalGeneration
from phi_mm.hub.export import save_artefact, written_whole
from phi_mm.hub.fresh import respond
from phi_mm.hub.probes import Probe, make_probes
from phi_mm.hub.verify import Answered, verify
from processing import PhiMMProcessor

logger = logging.getLogger(__name__)


def merge(adapter: str, out: Path, base: str | None = None) -> tuple[list[Answered], float]:
    """Writes a verified artefact in which the adapter's LoRA is inside the weights.

    Args:
        adapter: folder or Hub id of a PEFT adapter for a phi-mm artefact.
        out: a folder that does not exist yet.
        base: folder or Hub id of that artefact; by default the one that the adapter names.

    Returns:
        The probes with the new artefact's answers, and the largest difference of logits that
        merging made, as a share of the largest logit.

    Raises:
        ValueError: `out` exists, the adapter names no base, or the base cannot take it: it is
            quantised, or has adapters by modality.
    """
    named = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    base = base or named
    if not base:
        raise ValueError(f"got {adapter}, which names no base model: give --base")
    _check_base(base)
    model = PhiMMForConditionalGeneration.from_pretrained(base, dtype="auto").eval()
    processor = PhiMMProcessor.from_pretrained(base)
    with written_whole(out) as part, TemporaryDirectory(prefix="phi-mm-merge-") as media:
        probes = make_probes(Path(media), processor)
        adapted = PeftModel.from_pretrained(model, adapter).eval()
        before = _logits(adapted, processor, probes)
        model = adapted.merge_and_unload(safe_merge=True)
        after = _logits(model, processor, probes)
        difference = max(_distance(*pair) for pair in zip(before, after, strict=True))
        logger.info("merged: logits differ from the adapter's by at most %.2e", difference)
        save_artefact(model, processor, part)
        _write_card(part, adapter, base)
        return verify(part, processor, model), difference


def _check_base(base: str) -> None:
    config = AutoConfig.from_pretrained(base)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"got {base} with quantised weights, expected 16 or 32 bit: rounding after merging "
            "would take much of the adapter away again; merge into the artefact that it was "
            "quantised from, and quantise the result when loading it"
        )
    if config.modality_adapters:
        raise ValueError(
            f"got {base} with adapters by modality, expected none: what is merged into its weights "
            "would change the answers to text; load the adapter beside them instead"
        )


def _logits(
    model: PreTrainedModel | PeftModel, processor: PhiMMProcessor, probes: list[Probe]
) -> list[torch.Tensor]:
    return [respond(model, processor, probe.messages, 1)[1] for probe in probes]


def _distance(before: torch.Tensor, after: torch.Tensor) -> float:
    return ((after - before).abs().max() / before.abs().max()).item()


def _write_card(folder: Path, adapter: str, base: str) -> None:
    """The adapter's card, or its base's: what was measured with the adapter holds merged too."""
    for source in (adapter, base):
        try:
            path = Path(source, "README.md")
            card = ModelCard.load(path if Path(source).exists() else source)
        except (FileNotFoundError, EntryNotFoundError):
            continue
        if not Path(base).exists():
            card.data.base_model, card.data.base_model_relation = base, "finetune"
        card.save(folder / "README.md")
        return
