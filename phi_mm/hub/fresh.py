"""Answers probes with an exported artefact as a stranger would: transformers, and nothing of ours.

python -I phi_mm/hub/fresh.py REQUEST.json, run by `phi_mm.hub.verify` from an empty folder.

REQUEST: {"artefact": folder, "probes": [{"messages", "max_new_tokens"}], "logits": bool,
"out": folder}.
Writes out/answers.json and, where asked for, out/logits.safetensors.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin

OURS = ("modeling_phi_mm", "processing", "phi_mm")


def main() -> None:
    for package in OURS:  # where they are installed, they must not help either
        sys.modules[package] = None
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    artefact, out = request["artefact"], Path(request["out"])
    model = AutoModel.from_pretrained(artefact, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(artefact, trust_remote_code=True)
    results = [respond(model, processor, **probe) for probe in request["probes"]]
    if request["logits"]:
        rows = {str(number): logits for number, (_, logits) in enumerate(results)}
        save_file(rows, out / "logits.safetensors")
    (out / "answers.json").write_text(json.dumps([text for text, _ in results]), encoding="utf-8")


def respond(
    model: PreTrainedModel, processor: ProcessorMixin, messages: list[dict], max_new_tokens: int
) -> tuple[str, torch.Tensor]:
    """The greedy answer to one conversation, and the logits (L, V) of its prompt in float32."""
    if processor.transcript_tokenizer is not None:
        messages = processor.transcribe(messages, model)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    with torch.no_grad():
        logits = model(**inputs).logits[0].float().cpu()
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip(), logits


if __name__ == "__main__":
    main()
