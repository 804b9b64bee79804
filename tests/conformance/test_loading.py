"""Loading by a stranger: what stranger.py, in a process of its own, makes of each artefact."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
)

# Largest difference of logits, over the largest logit; docs/loading.md says what was measured.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1, "load_in_8bit": 2e-1}
REMOTE = "transformers_modules"


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen]:
    """The process, outside the repository and without its packages."""
    folder = tmp_path_factory.mktemp("stranger")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-I", str(Path(__file__).with_name("stranger.py"))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (folder / "words.txt").open("w") as words:
        process = subprocess.Popen(command, cwd=folder, env=env, stderr=words, **pipes)
        yield process
        process.stdin.close()
        process.wait()


@pytest.fixture(scope="session")
def found(case, stranger: subprocess.Popen, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What came of each way of loading this artefact."""
    out = tmp_path_factory.mktemp("visits")
    content = {part["type"]: part for part in case.messages()[0]["content"]}
    request = {"folder": str(case.artefact), "out": str(out), "picture": None, "sound": None}
    if case.sees:
        request["picture"] = str(out / "picture.png")
        Image.fromarray(content["image"]["image"]).save(request["picture"])
    if case.hears:
        request["sound"] = str(out / "sound.wav")
        soundfile.write(request["sound"], content["audio"]["audio"], 16_000, subtype="FLOAT")
    stranger.stdin.write(json.dumps(request) + "\n")
    stranger.stdin.flush()
    answer = stranger.stdout.readline()
    assert answer, "the stranger's process has ended: see words.txt in its folder"
    return json.loads(answer)


def worked(row: dict) -> dict:
    assert "error" not in row, row["error"]
    return row


@pytest.mark.way("Load", "`AutoConfig`")
def test_auto_config(found):
    assert worked(found["auto_config"]) == {
        "class": ["PhiMMConfig", REMOTE],
        "model_type": "phi_mm",
    }


@pytest.mark.way("Load", "`AutoProcessor`")
def test_auto_processor(found):
    assert worked(found["auto_processor"]) == {"class": ["PhiMMProcessor", REMOTE]}


@pytest.mark.way("Load", "`AutoTokenizer`")
def test_auto_tokenizer(found):
    assert worked(found["auto_tokenizer"]) == {"same": True}


@pytest.mark.way("Load", "`AutoImageProcessor`")
def test_auto_image_processor(case, found, refused):
    if case.sees:
        assert worked(found["auto_image_processor"]) == {"same": True}
    else:
        error = found["auto_image_processor"]["error"]
        assert "Can't load image processor" in error
        refused(error)


@pytest.mark.way("Load", "`AutoFeatureExtractor`")
def test_auto_feature_extractor(case, found, refused):
    if case.hears:
        assert worked(found["auto_feature_extractor"]) == {"same": True}
    else:
        error = found["auto_feature_extractor"]["error"]
        assert "Can't load feature extractor" in error
        refused(error)


def check_model_class(case, found: dict, name: str) -> None:
    """It is the model that answers, and answers as the one that was saved."""
    row = worked(found["model_classes"])[name]
    model, processor = case.build()
    inputs = processor.apply_chat_template(
        case.messages(),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert row["class"] == ["PhiMMForConditionalGeneration", REMOTE]
    assert row["answer"] == answer[0, inputs["input_ids"].shape[1] :].tolist()
    assert row["difference"] <= TOLERANCE["float32"]
    loaded = torch.tensor(found["model_classes"]["logits"])
    torch.testing.assert_close(loaded, logits, rtol=0, atol=1e-5 * logits.abs().max().item())


@pytest.mark.way("Load", "`AutoModel`")
def test_auto_model(case, found):
    check_model_class(case, found, "AutoModel")


@pytest.mark.way("Load", "`AutoModelForCausalLM`")
def test_auto_model_for_causal_lm(case, found):
    check_model_class(case, found, "AutoModelForCausalLM")


@pytest.mark.way("Load", "`AutoModelForImageTextToText`")
def test_auto_model_for_image_text_to_text(case, found):
    check_model_class(case, found, "AutoModelForImageTextToText")


@pytest.mark.way("Load", "`AutoModelForMultimodalLM`")
def test_auto_model_for_multimodal_lm(case, found):
    check_model_class(case, found, "AutoModelForMultimodalLM")


@pytest.mark.way("Load", '`pipeline("image-text-to-text")`, with all media that the model takes')
def test_image_text_to_text(case, found):
    [answer] = worked(found["image_text_to_text"])["text"]
    tokens = found["model_classes"]["AutoModel"]["answer"]
    _, processor = case.build()
    assert answer["generated_text"] == processor.decode(tokens, skip_special_tokens=True)


@pytest.mark.way("Load", '`pipeline("any-to-any")`')
def test_any_to_any(found, refused):
    """transformers wants torchvision for it, which phi-mm does not depend on."""
    if importlib.util.find_spec("torchvision") is not None:
        assert worked(found["any_to_any"])["text"]
        return
    error = found["any_to_any"]["error"]
    assert "AnyToAnyPipeline requires the Torchvision library" in error
    refused(error)


@pytest.mark.way("Load", '`pipeline("text-generation")`, text alone')
def test_text_generation(case, found):
    [answer] = worked(found["text_generation"])["text"]
    model, processor = case.build()
    inputs = processor.tokenizer("hello", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, 5:]
    assert answer["generated_text"] == processor.decode(tokens, skip_special_tokens=True)


@pytest.mark.way("Load", "saved again: the same code, the same weights")
def test_saved_again(case, found):
    again = Path(worked(found["saved_again"])["folder"])
    names = {path.name for path in again.iterdir()}
    assert names == {path.name for path in case.artefact.iterdir()} - {"LICENSE"}
    code = [name for name in names if name.endswith((".py", ".jinja"))]
    assert len(code) == 14
    for name in code:
        assert (again / name).read_bytes() == (case.artefact / name).read_bytes(), name
    weights, saved = (load_file(folder / "model.safetensors") for folder in (case.artefact, again))
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in weights)


@pytest.mark.way("Load", "phi-mm installed, without `trust_remote_code`")
def test_no_trust_is_needed_where_phi_mm_is_installed(case, monkeypatch):
    monkeypatch.setattr("builtins.input", None)  # whoever asks fails
    loaders = [AutoModel, AutoProcessor, AutoTokenizer]
    loaders += [AutoImageProcessor] * case.sees + [AutoFeatureExtractor] * case.hears
    modules = [type(c.from_pretrained(case.artefact)).__module__.split(".")[0] for c in loaders]
    assert modules == ["modeling_phi_mm", "processing"] + ["transformers"] * (len(loaders) - 2)


@pytest.mark.way("Load", "a stranger without `trust_remote_code`")
def test_trust_is_asked_for(found, refused):
    error = found["without_trust"]["error"]
    assert "Please pass the argument `trust_remote_code=True`" in error
    refused(error)


def check_dtype(found: dict, name: str) -> None:
    row = worked(found["dtypes"])[name]
    assert row["dtypes"] == [name]
    assert row["difference"] <= TOLERANCE[name]
    assert row["wrong_buffers"] == []


@pytest.mark.way("Load", '`dtype="float32"`')
def test_float32(found):
    check_dtype(found, "float32")


@pytest.mark.way("Load", '`dtype="bfloat16"`')
def test_bfloat16(found):
    check_dtype(found, "bfloat16")


@pytest.mark.way("Load", '`dtype="float16"`')
def test_float16(found):
    check_dtype(found, "float16")


@pytest.mark.way("Load", "`.to(torch.bfloat16)` after loading")
def test_moved_to_bfloat16(found):
    assert worked(found["dtypes"])["moved to bfloat16"] == {"wrong_buffers": []}


@pytest.mark.way("Load", '`device_map="auto"`')
def test_device_map(found):
    row = worked(found["device_map"])
    assert row["devices"] == ["cuda" if torch.cuda.is_available() else "cpu"]
    assert row["difference"] <= TOLERANCE["float32"]


def check_attention(case, found: dict, name: str, chosen: tuple[str, str, str]) -> None:
    """The language model takes the guarded form of what it was given, the towers the plain one."""
    row = worked(found["attention"])[name]
    parts = {"text_config": f"phi_mm_{chosen[0]}"}
    parts |= {"vision_config": chosen[1]} if case.sees else {}
    parts |= {"audio_config": chosen[2]} if case.hears else {}
    assert row["chosen"] == parts
    assert row["difference"] <= TOLERANCE["float32"]


@pytest.mark.way("Load", '`attn_implementation="eager"`')
def test_eager(case, found):
    check_attention(case, found, "eager", ("eager", "eager", "eager"))


@pytest.mark.way("Load", '`attn_implementation="sdpa"`')
def test_sdpa(case, found):
    check_attention(case, found, "sdpa", ("sdpa", "sdpa", "sdpa"))


@pytest.mark.way("Load", "`attn_implementation` of each part, at loading and later")
def test_attention_by_part(case, found):
    check_attention(case, found, "by part", ("eager", "sdpa", "eager"))
    check_attention(case, found, "by part, later", ("eager", "sdpa", "eager"))


@pytest.mark.way("Load", "with little memory: built on meta, then filled")
def test_empty_weights(found):
    row = worked(found["empty_weights"])
    assert row.pop("difference") <= TOLERANCE["float32"]
    assert row == {"devices before": ["meta"], "wrong_buffers": []}


def check_quantised(case, found: dict, name: str, kind: str) -> dict:
    """Only layers of the language model are quantised, and nobody had to say so."""
    row = worked(found["quantised"])[name]
    kinds = {"language_model": [kind], "lm_head": ["Linear"]}
    kinds |= dict.fromkeys(
        ["vision_tower", "multi_modal_projector"] if case.sees else [], ["Linear"]
    )
    kinds |= dict.fromkeys(["audio_tower", "audio_projector"] if case.hears else [], ["Linear"])
    assert row["kinds"] == kinds
    return row


@pytest.mark.way("Load", "`BitsAndBytesConfig(load_in_8bit=True)`")
def test_8_bit(case, found):
    row = check_quantised(case, found, "load_in_8bit", "Linear8bitLt")
    assert row["difference"] <= TOLERANCE["load_in_8bit"]


@pytest.mark.way("Load", "`BitsAndBytesConfig(load_in_4bit=True)`")
def test_4_bit(case, found):
    """Random weights do not survive 4 bits, so it is held to the weights that it has left;
    tests/hub/test_loading.py holds trained ones to those that were quantised.
    """
    row = check_quantised(case, found, "load_in_4bit", "Linear4bit")
    assert row["off its own weights"] <= TOLERANCE["float32"]
    assert row["difference"] < 2  # and finite


@pytest.mark.way("Load", "pickled weights (`pytorch_model.bin`)")
def test_pickles_are_refused(found, refused):
    error = found["pickled"]["error"]
    assert error.startswith("ValueError: got pytorch_model.bin, expected weights in safetensors")
    refused(error)


@pytest.mark.way("Load", "`use_safetensors=False`")
def test_asking_for_pickles_is_refused(found, refused):
    error = found["asked_for_pickle"]["error"]
    assert error.startswith("ValueError: got use_safetensors=False, expected weights in safetens")
    refused(error)
