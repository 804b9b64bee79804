"""Answers probes with an exported artefact as a stranger would: transformers, and nothing of ours.

python -I phi_mm/hub/fresh.py REQUEST.json, run by `phi_mm.hub.verify` from an empty folder.

REQUEST: {"artefact": folder or repository, "revision": commit or null, "auto_class": name of one,
"base": folder or repository that the artefact is an adapter of, or null, "quantization": how the
adapter's base was quantised, or null, "probes": [{"messages", "max_new_tokens"}], "logits": bool,
"out": folder}. A token for private repositories stands in the environment, HF_TOKEN.
Writes out/answers.json and, where asked for, out/logits.safetensors.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForMultimodalLM,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)

OURS = ("modeling_phi_mm", "processing", "phi_mm")
AUTO_CLASSES = {c.__name__: c for c in (AutoModel, AutoModelForMultimodalLM)}


def main() -> None:
    for package in OURS:  # where they are installed, they must not help either
        sys.modules[package] = None
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    out = Path(request["out"])
    model, processor = load(request)
    results = [respond(model, processor, **probe) for probe in request["probes"]]
    if request["logits"]:
        rows = {str(number): logits for number, (_, logits) in enumerate(results)}
        save_file(rows, out / "logits.safetensors")
    (out / "answers.json").write_text(json.dumps([text for text, _ in results]), encoding="utf-8")


def load(request: dict) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The artefact's model in eval mode, on top of its base where it is an adapter."""
    auto_class = AUTO_CLASSES[request["auto_class"]]
    place = {"revision": request["revision"], "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(request["artefact"], **place)
    if request["base"] is None:
        return auto_class.from_pretrained(request["artefact"], **place).eval(), processor
    settings, quantization = {}, request["quantization"]
    if quantization is not None:
        settings["quantization_config"] = BitsAndBytesConfig(**quantization)
    model = auto_class.from_pretrained(request["base"], trust_remote_code=True, **settings)
    if quantization is not None:
        model = model.dequantize()  # the weights that training saw, in float arithmetic
    from peft import PeftModel  # only adapters need it

    adapted = PeftModel.from_pretrained(model, request["artefact"], revision=request["revision"])
    return adapted.eval(), processor


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
