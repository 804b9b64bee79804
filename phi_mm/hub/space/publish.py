"""A Space on the Hub: made, set, and only then given the code that it starts."""

import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from phi_mm.hub.destination import told
from phi_mm.hub.push import MAIN, commit_folder
from phi_mm.hub.space.folder import DEPLOYED, digests, read_deployed
from phi_mm.hub.space.plan import OWNER_SECRET, Space

logger = logging.getLogger(__name__)

SPACE = "space"
NEW = {"README.md", ".gitattributes"}  # what the Hub itself puts into a new Space


def check_space(name: str) -> None:
    """Refuses a Space that holds something else.

    Raises:
        ValueError: there are files in it, and no deployment was noted.
    """
    with told(f"cannot read the Space {name}"):
        try:
            there = HfApi().list_repo_files(name, repo_type=SPACE)
        except RepositoryNotFoundError:
            return
    if DEPLOYED not in there and (others := sorted(set(there) - NEW)):
        raise ValueError(
            f"got the Space {name}, which holds {', '.join(others[:5])}, expected a new one or one "
            "that phi-mm deploy-space made: give another name"
        )


def publish(folder: Path, space: Space, show: Callable[[str], None]) -> str:
    """Makes the Space where there is none, sets it, and pushes the folder in one commit.

    The commit comes last: what the Hub starts for it has its settings.

    Args:
        folder: as `write_folder` left it.
        space: by its full name.
        show: as in [`deploy`].

    Returns:
        The commit.

    Raises:
        ValueError: the Hub cannot be reached or refuses.
    """
    api, name = HfApi(), space.name
    with told(f"the Space {name} is not deployed yet; the same command goes on where it was"):
        api.create_repo(
            name,
            repo_type=SPACE,
            space_sdk="gradio",
            space_hardware=space.hardware,
            private=space.private or None,
            exist_ok=True,
        )
        runtime = api.get_space_runtime(name)
        if space.hardware != (runtime.requested_hardware or runtime.hardware):
            api.request_space_hardware(name, space.hardware)
        _set(api, space, show)
        noted = _noted(name)
        names = [*digests(folder), DEPLOYED]
        message = "Deployed by phi-mm"
        done = commit_folder(folder, names, name, MAIN, message, SPACE, noted.__contains__)
    return done.oid


def _set(api: HfApi, space: Space, show: Callable[[str], None]) -> None:
    """Variables and secrets; each that is new or other restarts a Space that runs already."""
    there = {v.key: v.value for v in api.get_space_variables(space.name).values()}
    for key, value in space.variables.items():
        if there.get(key) != value:
            api.add_space_variable(space.name, key, value)
    given = dict(space.secrets)
    if OWNER_SECRET not in {*given, *api.get_space_secrets(space.name)}:
        given[OWNER_SECRET] = secrets.token_urlsafe()
        show(given[OWNER_SECRET])
    for key, value in given.items():
        api.add_space_secret(space.name, key, value)


def _noted(name: str) -> Mapping[str, str]:
    """The files of an earlier deployment of this Space."""
    try:
        return read_deployed(Path(hf_hub_download(name, DEPLOYED, repo_type=SPACE)))
    except EntryNotFoundError:
        return {}
