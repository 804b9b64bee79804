"""Export: what the folder holds, that it answers alone, and that failures leave nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from phi_mm.cli import main
from phi_mm.hub import export
from phi_mm.hub.fresh import respond
from phi_mm.hub.probes import make_probes
from phi_mm.hub.verify import compare

AUTO_MAP = {
    "AutoConfig": "configuration_phi_mm.PhiMMConfig",
    "AutoModel": "modeling_phi_mm.PhiMMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_phi_mm.PhiMMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_phi_mm.PhiMMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_phi_mm.PhiMMForConditionalGeneration",
}


def test_folder_is_a_whole_repository(exported: tuple) -> None:
    folder, _ = exported
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENSE",
        "README.md",
        "adapters_phi_mm.py",
        "attention_phi_mm.py",
        "chat_template.jinja",
        "config.json",
        "configuration_phi_mm.py",
        "generation_config.json",
        "generation_phi_mm.py",
        "media_phi_mm.py",
        "model.safetensors",
        "modeling_phi_mm.py",
        "packing_phi_mm.py",
        "processing_phi_mm.py",
        "processor_config.json",
        "projectors_phi_mm.py",
        "recordings_phi_mm.py",
        "streaming_phi_mm.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "transcription_phi_mm.py",
        "transcripts_phi_mm.py",
    ]
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [257, 258]
    assert not list(folder.parent.glob(".*.part"))


def test_every_probe_was_answered_alike(exported: tuple) -> None:
    _, answered = exported
    assert [row.probe.name for row in answered] == [
        "typed",
        "picture",
        "spoken",
        "spoken, long",
        "spoken, about a picture",
    ]
    assert all(row.difference <= 1e-4 for row in answered)
    assert len({row.answer for row in answered}) > 1


def test_card_has_front_matter_and_the_measured_numbers(exported: tuple, run: Path) -> None:
    text = (exported[0] / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert data["base_model"] == ["microsoft/phi-2", "clip/of-someone"]
    [index] = data["model-index"]
    found = {r["dataset"]["type"]: r["metrics"][0] for r in index["results"]}
    assert {task: (m["type"], m["value"]) for task, m in found.items()} == {
        "image_qa": ("exact_match", 0.9375),
        "asr": ("wer", 0.052),
    }
    assert (
        "| Questions about pictures | exact match | 93.8 % | 90.9 % to 95.7 % | 400 | 38.0 % "
        "| blank picture: 27.0 % |"
    ) in body
    assert "| Writing down speech: Whisper alone | word error rate | 4.0 %" in body
    assert "| audio tower | stage2 |" in body  # a local folder shows by its name alone
    assert "Seed 7." in body
    assert str(run.parent) not in text


def test_a_stranger_loads_it_by_every_auto_class(stranger: tuple) -> None:
    _, found = stranger
    model = ["PhiMMForConditionalGeneration", "transformers_modules"]
    assert found == [model] * 4 + [["PhiMMProcessor", "transformers_modules"]]


def test_saving_it_again_changes_nothing(exported: tuple, stranger: tuple) -> None:
    folder, again = exported[0], stranger[0]
    written = {path.name for path in again.iterdir()}
    assert written == {path.name for path in folder.iterdir()} - {"LICENSE", "README.md"}
    for name in sorted(written - {"tokenizer_config.json"}):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    before, after = (json.loads((f / "tokenizer_config.json").read_text()) for f in (folder, again))
    for note in ("is_local", "local_files_only"):  # of how this one was loaded: not published
        assert after.pop(note) is True and note not in before
    assert after == before


def test_another_model_does_not_pass(make_phi_mm: Callable, tmp_path: Path) -> None:
    model, processor = make_phi_mm()
    other, _ = make_phi_mm(seed=1)
    probe = make_probes(tmp_path, processor)[0]
    _, logits = respond(model, processor, probe.messages, 1)
    assert compare(probe, model, processor, logits) == 0.0
    with pytest.raises(ValueError, match="differ from the run's by .* expected at most 1e-04"):
        compare(probe, other, processor, logits)
    with pytest.raises(ValueError, match="logits are"):
        compare(probe, model, processor, logits[1:])
    with pytest.raises(ValueError, match="differ from the run's by nan"):
        compare(probe, model, processor, torch.full_like(logits, torch.nan))


@pytest.mark.parametrize("modality", ["vision", "audio"])
def test_probes_fit_the_model(modality: str, make_phi_mm: Callable, tmp_path: Path) -> None:
    given = {"vision": modality == "vision", "audio": modality == "audio"}
    model, processor = make_phi_mm(**given)
    names = [probe.name for probe in make_probes(tmp_path, processor)]
    expected = {"vision": ["typed", "picture"], "audio": ["typed", "spoken", "spoken, long"]}
    assert names == expected[modality]


def test_failed_verification_leaves_nothing(run: Path, tmp_path: Path, monkeypatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no such module' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(broken))
    out = tmp_path / "hub"
    out.mkdir()
    with pytest.raises(ValueError, match="does not load and answer.*\n.*no such module"):
        export(run, out / "artefact")
    assert list(out.iterdir()) == []


def test_local_paths_are_not_published(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["training"]["output_dir"] = str(copy)
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (copy / "chat_template.jinja").write_text(f"{{# from {copy} #}}")
    with pytest.raises(ValueError, match="local path .* in chat_template.jinja"):
        export(copy, tmp_path / "artefact")
    assert not (tmp_path / "artefact").exists()


def test_what_exists_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which exists"):
        export(run, tmp_path)


def test_command_says_what_is_wrong_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="phi-mm: got .*nothing, expected a run folder"):
        main(["export", str(tmp_path / "nothing"), str(tmp_path / "out")])
