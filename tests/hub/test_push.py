"""Push: by the real client to a Hub on the loopback, and back into a fresh process."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from loopback import LoopbackHub
from loopback_state import Seen

from phi_mm.cli import main
from phi_mm.hub.export import save_artefact
from phi_mm.hub.folder import check_folder
from phi_mm.hub.push import commit_folder
from phi_mm.hub.vllm import (
    BASE_MODEL,
    check_vllm,
    missed_by_config,
    missed_by_model,
    missed_by_processor,
)

# What others do with what was pushed for vLLM: the base model by AutoModel, the whole by another.
STRANGER = """
import json, sys
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
for name in ("modeling_phi_mm", "processing", "phi_mm"):
    sys.modules[name] = None
place = {"revision": sys.argv[2], "trust_remote_code": True}
base = AutoModel.from_pretrained(sys.argv[1], **place)
whole = AutoModelForImageTextToText.from_pretrained(sys.argv[1], **place)
processor = AutoProcessor.from_pretrained(sys.argv[1], **place)
ids = whole.generate(**processor(text="what is it?", return_tensors="pt"), max_new_tokens=3)
print(json.dumps([type(base).__name__, type(whole).__name__, type(base).__module__, ids.shape]))
"""


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def said(seen: list[Seen]) -> bytes:
    """All that the Hub was sent, but for the Authorization headers."""
    return b"".join(s.path.encode() + s.headers.encode() + s.body for s in seen)


def test_a_cut_push_goes_on_where_it_was_and_is_verified(
    artefact: Path, login: Callable, loopback: LoopbackHub, tmp_path: Path, capfd
) -> None:
    token, before = loopback.token("ann"), contents(artefact)
    login(token)
    shards = {n: c for n, c in before.items() if n.endswith(".safetensors")}
    cut, whole = sorted(shards.values(), key=len)[-1], sorted(shards.values(), key=len)[:-1]
    assert len(whole) >= 2 and len(cut) > 64 * 1024  # which is uploaded in parts
    loopback.cut_upload(cut, after=len(cut) // 2)
    with pytest.raises(SystemExit, match="upload to ann/first stopped; the same command goes on"):
        main(["push", str(artefact), "--repo", "first"])
    assert loopback.files("ann/first") == {}  # no commit of half the files
    assert loopback.received[oid(cut)] == len(cut) // 2
    sent = {oid(content): loopback.received[oid(content)] for content in whole}
    assert sent == {oid(content): len(content) for content in whole}

    loopback.cut_download(cut, after=1000)
    begun = len(loopback.seen)
    main(["push", str(artefact), "--repo", "first"])
    assert {key: loopback.received[key] for key in sent} == sent  # nothing of them once more
    assert loopback.received[oid(cut)] == len(cut) // 2 + len(cut)
    assert loopback.files("ann/first") == before == contents(artefact)
    assert loopback.sent[oid(cut)] == 1000 + len(cut)  # the client keeps whole chunks of 10 MB

    out, err = capfd.readouterr()
    commit = loopback.repositories["ann/first"].branches["main"]
    assert f"ann/first at {commit} was downloaded again and answers the same" in out
    assert "spoken, about a picture: " in out
    downloads = [s for s in loopback.seen[begun:] if f"/resolve/{commit}/" in s.path]
    assert len(downloads) > 10 and not any(s.token_sent for s in downloads)  # as anybody would
    assert not any(s.token_sent for s in loopback.seen if s.host == "localhost")
    written = b"".join(contents(artefact).values()) + b"".join(contents(tmp_path).values())
    assert token.encode() not in said(loopback.seen) + written + (out + err).encode()


def test_private_at_a_revision_and_for_vllm(
    artefact: Path, login: Callable, loopback: LoopbackHub, tmp_path: Path
) -> None:
    token, before = loopback.token("ann"), contents(artefact)
    login(token)
    begun = len(loopback.seen)
    line = ["push", str(artefact), "--repo", "ann/second", "--private"]
    main([*line, "--revision", "v1", "--for-vllm"])
    assert loopback.repositories["ann/second"].private
    assert loopback.files("ann/second") == {}
    pushed = loopback.files("ann/second", "v1")
    assert contents(artefact) == before
    assert {name for name in before if before[name] != pushed.get(name)} == {"config.json"}
    config, own = (json.loads(files["config.json"]) for files in (pushed, before))
    assert config["auto_map"].pop("AutoModel") == "modeling_phi_mm.PhiMMModel"
    assert own["auto_map"].pop("AutoModel") == "modeling_phi_mm.PhiMMForConditionalGeneration"
    assert config == own
    assert token.encode() not in said(loopback.seen[begun:])
    assert not any(s.token_sent for s in loopback.seen[begun:] if s.host == "localhost")

    done = load_as_a_stranger(tmp_path, HF_TOKEN=token)
    assert done.returncode == 0, done.stderr
    base, whole, module, shape = json.loads(done.stdout.splitlines()[-1])
    assert (base, whole) == ("PhiMMModel", "PhiMMForConditionalGeneration")
    assert module.startswith("transformers_modules.") and shape[1] > 3

    for other, status in ((None, 401), (loopback.token("bob"), 404)):
        login(other)
        with pytest.raises(HfHubHTTPError) as refused:
            snapshot_download("ann/second", revision="v1")
        assert refused.value.response.status_code == status


def load_as_a_stranger(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-I", "-c", STRANGER, "ann/second", "v1"]
    env = {**os.environ, **environment, "HF_HOME": str(folder / "stranger")}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_cut_download_goes_on_where_it_was(
    login: Callable, loopback: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    login(loopback.token("ann"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what survives a cut, of 10 MB
    content = bytes(range(256)) * 50
    HfApi().create_repo("third")
    HfApi().upload_file(path_or_fileobj=content, path_in_repo="a.safetensors", repo_id="ann/third")
    loopback.cut_download(content, after=5500)
    begun = len(loopback.seen)
    assert Path(hf_hub_download("ann/third", "a.safetensors")).read_bytes() == content
    assert loopback.sent[oid(content)] == 500 + len(content)
    assert any("range: bytes=5000-\n" in s.headers.lower() for s in loopback.seen[begun:])


def test_what_an_earlier_push_left_is_deleted_and_the_rest_stays(
    artefact: Path, login: Callable, loopback: LoopbackHub
) -> None:
    login(loopback.token("ann"))
    HfApi().create_repo("fourth")
    for name in ("model.safetensors", "pictures/cat.png", "old_phi_mm.py"):
        HfApi().upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id="ann/fourth")
    names = check_folder(artefact)
    for _ in range(2):  # the second changes nothing, and makes no commit
        done = commit_folder(artefact, names, "ann/fourth", "main", "again")
        assert set(loopback.files("ann/fourth")) == {*names, "pictures/cat.png"}
    repository = loopback.repositories["ann/fourth"]
    assert (len(repository.commits), repository.branches["main"]) == (5, done.oid)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("optimizer.pt", "momentum", "got optimizer.pt in"),
        ("training_args.bin", "pickle", "got training_args.bin in"),
        ("rows.json", "[]", "got rows.json in"),
        ("runs/events.out.tfevents.1", "log", "got runs/events.out.tfevents.1 in"),
        (".env", "secret", "got .env in"),
        (".git/config.json", "{}", "got .git/config.json in"),
        ("recipe.yaml", "model: {}", "got recipe.yaml in"),
        ("model-00009-of-00009.safetensors", None, "expected those of model.safetensors.index"),
        ("model-00001-of-00003.safetensors", "torn", "is no whole safetensors file"),
        ("config.json", '{"name": "/data/models/phi"}', "local path /data/models/phi in config"),
        ("config.json", '{"name": "../phi"}', "got the local path ../phi in config.json"),
        ("chat_template.jinja", "{# /home/ann/x #}", "local path /home/ann in chat_template"),
        ("extra_phi_mm.py", "key = 'hf_{token}'", "like an access token in extra_phi_mm.py"),
        ("README.md", "# phi-mm", "without license, library_name, pipeline_tag, language, tags"),
        ("README.md", "---\n- 1\n---\n", "front matter in README.md that is not valid"),
        ("README.md", None, "without README.md: phi-mm export writes a whole folder"),
    ],
)
def test_a_folder_that_is_not_fit_is_refused_by_name(
    name: str, content: str | None, message: str, artefact: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(artefact, tmp_path / "copy")
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    if content is None and (copy / name).is_file():
        (copy / name).unlink()
    elif content is None:
        shutil.copy(copy / "model-00001-of-00003.safetensors", copy / name)
    else:
        (copy / name).write_text(content.replace("{token}", "a" * 34))
    with pytest.raises(SystemExit, match=message) as refused:
        main(["push", str(copy), "--repo", "never"])
    assert "aaaa" not in str(refused.value)


def test_a_destination_that_cannot_be_written_to_is_told_first(
    artefact: Path, login: Callable, loopback: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(repo: str, *flags: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["push", str(artefact), "--repo", repo, *flags])
        return str(stopped.value)

    ann = loopback.token("ann")
    login(ann)
    HfApi().create_repo("fifth")
    begun = len(loopback.seen)
    assert "Repo id must" in refused("a/b/c")
    assert "got bob/x, expected a repository of one of ann" in refused("bob/x")
    assert "got ann/fifth, which exists and is public" in refused("fifth", "--private")
    login(loopback.token("ann", role="read"))
    assert "access token of ann that may only read" in refused("x")
    login("hf_" + "0" * 34)
    assert "cannot push to x: Invalid" in refused("x")
    login(None)
    assert "got no access token for x: run `hf auth login`" in refused("x")
    assert {s.method for s in loopback.seen[begun:]} == {"GET"}
    login(ann)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot push to x: " in refused("x") and "(http://127.0.0.1:9)" in refused("x")
    assert "got one of --adapter-only and --base" in refused("x", "--adapter-only")
    assert "vLLM serves whole models" in refused("x", "--adapter-only", "--base=y", "--for-vllm")


def test_every_requirement_of_vllm_is_told_by_name(
    make_phi_mm: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_phi_mm()
    save_artefact(model, processor, tmp_path / "artefact")
    with pytest.raises(ValueError, match="auto_map.AutoModel is modeling_phi_mm.PhiMMForCond"):
        check_vllm(tmp_path / "artefact")
    config = {"auto_map": {"AutoModel": BASE_MODEL}, "audio_route": "transcript"}
    [route, count] = missed_by_config(config | {"audio_config": {}})
    assert "audio_route is 'transcript'" in route and "max_source_positions" in count

    assert missed_by_processor(processor, model.config) == []
    assert missed_by_model(model.model, processor) == []
    names = processor.image_processor.model_input_names
    processor.image_processor.model_input_names = ["pixels"]
    counts = processor._get_num_multimodal_tokens
    monkeypatch.setattr(processor, "_get_num_multimodal_tokens", lambda image_sizes: counts([]))
    monkeypatch.setattr(processor, "replace_audio_token", lambda *_, **__: "<|audio|>...")
    assert [words.split(",")[0] for words in missed_by_processor(processor, model.config)] == [
        "_get_num_multimodal_tokens counts [] tokens and [] rows for a picture",
        "the processor's pixel_values belongs to no sub-processor: vLLM would drop it",
        "the commonest token of an audio is not its placeholder",
    ]
    processor.image_processor.model_input_names = names
    del processor.feature_extractor.chunk_length
    monkeypatch.setattr(type(processor), "__call__", lambda *_, **__: {})
    blind = make_phi_mm(vision=False)[0].config
    assert [words.split(",")[0] for words in missed_by_processor(processor, blind)] == [
        "the processor overrides __call__",
        "the processor's attribute image_processor is there without a vision tower",
        "feature_extractor has no chunk_length",
    ]


def test_a_model_that_vllm_cannot_serve_is_told_why(
    make_phi_mm: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make_phi_mm()
    language_model = model.model.language_model
    forward = language_model.forward

    def deaf(attention_instances: object = None, **kwargs: object) -> object:
        return forward(**kwargs)

    monkeypatch.setattr(language_model, "forward", deaf)
    [missed] = missed_by_model(model.model, processor)
    assert "keyword arguments do not reach every attention layer" in missed
    monkeypatch.setattr(type(model.model), "_supports_attention_backend", False)
    [missed] = missed_by_model(model.model, processor)
    assert "_supports_attention_backend is False" in missed
