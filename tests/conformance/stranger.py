"""What a process with transformers, and nothing of this project, makes of an artefact.

`python -I tests/conformance/stranger.py` reads requests, one JSON object a line, and answers each
with one: for every way of loading, what came of it, or the error that it ended with. One process
takes all artefacts, since starting it costs more than a visit.
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
    pipeline,
)
from transformers.audio_utils import load_audio

OURS = ("modeling_phi_mm", "processing", "phi_mm")
MODEL_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
PARTS = {"text_config": "language_model", "vision_config": "vision_tower"}
PARTS["audio_config"] = "audio_tower"
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@dataclass(frozen=True)
class Visit:
    """An artefact, a question to it, and what it says when it is loaded in the plainest way."""

    folder: Path
    out: Path
    messages: list[dict]
    picture: str | None
    sound: str | None
    processor: ProcessorMixin
    inputs: BatchFeature
    logits: torch.Tensor
    buffers: dict[str, torch.Tensor]

    def load(self, loader: type = AutoModel, folder: Path | None = None, **options):
        return loader.from_pretrained(folder or self.folder, trust_remote_code=True, **options)

    def ask(self, model: PreTrainedModel) -> torch.Tensor:
        """The logits (1, L, V) of the question."""
        with torch.no_grad():
            return model(**self.inputs.to(model.device)).logits.float().cpu()

    def difference(self, model: PreTrainedModel, reference: torch.Tensor | None = None) -> float:
        """How far its logits are off, over the largest logit; NaN where they are not finite."""
        reference = self.logits if reference is None else reference
        return ((self.ask(model) - reference).abs().max() / reference.abs().max()).item()

    def wrong_buffers(self, model: PreTrainedModel) -> list[str]:
        """Names of buffers that no checkpoint holds and that are not as a new model has them."""
        found = {name: value.cpu() for name, value in model.named_buffers()}
        assert found.keys() == self.buffers.keys()
        return [name for name, value in found.items() if not torch.equal(value, self.buffers[name])]


def named(thing: object) -> list[str]:
    return [type(thing).__name__, type(thing).__module__.split(".")[0]]


def auto_config(visit: Visit) -> dict:
    config = visit.load(AutoConfig)
    return {"class": named(config), "model_type": config.model_type}


def auto_processor(visit: Visit) -> dict:
    return {"class": named(visit.load(AutoProcessor))}


def auto_tokenizer(visit: Visit) -> dict:
    tokenizer = visit.load(AutoTokenizer)
    text = visit.processor.tokenizer.decode(visit.inputs["input_ids"][0])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return {"same": ids == visit.inputs["input_ids"][0].tolist()}


def auto_image_processor(visit: Visit) -> dict:
    processor = visit.load(AutoImageProcessor)
    pixels = processor(Image.open(visit.picture), return_tensors="pt")
    return {"same": torch.equal(pixels["pixel_values"], visit.inputs["pixel_values"])}


def auto_feature_extractor(visit: Visit) -> dict:
    extractor = visit.load(AutoFeatureExtractor)
    samples = load_audio(visit.sound, sampling_rate=16_000, backend="soundfile")
    mel = extractor(samples, sampling_rate=16_000, return_tensors="pt")
    return {"same": torch.equal(mel["input_features"], visit.inputs["input_features"])}


def model_classes(visit: Visit) -> dict:
    found = {}
    for loader in MODEL_CLASSES:
        model = visit.load(loader)
        answer = model.generate(**visit.inputs, **GREEDY)[0, visit.inputs["input_ids"].shape[1] :]
        row = {"class": named(model), "answer": answer.tolist()}
        found[loader.__name__] = row | {"difference": visit.difference(model)}
    return found | {"logits": visit.logits[0, -1].tolist()}


def image_text_to_text(visit: Visit) -> dict:
    pipe = pipeline("image-text-to-text", model=str(visit.folder), trust_remote_code=True)
    return {"text": pipe(text=visit.messages, generate_kwargs=GREEDY, return_full_text=False)}


def any_to_any(visit: Visit) -> dict:
    pipe = pipeline("any-to-any", model=str(visit.folder), trust_remote_code=True)
    return {"text": pipe(text=visit.messages, generate_kwargs=GREEDY, return_full_text=False)}


def text_generation(visit: Visit) -> dict:
    pipe = pipeline("text-generation", model=str(visit.folder), trust_remote_code=True)
    return {"text": pipe("hello", return_full_text=False, **GREEDY)}


def saved_again(visit: Visit) -> dict:
    visit.load().save_pretrained(visit.out / "again")
    visit.processor.save_pretrained(visit.out / "again")
    return {"folder": str(visit.out / "again")}


def dtypes(visit: Visit) -> dict:
    found = {}
    for name in ("float32", "bfloat16", "float16"):
        model = visit.load(dtype=name)
        kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in model.parameters()})
        found[name] = {"dtypes": kinds, "difference": visit.difference(model)}
        found[name]["wrong_buffers"] = visit.wrong_buffers(model)
    moved = visit.wrong_buffers(visit.load().to(torch.bfloat16))
    return found | {"moved to bfloat16": {"wrong_buffers": moved}}


def device_map(visit: Visit) -> dict:
    model = visit.load(device_map="auto")
    devices = sorted({weight.device.type for weight in model.parameters()})
    return {"devices": devices, "difference": visit.difference(model)}


def attention(visit: Visit) -> dict:
    """Each choice at loading, and the last one made later, with what every part was given."""
    mixed = {"text_config": "eager", "vision_config": "sdpa", "audio_config": "eager"}
    later = visit.load()
    later.set_attn_implementation(mixed)
    models = {name: visit.load(attn_implementation=name) for name in ("eager", "sdpa")}
    models |= {"by part": visit.load(attn_implementation=mixed), "by part, later": later}
    found = {}
    for name, model in models.items():
        parts = {key: getattr(model.model, part) for key, part in PARTS.items()}
        chosen = {k: p.config._attn_implementation for k, p in parts.items() if p is not None}
        found[name] = {"chosen": chosen, "difference": visit.difference(model)}
    return found


def empty_weights(visit: Visit) -> dict:
    """A model without storage, filled from the file: what tools for small machines do."""
    with init_empty_weights():
        model = AutoModel.from_config(visit.load(AutoConfig), trust_remote_code=True)
    devices = sorted({weight.device.type for weight in model.parameters()})
    weights = str(visit.folder / "model.safetensors")
    model = load_checkpoint_and_dispatch(model, weights, device_map={"": "cpu"}).eval()
    return {"devices before": devices, "difference": visit.difference(model)} | {
        "wrong_buffers": visit.wrong_buffers(model)
    }


def quantised(visit: Visit) -> dict:
    """Plain settings, as a user types them, who knows nothing of towers."""
    found = {}
    for name in ("load_in_4bit", "load_in_8bit"):
        model = visit.load(quantization_config=BitsAndBytesConfig(**{name: True}))
        kinds: dict[str, set[str]] = {}
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                part = path.removeprefix("model.").split(".")[0]
                kinds.setdefault(part, set()).add(type(module).__name__)
            if type(module).__name__ == "Linear4bit":
                # The kernel for AVX512 needs layers of 64 and more, and these models have 32.
                module.support_avx512bf16_for_cpu = False
        logits = visit.ask(model)
        found[name] = {
            "kinds": {part: sorted(names) for part, names in kinds.items()},
            "difference": visit.difference(model),
            "off its own weights": visit.difference(model.dequantize(), logits),
        }
    return found


def pickled(visit: Visit) -> dict:
    folder = visit.out / "pickled"
    shutil.copytree(visit.folder, folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return {"class": named(visit.load(folder=folder))}


def asked_for_pickle(visit: Visit) -> dict:
    return {"class": named(visit.load(use_safetensors=False))}


def without_trust(visit: Visit) -> dict:
    return {"class": named(AutoModel.from_pretrained(visit.folder, trust_remote_code=False))}


WAYS = (
    auto_config,
    auto_processor,
    auto_tokenizer,
    auto_image_processor,
    auto_feature_extractor,
    model_classes,
    image_text_to_text,
    any_to_any,
    text_generation,
    saved_again,
    dtypes,
    device_map,
    attention,
    empty_weights,
    quantised,
    pickled,
    asked_for_pickle,
    without_trust,
)


def arrive(folder: str, out: str, picture: str | None, sound: str | None) -> Visit:
    content = [{"type": "image", "image": picture}] if picture else []
    content += [{"type": "audio", "audio": sound}] if sound else []
    content += [{"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": content}]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    fresh = AutoModel.from_config(model.config, trust_remote_code=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    buffers = dict(fresh.named_buffers())
    paths = (Path(folder), Path(out))
    return Visit(*paths, messages, picture, sound, processor, inputs, logits, buffers)


def main() -> None:
    for package in OURS:  # where they are installed, they must not help
        sys.modules[package] = None
    for line in sys.stdin:
        visit, found = arrive(**json.loads(line)), {}
        for way in WAYS:
            try:
                found[way.__name__] = way(visit)
            except Exception as error:  # whatever it is, it is this way's result
                found[way.__name__] = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
