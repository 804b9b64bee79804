"""Ways of pushing to the Hub: to a small one on the loopback.

The fresh processes by which `phi-mm push` proves itself are tried in tests/hub. Here its checks and
its upload are the same, and what comes back is loaded in this process.
"""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from loopback import LoopbackHub
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForMultimodalLM, PreTrainedModel

from modeling_phi_mm import PhiMMForConditionalGeneration
from phi_mm.assembly import LORA_TARGETS
from phi_mm.checkout import LICENSE
from phi_mm.hub.adapter import write_adapter
from phi_mm.hub.card import write_card
from phi_mm.hub.destination import check_destination, find_model
from phi_mm.hub.export import drop_origin, register_code
from phi_mm.hub.folder import check_folder
from phi_mm.hub.push import Destination, push, upload
from phi_mm.hub.vllm import check_vllm, write_vllm_config
from phi_mm.recipes import load_recipe
from phi_mm.training import PhiMMTrainer
from phi_mm.weights import projectors
from processing import PhiMMProcessor

way = pytest.mark.way


@pytest.fixture
def user(login: Callable, loopback: LoopbackHub) -> str:
    """Somebody who is logged in, by name."""
    login(loopback.token("ann"))
    return "ann"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits for a second before it tries again what was cut."""
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def run(case, tmp_path: Path) -> Path:
    """A run folder of the case with nothing but its recipe."""
    return write_recipe(case, tmp_path / "run", "full")


def write_recipe(case, folder: Path, tune: str) -> Path:
    folder.mkdir()
    towers = {"vision": "openai/clip-vit-large-patch14-336"} if case.sees else {}
    towers |= {"audio": "openai/whisper-small"} if case.hears else {}
    recipe = {
        "model": {"text": "microsoft/phi-2", **towers},
        "data": {"train": "someone/rows"},
        "tune": {"language_model": tune},
        "training": {"output_dir": str(folder)},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def folder(case, run: Path, tmp_path: Path) -> Path:
    """The case's artefact with card and licence, as `phi-mm export` leaves it."""
    folder = Path(shutil.copytree(case.artefact, tmp_path / "artefact"))
    write_card(folder, load_recipe(run / "recipe.yaml"), case.build()[0], run / "metrics.json")
    shutil.copy(LICENSE, folder / "LICENSE")
    return folder


def pushed(folder: Path, name: str, **settings: object) -> tuple[str, str]:
    """Repository and commit, after all checks of `phi-mm push`."""
    check_folder(folder)
    repo = check_destination(name, settings.get("private", False))
    return repo, upload(folder, Destination(repo, **settings))[0]


def logits(case, model: PreTrainedModel, processor: PhiMMProcessor) -> torch.Tensor:
    inputs = processor.apply_chat_template(
        case.messages(), tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model.eval()(**inputs).logits


def assert_answers_alike(case, repo: str, **place: object) -> None:
    """What the Hub has is byte for byte and number for number the artefact of the case."""
    snapshot = Path(snapshot_download(repo, **place))
    names = {path.name for path in case.artefact.iterdir()}
    assert {path.name for path in snapshot.iterdir()} - names <= {
        "LICENSE",
        "README.md",
        ".gitattributes",
    }
    for name in names:
        assert (snapshot / name).read_bytes() == (case.artefact / name).read_bytes(), name
    again = AutoModelForMultimodalLM.from_pretrained(repo, trust_remote_code=True, **place)
    processor = PhiMMProcessor.from_pretrained(repo, **place)
    assert torch.equal(logits(case, again, processor), logits(case, *case.build()))


@way("Push", "`phi-mm push`, public")
def test_public(case, folder: Path, user: str, login: Callable) -> None:
    repo, _ = pushed(folder, f"public-{case.artefact.name}")
    login(None)
    assert_answers_alike(case, repo)


@way("Push", "`--private`, loaded with a token")
def test_private_with_a_token(case, folder: Path, user: str, loopback: LoopbackHub) -> None:
    repo, _ = pushed(folder, f"private-{case.artefact.name}", private=True)
    assert loopback.repositories[repo].private
    assert_answers_alike(case, repo)


@way("Push", "`--private`, loaded without a token")
def test_private_without_a_token(
    case, folder: Path, user: str, login: Callable, refused: Callable
) -> None:
    repo, _ = pushed(folder, f"hidden-{case.artefact.name}", private=True)
    login(None)
    with pytest.raises(HfHubHTTPError, match="Invalid username or password") as error:
        snapshot_download(repo)
    assert error.value.response.status_code == 401
    refused("401: Invalid username or password.")


@way("Push", "`--private`, where a public repository is")
def test_private_where_it_is_public(case, folder: Path, user: str, refused: Callable) -> None:
    name = f"open-{case.artefact.name}"
    pushed(folder, name)
    with pytest.raises(ValueError, match="exists and is public, for a private repository") as error:
        push(folder, Destination(name, private=True))
    refused(error.value)


@way("Push", "without a token")
def test_nobody(case, folder: Path, login: Callable, refused: Callable) -> None:
    login(None)
    with pytest.raises(ValueError, match="got no access token for x: run `hf auth login`") as error:
        push(folder, Destination("x"))
    refused(error.value)


@way("Push", "with a token that may only read")
def test_reader(
    case, folder: Path, login: Callable, loopback: LoopbackHub, refused: Callable
) -> None:
    login(loopback.token("ann", role="read"))
    with pytest.raises(ValueError, match="token of ann that may only read, expected one") as error:
        push(folder, Destination("x"))
    refused(error.value)


@way("Push", "`--revision`, loaded at the branch and at the commit")
def test_at_a_revision(case, folder: Path, user: str, loopback: LoopbackHub) -> None:
    repo, commit = pushed(folder, f"branch-{case.artefact.name}", branch="v1/trial")
    assert loopback.files(repo, "main") == {}
    assert_answers_alike(case, repo, revision="v1/trial")
    assert_answers_alike(case, repo, revision=commit)


@way("Push", "adapters by modality, loaded by `AutoModel` alone at a commit")
def test_adapters_by_modality(case, folder: Path, user: str, login: Callable) -> None:
    model, processor = case.build()
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=LORA_TARGETS[case.family])
    names = ["image"] * case.sees + ["audio"] * case.hears
    model.add_modality_adapters({name: copy.deepcopy(config) for name in names})
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    register_code(model, processor)
    model.save_pretrained(folder)
    drop_origin(folder)
    repo, commit = pushed(folder, f"apart-{case.artefact.name}")
    login(None)
    again = AutoModel.from_pretrained(repo, revision=commit, trust_remote_code=True)
    assert torch.equal(logits(case, again, processor), logits(case, model, processor))
    assert not torch.equal(logits(case, again, processor), logits(case, *case.build()))


@way("Push", "`--for-vllm`")
def test_for_vllm(case, folder: Path, user: str) -> None:
    write_vllm_config(folder)
    check_vllm(folder)
    repo, _ = pushed(folder, f"vllm-{case.artefact.name}")
    snapshot = Path(snapshot_download(repo))
    check_vllm(snapshot)
    auto_map = json.loads((snapshot / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_phi_mm.PhiMMModel"
    again = PhiMMForConditionalGeneration.from_pretrained(snapshot)
    processor = PhiMMProcessor.from_pretrained(snapshot)
    assert torch.equal(logits(case, again, processor), logits(case, *case.build()))


@way("Push", "`--for-vllm`, with AutoModel left to the whole model")
def test_for_vllm_by_hand(case, folder: Path, refused: Callable) -> None:
    with pytest.raises(ValueError, match="auto_map.AutoModel is .* expected .*PhiMMModel") as error:
        check_vllm(folder)
    refused(str(error.value).replace(str(folder), "DIR"))


@way("Push", "`--adapter-only --base REPO`")
def test_adapter_only(case, folder: Path, user: str, tmp_path: Path) -> None:
    base, _ = pushed(folder, f"base-{case.artefact.name}")
    adapted, processor, run = adapted_run(case, tmp_path / "lora")
    assert find_model(base, "--base").private is False
    write_adapter(run, tmp_path / "adapter", base, processor)
    repo, _ = pushed(tmp_path / "adapter", f"adapter-{case.artefact.name}")
    expected = logits(case, adapted, processor)
    whole = AutoModelForMultimodalLM.from_pretrained(base)
    again = PeftModel.from_pretrained(whole, repo)
    found = logits(case, again, PhiMMProcessor.from_pretrained(repo))
    assert torch.equal(found, expected)
    assert not torch.equal(found, logits(case, *case.build()))


@way("Push", "`--adapter-only` of a run without LoRA")
def test_adapter_of_none(case, run: Path, tmp_path: Path, refused: Callable) -> None:
    with pytest.raises(ValueError, match="expected a finished run of lora or qlora") as error:
        write_adapter(run, tmp_path / "adapter", "a/b", case.build()[1])
    refused(str(error.value).replace(str(run), "RUN"))


def adapted_run(case, run: Path) -> tuple[PeftModel, PhiMMProcessor, Path]:
    """A run folder with a random LoRA and projectors that are not the base's."""
    write_recipe(case, run, "lora")
    model, processor = case.build()
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        init_lora_weights=False,
        target_modules=LORA_TARGETS[case.family],
        modules_to_save=list(projectors(model)),
    )
    adapted = get_peft_model(model, settings)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name:
                weight *= 1.5
    adapted.save_pretrained(run, save_embedding_layers=False)
    processor.save_pretrained(run)
    return adapted, processor, run


@way("Push", "a folder with optimizer state")
def test_optimizer_state(case, folder: Path, user: str, refused: Callable) -> None:
    (folder / "optimizer.pt").write_bytes(b"momentum")
    with pytest.raises(ValueError, match="got optimizer.pt in .*, expected nothing but") as error:
        push(folder, Destination("x"))
    refused(str(error.value).replace(str(folder), "DIR"))


@way("Push", "again, after a cut upload")
def test_after_a_cut_upload(
    case, folder: Path, user: str, loopback: LoopbackHub, impatient: None
) -> None:
    name, content = f"cut-{case.artefact.name}", (folder / "model.safetensors").read_bytes()
    oid = hashlib.sha256(content).hexdigest()
    loopback.blobs.pop(f"lfs:{oid}", None)  # the other rows have brought it already
    before = loopback.received[oid]
    loopback.cut_upload(content, after=before + len(content) // 2)
    with pytest.raises(ValueError, match="the same command goes on where it was"):
        pushed(folder, name)
    assert loopback.files(f"ann/{name}") == {}
    assert loopback.received[oid] - before == len(content) // 2
    pushed(folder, name)
    pushed(folder, f"{name}-again")
    assert loopback.received[oid] - before == len(content) // 2 + len(content)
    assert_answers_alike(case, f"ann/{name}")


@way("Push", "after a cut download")
def test_after_a_cut_download(
    case,
    folder: Path,
    user: str,
    loopback: LoopbackHub,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what survives a cut, of 10 MB
    repo, _ = pushed(folder, f"torn-{case.artefact.name}")
    content = (folder / "model.safetensors").read_bytes()
    oid = hashlib.sha256(content).hexdigest()
    before = loopback.sent[oid]
    loopback.cut_download(content, after=5500)
    assert_answers_alike(case, repo)
    assert loopback.sent[oid] - before == 500 + len(content)


@way("Push", "the Trainer's `push_to_hub`, the whole model")
def test_the_trainer_pushes(case, run: Path, user: str, loopback: LoopbackHub) -> None:
    repo = f"ann/trainer-{case.artefact.name}"
    settings = ["training.push_to_hub=true", f"training.hub_model_id={repo}"]
    recipe = load_recipe(run / "recipe.yaml", [*settings, "training.use_cpu=true"])
    model, processor = case.build()
    trainer = PhiMMTrainer(model, recipe.training_arguments(), processing_class=processor)
    trainer.push_to_hub()
    names = {path.name for path in case.artefact.iterdir()}
    assert set(loopback.files(repo)) == names | {"README.md", "LICENSE"}
    again = AutoModelForMultimodalLM.from_pretrained(repo, trust_remote_code=True)
    found = logits(case, again, PhiMMProcessor.from_pretrained(repo))
    assert torch.equal(found, logits(case, *case.build()))


@way("Push", "the Trainer's `hub_strategy: checkpoint`")
def test_whole_checkpoints(case, run: Path, refused: Callable) -> None:
    settings = ["push_to_hub=true", "hub_model_id=a/b", "hub_strategy=checkpoint"]
    with pytest.raises(ValueError, match="expected end or every_save") as error:
        load_recipe(run / "recipe.yaml", [f"training.{setting}" for setting in settings])
    refused(error.value)
