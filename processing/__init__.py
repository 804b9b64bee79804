"""What goes into phi-mm: the processor, the collator, and the chat templates of the Phi family."""

from pathlib import Path

from transformers import AutoProcessor, PreTrainedTokenizerBase

from modeling_phi_mm import PhiMMConfig

from .collator import PhiMMCollator
from .processing_phi_mm import PhiMMProcessor
from .recordings_phi_mm import open_recording

AutoProcessor.register(PhiMMConfig, PhiMMProcessor)


def chat_template_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template (Jinja source) for a tokenizer of the Phi family, told apart by its special
    tokens.
    """
    vocabulary = tokenizer.get_vocab()
    name = "phi" if "<|end|>" not in vocabulary else "phi3" if "<s>" in vocabulary else "phi4"
    return (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")


__all__ = ["PhiMMCollator", "PhiMMProcessor", "chat_template_for", "open_recording"]
