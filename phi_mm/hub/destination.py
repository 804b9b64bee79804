"""Whether a repository of the Hub can be pushed to, asked before anything expensive is done."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id


def check_destination(repo: str, private: bool = False, kind: str = "model") -> str:
    """The repository's full name, NAMESPACE/NAME, after asking who we are and what is there.

    Args:
        repo: NAME or NAMESPACE/NAME; without a namespace it is the user's own.
        private: whether it is meant to be private.
        kind: "model" or "space".

    Raises:
        ValueError: a name that the Hub does not take, nobody logged in, a token that may not write
            there, a public repository where a private one is asked for, or no Hub to be reached.
    """
    validate_repo_id(repo)
    if get_token() is None:
        raise ValueError(
            f"got no access token for {repo}: run `hf auth login`, or set HF_TOKEN to one that may "
            "write"
        )
    api = HfApi()
    with told(f"cannot push to {repo}"):
        me = api.whoami()
        if me["auth"].get("accessToken", {}).get("role") == "read":
            raise ValueError(
                f"got an access token of {me['name']} that may only read, expected one that may "
                "write: make one at the Hub's settings"
            )
        name = repo if "/" in repo else f"{me['name']}/{repo}"
        owners = [me["name"], *(org["name"] for org in me["orgs"] if not _only_reads(org))]
        if name.split("/")[0] not in owners:
            raise ValueError(
                f"got {name}, expected a repository of one of {', '.join(owners)}: the access "
                "token may write nowhere else"
            )
        if private and _is_public(api, name, kind):
            raise ValueError(
                f"got {name}, which exists and is public, for a private repository: make it "
                "private in its settings, or give another name"
            )
    return name


def find_model(repo: str, option: str, revision: str = "main") -> ModelInfo:
    """What the Hub knows of a model of phi-mm.

    Args:
        repo: its repository.
        option: of the command line that named it.
        revision: branch or commit.

    Raises:
        ValueError: a local folder, no such repository, or a model of another type.
    """
    if Path(repo).exists():
        raise ValueError(
            f"got the local folder {repo} as {option}, expected a repository of the Hub that "
            f"others have too: phi-mm push {repo} --repo NAME first"
        )
    validate_repo_id(repo)
    try:
        with told(f"cannot read {repo}"):
            found = HfApi().model_info(repo, revision=revision)
            config = hf_hub_download(repo, "config.json", revision=found.sha)
    except ValueError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError | EntryNotFoundError):
            raise ValueError(
                f"got {option} {repo}, expected a model that phi-mm push made: the Hub has none of "
                "that name, or the access token may not see it"
            ) from error
        raise
    model_type = json.loads(Path(config).read_text("utf-8")).get("model_type")
    if model_type != "phi_mm":
        raise ValueError(f"got {option} {repo} of model type {model_type!r}, expected 'phi_mm'")
    return found


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turns an error of the Hub or of the way to it into one sentence, raised as ValueError."""
    try:
        yield
    except (HTTPError, OfflineModeIsEnabled) as error:  # HTTPError is the HTTP library's own
        raise ValueError(f"{what}: {_words(error)}") from error
    except RuntimeError as error:  # an upload's, around either of the above
        raise ValueError(f"{what}: {_words(error.__cause__ or error)}") from error


def _words(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        return error.server_message or str(error).strip().splitlines()[0]
    return f"{error} ({HfApi().endpoint})"


def _only_reads(organisation: dict) -> bool:
    return organisation.get("roleInOrg") == "read"


def _is_public(api: HfApi, repo: str, kind: str) -> bool:
    try:
        return not api.repo_info(repo, repo_type=kind).private
    except RepositoryNotFoundError:
        return False
