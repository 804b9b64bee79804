"""Ways of adapting an artefact with PEFT: what works and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from modeling_phi_mm import PhiMMForConditionalGeneration, PhiMMModel
from phi_mm.assembly import LORA_TARGETS
from phi_mm.hub import merge
from phi_mm.hub.export import save_artefact
from phi_mm.weights import projectors

SECTION = "Adapt"


def way(name: str):
    return pytest.mark.way(SECTION, name)


def load(case, **settings) -> PreTrainedModel:
    return PhiMMForConditionalGeneration.from_pretrained(case.artefact, **settings).eval()


def inputs_of(case, conversations: list[list[dict]]) -> dict[str, torch.Tensor]:
    _, processor = case.build()
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def logits(model: torch.nn.Module, inputs: dict, **settings) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **settings).logits


def lora(case) -> LoraConfig:
    return LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=LORA_TARGETS[case.family]
    )


def fill(model: torch.nn.Module, seed: int) -> None:
    """Random weights where an adapter begins with zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name or ".modules_to_save." in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)


@pytest.fixture(scope="module")
def adapter(case, tmp_path_factory: pytest.TempPathFactory):
    """Function (seed, with projectors) -> folder of a PEFT adapter for the artefact."""
    folder = tmp_path_factory.mktemp("adapters")

    def make(seed: int, with_projectors: bool = False) -> Path:
        out = folder / f"{seed}-{with_projectors}"
        if not out.exists():
            model, config = load(case), lora(case)
            if with_projectors:
                config.modules_to_save = list(projectors(model))
            adapted = get_peft_model(model, config)
            fill(adapted, seed)
            adapted.save_pretrained(out, save_embedding_layers=False)
        return out

    return make


@way("LoRA targets of a recipe")
def test_lora_names_hold_only_the_language_model(case) -> None:
    model = get_peft_model(load(case), lora(case))
    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert len(names) == 2 * {"phi": 6, "phi3": 4}[case.family]
    assert all(".language_model.layers." in name for name in names)


@way("`PeftModel.from_pretrained`")
def test_peft_model(case, adapter) -> None:
    inputs = inputs_of(case, [case.messages()])
    plain = logits(load(case), inputs)
    adapted = logits(PeftModel.from_pretrained(load(case), adapter(1, True)), inputs)
    again = logits(PeftModel.from_pretrained(load(case), adapter(1, True)), inputs)
    assert (adapted - plain).abs().max() > 1e-2
    assert torch.equal(adapted, again)


@way("`model.load_adapter`, `set_adapter`, `disable_adapters`")
def test_native_integration(case, adapter) -> None:
    inputs = inputs_of(case, [case.messages()])
    model = load(case)
    plain = logits(model, inputs)
    model.load_adapter(str(adapter(1, True)), "first")
    model.load_adapter(str(adapter(2, True)), "second")
    for name, folder in (("second", adapter(2, True)), ("first", adapter(1, True))):
        model.set_adapter(name)
        peft = PeftModel.from_pretrained(load(case), folder)
        torch.testing.assert_close(logits(model, inputs), logits(peft, inputs))
    model.disable_adapters()
    assert torch.equal(logits(model, inputs), plain)


STRANGER = """
import sys
from peft import AutoPeftModelForCausalLM
for name in ("modeling_phi_mm", "processing", "phi_mm"):
    sys.modules[name] = None
import torch
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save(model(**inputs).logits.detach(), sys.argv[3])
"""


@way("`AutoPeftModelForCausalLM`, with and without phi-mm installed")
def test_auto_peft(case, adapter, tmp_path: Path) -> None:
    inputs = dict(inputs_of(case, [case.messages()]))
    installed = logits(AutoPeftModelForCausalLM.from_pretrained(adapter(1, True)).eval(), inputs)
    expected = logits(PeftModel.from_pretrained(load(case), adapter(1, True)), inputs)
    assert torch.equal(installed, expected)
    asked, found = tmp_path / "inputs.pt", tmp_path / "logits.pt"
    torch.save(inputs, asked)
    command = [sys.executable, "-I", "-c", STRANGER, *map(str, (adapter(1, True), asked, found))]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(found, weights_only=True), expected)


@way("several adapters on one base")
def test_several_adapters(case, adapter) -> None:
    inputs = inputs_of(case, [case.messages()])
    model = PeftModel.from_pretrained(load(case), adapter(1), adapter_name="first")
    model.load_adapter(adapter(2), "second")
    answers = {}
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        answers.setdefault(name, []).append(logits(model, inputs))
    assert torch.equal(*answers["first"])
    alone = PeftModel.from_pretrained(load(case), adapter(2))
    torch.testing.assert_close(answers["second"][0], logits(alone, inputs))


@way("hot swap")
def test_hot_swap(case, adapter) -> None:
    inputs = inputs_of(case, [case.messages()])
    model = PeftModel.from_pretrained(load(case), adapter(1))
    hotswap_adapter(model, str(adapter(2)), adapter_name="default")
    alone = PeftModel.from_pretrained(load(case), adapter(2))
    torch.testing.assert_close(logits(model, inputs), logits(alone, inputs))


@way("a batch of several adapters, LoRA only")
def test_mixed_batch(case, adapter) -> None:
    conversations = [case.messages(seed) for seed in range(3)]
    inputs = inputs_of(case, conversations)
    model = PeftModel.from_pretrained(load(case), adapter(1), adapter_name="first")
    model.load_adapter(adapter(2), "second")
    names = ["second", "__base__", "first"]
    mixed = logits(model, inputs, adapter_names=names)
    generated = model.generate(
        **inputs, adapter_names=names, max_new_tokens=4, do_sample=False, use_cache=True
    )
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected, answer = logits(model, inputs), None
        else:
            model.set_adapter(name)
            expected = logits(model, inputs)
            answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[row]
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-4)
        assert answer is None or torch.equal(generated[row], answer)


@way("a batch of several adapters, projectors in `modules_to_save`")
def test_mixed_batch_of_projectors_is_refused(case, adapter, refused) -> None:
    inputs = inputs_of(case, [case.messages(seed) for seed in range(2)])
    model = PeftModel.from_pretrained(load(case), adapter(1, True), adapter_name="first")
    model.load_adapter(adapter(2, True), "second")
    with pytest.raises(ValueError, match="expected one adapter for the whole batch") as raised:
        logits(model, inputs, adapter_names=["first", "second"])
    refused(raised.value)


@way("`phi-mm merge` into a base of 16 bits")
def test_merge(case, adapter, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_artefact(load(case).to(torch.bfloat16), case.build()[1], base)
    answered, difference = merge(str(adapter(1, True)), tmp_path / "merged", base=str(base))
    # bfloat16 keeps 8 bits, and this adapter is as large as the weights that it is added to
    assert 0 < difference <= 0.1
    assert max(row.difference for row in answered) <= 5e-2
    inputs = inputs_of(case, [case.messages()])
    merged = PhiMMForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert merged.dtype == torch.bfloat16
    expected = logits(PeftModel.from_pretrained(load(case), adapter(1, True)), inputs)
    found = logits(merged, inputs)
    assert (found - expected).abs().max() <= 0.1 * expected.abs().max()
    assert (logits(load(case), inputs) - expected).abs().max() > 0.5 * expected.abs().max()


@way("`phi-mm merge` into a base in 4 bits")
def test_merge_into_four_bits_is_refused(case, adapter, tmp_path: Path, refused) -> None:
    save_artefact(load(case, quantization_config=four_bits()), case.build()[1], tmp_path / "base")
    with pytest.raises(ValueError, match="with quantised weights, expected 16 or 32") as raised:
        merge(str(adapter(1)), tmp_path / "merged", base=str(tmp_path / "base"))
    refused(str(raised.value).replace(str(tmp_path / "base"), "BASE"))
    assert not (tmp_path / "merged").exists()


def four_bits() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def by_modality(case) -> PreTrainedModel:
    """The artefact's model with a random LoRA for each of its modalities."""
    model = load(case)
    names = [n for n, there in (("image", case.sees), ("audio", case.hears)) if there]
    model.add_modality_adapters({name: lora(case) for name in names})
    fill(model, 3)
    return model.eval()


def mixture(case) -> list[list[dict]]:
    """Conversations with each part alone, with all of them, and with text alone."""
    *media, question = case.messages()[0]["content"]
    contents = [[question], *([part, question] for part in media), [*media, question]]
    return [[{"role": "user", "content": content}] for content in contents]


@way("adapters by modality: text is the base's, bit by bit")
def test_text_beside_other_modalities(case) -> None:
    inputs = inputs_of(case, mixture(case))
    model, base = by_modality(case), load(case)
    adapted, plain = logits(model, inputs), logits(base, inputs)
    assert torch.equal(adapted[0], plain[0])
    assert all((a - p).abs().max() > 1e-2 for a, p in zip(adapted[1:], plain[1:], strict=True))
    alone = inputs_of(case, mixture(case)[:1])
    assert torch.equal(logits(model, alone), logits(base, alone))


@way("adapters by modality: a batch answers as its rows do alone")
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_use_their_own_adapters(case, beams: int) -> None:
    model, conversations = by_modality(case), mixture(case)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    together = model.generate(**inputs_of(case, conversations), **settings)
    for row, conversation in enumerate(conversations):
        alone = model.generate(**inputs_of(case, [conversation]), **settings)
        assert torch.equal(alone[0, -8:], together[row, -8:]), row


@way("adapters by modality: saved in subfolders, loaded by `AutoModel` alone")
def test_saved_by_modality(case, tmp_path: Path) -> None:
    inputs = inputs_of(case, mixture(case))
    model = by_modality(case)
    save_artefact(model, case.build()[1], tmp_path / "saved")
    loaded = PhiMMForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert not any(weight.requires_grad for weight in loaded.parameters())
    # each is an ordinary PEFT adapter too
    names = [n for n, there in (("image", case.sees), ("audio", case.hears)) if there]
    row = inputs_of(case, mixture(case)[1:2])
    peft = PeftModel.from_pretrained(
        load(case), tmp_path / "saved", subfolder=f"adapters/{names[0]}"
    )
    torch.testing.assert_close(logits(peft, row), logits(loaded, row))


@way("adapters by modality: beside one's own adapter")
def test_own_adapter_beside_those_by_modality(case, adapter) -> None:
    inputs = inputs_of(case, mixture(case)[:1])
    model = by_modality(case)
    by_itself = model.active_adapters()
    model.load_adapter(str(adapter(1)), "own")  # which switches the others off
    model.set_adapter([*by_itself, "own"])
    alone = PeftModel.from_pretrained(load(case), adapter(1))
    torch.testing.assert_close(logits(model, inputs), logits(alone, inputs))


@way("adapters by modality: a cache without `modality_mask`")
def test_cache_without_modality_mask_is_refused(case, refused) -> None:
    model, inputs = by_modality(case), inputs_of(case, [case.messages()])
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
    token = first.logits[:, -1:].argmax(-1)
    mask = model.model.find_modalities(inputs["input_ids"])
    with pytest.raises(ValueError, match="got a cache and no modality_mask") as raised:
        model(input_ids=token, past_key_values=first.past_key_values)
    refused(raised.value)
    with torch.no_grad():
        second = model(
            input_ids=token, past_key_values=first.past_key_values, modality_mask=mask
        ).logits[:, -1]
        whole = dict(inputs) | {
            "input_ids": torch.cat([inputs["input_ids"], token], -1),
            "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long),
        }
        torch.testing.assert_close(second, model(**whole).logits[:, -1], rtol=1e-4, atol=1e-3)


@way("adapters by modality: `PhiMMModel` without its head")
def test_base_model_by_modality_is_refused(case, tmp_path: Path, refused) -> None:
    save_artefact(by_modality(case), case.build()[1], tmp_path / "saved")
    model = PhiMMModel.from_pretrained(tmp_path / "saved").eval()
    with pytest.raises(ValueError, match="load it by PhiMMForConditionalGeneration") as raised:
        model(**inputs_of(case, [case.messages()]))
    refused(raised.value)


@way("adapters by modality: assisted by a small Phi")
def test_assistant_by_modality_is_refused(case, refused) -> None:
    model = by_modality(case)
    assistant = AutoModelForCausalLM.from_config(model.config.text_config)
    with pytest.raises(ValueError, match="got an assistant_model and adapters by") as raised:
        model.generate(**inputs_of(case, [case.messages()]), assistant_model=assistant)
    refused(raised.value)


@way("adapters by modality on a base in 4 bit")
def test_by_modality_in_four_bit(case, tmp_path: Path) -> None:
    save_artefact(by_modality(case), case.build()[1], tmp_path / "saved")
    model = PhiMMForConditionalGeneration.from_pretrained(
        tmp_path / "saved", quantization_config=four_bits()
    ).eval()
    for module in model.modules():
        # bitsandbytes' kernel for CPUs with AVX512-BF16 wants layers of at least 64 columns.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    inputs = inputs_of(case, mixture(case))
    adapted = logits(model, inputs)
    model.disable_adapters()
    plain = logits(model, inputs)
    assert torch.equal(adapted[0], plain[0])
    assert adapted.isfinite().all() and not torch.equal(adapted[1], plain[1])
