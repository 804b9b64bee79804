"""The Trainer's own pushes, and the adapter of a run as a repository, on the loopback Hub."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from loopback import LoopbackHub
from peft import PeftModel
from transformers import AutoModelForMultimodalLM

from phi_mm.assembly import join_parts, load_run
from phi_mm.cli import main
from phi_mm.hub.export import save_artefact
from phi_mm.recipes import Recipe, save_recipe
from phi_mm.training import PhiMMTrainer

PROCESSOR = {
    "LICENSE",
    "README.md",
    "chat_template.jinja",
    "processing_phi_mm.py",
    "processor_config.json",
    "recordings_phi_mm.py",
    "streaming_phi_mm.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "transcripts_phi_mm.py",
}
ADAPTER = PROCESSOR | {"adapter_config.json", "adapter_model.safetensors"}
PUSHED = {
    "frozen": PROCESSOR | {"projectors.safetensors"},
    "qlora": ADAPTER,
    "full": PROCESSOR
    | {
        "config.json",
        "configuration_phi_mm.py",
        "generation_config.json",
        "model.safetensors",
        "adapters_phi_mm.py",
        "attention_phi_mm.py",
        "generation_phi_mm.py",
        "media_phi_mm.py",
        "modeling_phi_mm.py",
        "packing_phi_mm.py",
        "projectors_phi_mm.py",
        "transcription_phi_mm.py",
    },
}


def train(runner: PhiMMTrainer, recipe: Recipe) -> None:
    """Trains and saves as train.py does."""
    save_recipe(recipe, recipe.run_dir / "recipe.yaml")
    runner.train()
    runner.save_model()


@pytest.mark.parametrize("tune", ["frozen", "qlora", "full"])
def test_the_trainer_pushes_what_was_trained_and_nothing_else(
    tune: str, trainer: Callable, recipe: Callable, login: Callable, loopback: LoopbackHub
) -> None:
    token, repo = loopback.token("tess"), f"tess/{tune}"
    login(token)
    words = ["push_to_hub=true", f"hub_model_id={repo}", "hub_private_repo=true", "save_steps=1"]
    settings = [f"training.{word}" for word in (*words, "max_steps=2")]
    made = recipe(*settings, tune=tune)
    train(trainer(made), made)
    run_dir = made.run_dir
    assert (run_dir / "checkpoint-2" / "optimizer.pt").is_file()
    assert (run_dir / "recipe.yaml").is_file()
    assert loopback.repositories[repo].private
    [first, *_, last] = [tree for tree in loopback.repositories[repo].commits.values()]
    assert set(first) == {".gitattributes"}
    files = loopback.files(repo)
    assert set(files) == PUSHED[tune] == set(last) - {".gitattributes"}
    weights = next(name for name in files if name.endswith(".safetensors"))
    assert files[weights] == (run_dir / weights).read_bytes()
    content = b"".join(files.values())
    assert str(run_dir).encode() not in content and b"checkpoints" not in files["README.md"]
    written = b"".join(p.read_bytes() for p in run_dir.rglob("*") if p.is_file())
    assert token.encode() not in content + written
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "any-to-any")
    assert card.data.library_name == {"qlora": "peft"}.get(tune, "transformers")


def test_the_trainer_pushes_at_the_end_alone_and_to_a_branch(
    trainer: Callable, recipe: Callable, login: Callable, loopback: LoopbackHub
) -> None:
    login(loopback.token("tess"))
    words = ["push_to_hub=true", "hub_model_id=tess/end", "hub_strategy=end", "hub_revision=trial"]
    settings = [f"training.{word}" for word in (*words, "max_steps=2", "save_steps=1")]
    made = recipe(*settings, tune="frozen")
    train(trainer(made), made)
    assert set(loopback.files("tess/end", "trial")) == PUSHED["frozen"]
    assert loopback.files("tess/end", "main") == {}
    assert len(loopback.repositories["tess/end"].commits) == 2  # the first, and one push


def test_a_push_that_breaks_does_not_end_the_training(
    trainer: Callable,
    recipe: Callable,
    login: Callable,
    loopback: LoopbackHub,
    caplog: pytest.LogCaptureFixture,
) -> None:
    token = loopback.token("tess")
    login(token)
    settings = ["push_to_hub=true", "hub_model_id=tess/broken", "max_steps=2", "save_steps=1"]
    made = recipe(*(f"training.{word}" for word in settings), tune="frozen")
    save_recipe(made, made.run_dir / "recipe.yaml")
    runner = trainer(made)
    account = loopback.accounts.pop(token)  # the token is revoked while the model is trained
    runner.train()
    assert "a push to tess/broken failed" in caplog.text
    with pytest.raises(ValueError, match="cannot push to tess/broken"):
        runner.push_to_hub()
    loopback.accounts[token] = account
    runner.push_to_hub()
    assert set(loopback.files("tess/broken")) == PUSHED["frozen"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["push_to_hub=true"], "without hub_model_id: name the repository"),
        (["hub_model_id=a/b"], "hub_model_id is given without push_to_hub"),
        (["push_to_hub=true", "hub_model_id=a/b", "hub_token=x"], "would be written to recipe"),
        (
            ["push_to_hub=true", "hub_model_id=a/b", "hub_strategy=checkpoint"],
            "expected end or every_save: whole checkpoints hold optimizer state",
        ),
    ],
)
def test_what_cannot_be_pushed_is_refused_with_the_recipe(
    words: list[str], message: str, recipe: Callable
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(*(f"training.{word}" for word in words))


def test_training_does_not_begin_without_a_token(
    recipe: Callable, login: Callable, tmp_path: Path
) -> None:
    login(None)
    made = recipe("training.push_to_hub=true", "training.hub_model_id=a/b")
    save_recipe(made, tmp_path / "push.yaml")
    with pytest.raises(SystemExit, match="got no access token for a/b: run `hf auth login`"):
        main(["train", str(tmp_path / "push.yaml")])
    assert not made.run_dir.exists()


@pytest.fixture
def adapted(
    trainer: Callable, recipe: Callable, login: Callable, loopback: LoopbackHub, tmp_path: Path
) -> tuple[Path, Callable[[str, float], None]]:
    """A QLoRA run, and what puts a model of its parts (times a factor), with other projectors, into
    a repository.
    """
    made = recipe()
    train(trainer(made), made)
    login(loopback.token("ada"))

    def put_base(repo: str, factor: float = 1.0) -> None:
        model, processor = join_parts(recipe(tune="frozen"))
        with torch.no_grad():
            model.lm_head.weight *= factor
        save_artefact(model, processor, tmp_path / repo)
        HfApi().create_repo(repo)
        HfApi().upload_folder(repo_id=repo, folder_path=tmp_path / repo)

    return made.run_dir, put_base


def test_an_adapter_is_pushed_for_a_base_that_others_have(
    adapted: tuple, loopback: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (run, put_base), base = adapted, "ada/whole"
    put_base(base)
    main(["push", str(run), "--repo", "lora", "--adapter-only", "--base", base])
    assert "ada/lora at " in capsys.readouterr().out
    files = loopback.files("ada/lora")
    assert set(files) == ADAPTER
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == base
    card = ModelCard(files["README.md"].decode()).data
    assert (card.base_model, card.base_model_relation) == (base, "adapter")
    assert str(tmp_path).encode() not in b"".join(files.values())

    trained, processor = load_run(run, merge=True)
    probe = processor(text="what colour is it?", return_tensors="pt")
    whole = AutoModelForMultimodalLM.from_pretrained(base, trust_remote_code=True)
    by_peft = PeftModel.from_pretrained(whole, "ada/lora").eval()
    by_auto = AutoModelForMultimodalLM.from_pretrained("ada/lora", trust_remote_code=True).eval()
    with torch.no_grad():
        expected = trained(**probe).logits
        assert torch.equal(by_peft(**probe).logits, by_auto(**probe).logits)
        # The run learnt on 4-bit weights, and these are in float: close, and not the same.
        difference = (by_auto(**probe).logits - expected).abs().max() / expected.abs().max()
    assert 1e-4 < difference < 0.2


def test_an_adapter_is_not_pushed_for_other_parts(adapted: tuple, loopback: LoopbackHub) -> None:
    run, put_base = adapted
    put_base("ada/other", factor=1.1)
    line = ["push", str(run), "--repo", "wrong", "--adapter-only", "--base", "ada/other"]
    with pytest.raises(SystemExit, match="logits differ .* expected ada/other to hold the very"):
        main(line)
    assert "ada/wrong" not in loopback.repositories


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("ada/nothing", "got --base ada/nothing, expected a model that phi-mm push made"),
        (None, "got the local folder .* as --base, expected a repository of the Hub"),
    ],
)
def test_a_base_that_is_none_is_refused(
    base: str | None, message: str, adapted: tuple, tmp_path: Path
) -> None:
    line = ["push", str(adapted[0]), "--repo", "lora", "--adapter-only"]
    with pytest.raises(SystemExit, match=message):
        main([*line, "--base", base or str(tmp_path)])
