"""From an artefact to a repository of the Hub: checked before, uploaded, downloaded, asked again.

phi-mm push DIR --repo NAME

A token comes from where huggingface_hub has it (`hf auth login`, HF_TOKEN), goes into headers and
into the environment of the process that verifies, and is never written.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)

from phi_mm.assembly import load_run
from phi_mm.hub.adapter import lora_recipe, write_adapter
from phi_mm.hub.destination import check_destination, find_model, told
from phi_mm.hub.folder import check_folder, is_published
from phi_mm.hub.probes import Probe, make_probes
from phi_mm.hub.verify import TOLERANCE, Source, ask_fresh, compare
from phi_mm.hub.vllm import check_vllm, write_vllm_config
from processing import PhiMMProcessor

logger = logging.getLogger(__name__)

MAIN = "main"


@dataclass(frozen=True)
class Destination:
    """A repository by its name, the branch of it, and whether it is to be private."""

    repo: str
    branch: str = MAIN
    private: bool = False


@dataclass(frozen=True)
class Pushed:
    """Where the files are now, and the probes with the answers that both sides gave."""

    repo: str
    commit: str
    answers: list[tuple[Probe, str]]


def push(folder: Path, destination: Destination, for_vllm: bool = False) -> Pushed:
    """Pushes an artefact and proves that what the Hub gives back answers as the folder does.

    Interrupted, the same call goes on where it was: the commit is made last, of files that the Hub
    keeps as they come, so only what it does not have yet is sent again. `create_commit` is used
    rather than `upload_folder`: it takes exactly the files that were checked, in one commit.

    Args:
        folder: an exported folder; nothing is written to it.
        destination: the repository is made where there is none. Files of an earlier push that this
            one does not have are deleted from its branch.
        for_vllm: push a config whose AutoModel is the base model, as vLLM wants it.

    Raises:
        ValueError: before any upload, for a folder that is not fit to be published, a destination
            that cannot be written to, or a requirement of vLLM's that is missed; later, for a
            connection that broke, and for answers that differ.
    """
    check_folder(folder)
    destination = _checked(destination)
    with tempfile.TemporaryDirectory(prefix="phi-mm-push-") as work:
        source = Source(folder)
        if for_vllm:
            folder = _linked(folder, Path(work) / "artefact")
            write_vllm_config(folder)
            check_vllm(folder)
            source = Source(folder, auto_class="AutoModelForMultimodalLM")
        return _push_verified(source, destination, Path(work))


def push_adapter(run: Path, destination: Destination, base: str) -> Pushed:
    """Pushes what LoRA learnt in a run, as an adapter of the model in the repository `base`.

    Args:
        run: a finished run of `lora` or `qlora`.
        destination: as in [`push`].
        base: repository of a phi-mm model that holds the parts that were trained on; the adapter
            brings its own projectors.

    Raises:
        ValueError: as [`push`]; also for a base that is none, or with which the adapter does not
            answer as the run does.
    """
    recipe = lora_recipe(run)
    destination = _checked(destination)
    private = find_model(base, "--base").private
    model, processor = load_run(run, merge=True)
    model = model.cpu()  # where the fresh process computes too
    with tempfile.TemporaryDirectory(prefix="phi-mm-push-") as work:
        folder = Path(work) / "adapter"
        write_adapter(run, folder, base, processor)
        check_folder(folder)
        quantized = recipe.tune.language_model == "qlora"
        source = Source(
            folder,
            auto_class="AutoModelForMultimodalLM",
            base=base,
            quantization=recipe.bitsandbytes_config().to_diff_dict() if quantized else None,
            token=get_token() if private else None,
        )
        return _push_verified(source, destination, Path(work), model)


def _checked(destination: Destination) -> Destination:
    """The destination by its full name."""
    return replace(destination, repo=check_destination(destination.repo, destination.private))


def _push_verified(
    source: Source,
    destination: Destination,
    work: Path,
    model: torch.nn.Module | None = None,
) -> Pushed:
    """Asks the folder in a fresh process, uploads it, and asks what another downloads again."""
    folder, repo = source.artefact, destination.repo
    processor = PhiMMProcessor.from_pretrained(folder)
    places = {name: work / name for name in ("media", "before", "after")}
    for place in places.values():
        place.mkdir()
    probes = make_probes(places["media"], processor)
    answers, logits = ask_fresh(source, probes, places["before"], logits=True)
    if model is not None:
        with _explained(source.base):
            for probe, found in zip(probes, logits, strict=True):
                compare(probe, model, processor, found)
    logger.info("%s answers in a fresh process; uploading to %s", folder, repo)
    commit, private = upload(folder, destination)
    token = get_token() if private else source.token  # a public one is loaded as anybody would
    asked = replace(source, artefact=repo, revision=commit, token=token)
    again, logits_again = ask_fresh(asked, probes, places["after"], logits=True)
    pairs = zip(answers, again, logits, logits_again, strict=True)
    for probe, (*words, expected, found) in zip(probes, pairs, strict=True):
        _check_same(probe, words, expected, found, f"{repo} at {commit}")
    return Pushed(repo, commit, list(zip(probes, again, strict=True)))


@contextmanager
def _explained(base: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"{error}; expected {base} to hold the very parts that the run was trained on"
        ) from error


def upload(folder: Path, destination: Destination) -> tuple[str, bool]:
    """Makes repository and branch where there are none, and one commit.

    Returns:
        The commit, and whether the repository is private.

    Raises:
        ValueError: the folder is not fit to be published, or the Hub cannot be reached or refuses.
    """
    names, repo = check_folder(folder), destination.repo
    with told(f"the upload to {repo} stopped; the same command goes on where it was"):
        HfApi().create_repo(repo, private=destination.private or None, exist_ok=True)
        done = commit_folder(folder, names, repo, destination.branch, "Pushed by phi-mm")
        return done.oid, HfApi().model_info(repo).private


def commit_folder(
    folder: Path,
    names: list[str],
    repo: str,
    branch: str,
    message: str,
    kind: str = "model",
    ours: Callable[[str], bool] = is_published,
) -> CommitInfo:
    """One commit after which the branch has these files and none of an earlier push besides.

    Args:
        folder: holds the files.
        names: of the files.
        repo: an existing repository.
        branch: made where there is none.
        message: of the commit.
        kind: "model" or "space".
        ours: whether an earlier push may have left a file of this name.
    """
    api = HfApi()
    if branch != MAIN:
        api.create_branch(repo, branch=branch, repo_type=kind, exist_ok=True)
    there = api.list_repo_files(repo, revision=branch, repo_type=kind)
    stale = [name for name in there if ours(name) and name not in names]
    operations = [
        *(CommitOperationAdd(name, str(folder / name)) for name in names),
        *(CommitOperationDelete(name) for name in stale),
    ]
    return api.create_commit(
        repo, operations, commit_message=message, revision=branch, repo_type=kind
    )


def _linked(folder: Path, copy: Path) -> Path:
    """The same folder again, of links, but for config.json, which can then be written."""
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        link = copy / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    config = copy / "config.json"
    config.unlink()
    config.write_bytes((folder / "config.json").read_bytes())
    return copy


def _check_same(
    probe: Probe, words: list[str], expected: torch.Tensor, found: torch.Tensor, place: str
) -> None:
    """Raises ValueError where answers (before, after) or logits of a probe differ."""
    before, after = words
    difference = ((expected - found).abs().max() / expected.abs().max()).item()
    if before != after or not difference <= TOLERANCE[torch.float32]:
        raise ValueError(
            f"probe {probe.name!r}: {place} answers {after!r}, expected {before!r} as before the "
            f"push (logits differ by {difference:.2e} of the largest): push it again"
        )
