"""From an artefact on the Hub to a Space that serves it: written, tried out, pushed.

phi-mm deploy-space DIR --model REPO --space NAME
"""

import logging
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from phi_mm.hub.destination import check_destination
from phi_mm.hub.export import written_whole
from phi_mm.hub.space.check import check_build
from phi_mm.hub.space.folder import check_replaceable, write_folder
from phi_mm.hub.space.plan import (
    MODEL,
    OWNER_SECRET,
    REVISION,
    Space,
    check_model,
    read_secrets,
    read_variables,
)
from phi_mm.hub.space.publish import check_space, publish

logger = logging.getLogger(__name__)

__all__ = ["Space", "deploy", "read_secrets", "read_variables"]


def deploy(
    folder: Path, space: Space, show: Callable[[str], None], check: bool = True, push: bool = True
) -> Space:
    """Writes the folder of a Space, tries it out in an environment of its own, and pushes it.

    Args:
        folder: is written whole, or not at all; one that an earlier call wrote is replaced.
        space: what is to be deployed.
        show: is given the owner's secret, once, when the Space had none and none was given.
        check: whether to build and ask it here.
        push: whether to make and set the Space on the Hub.

    Returns:
        The space by its full name, with the settings that name model and commit.

    Raises:
        ValueError: before anything is written, for a folder that is not ours to replace, a model
            that is none or that the Space could not read, or a Space that cannot be written to;
            later, with the last lines of the log, for a folder that does not build or answer; and
            for a push that broke off, which the same call goes on with.
    """
    check_replaceable(folder)
    if push:
        name = check_destination(space.name, space.private, kind="space")
        check_space(name)
        space = replace(space, name=name)
    commit = check_model(space)
    pinned = {MODEL: space.model, REVISION: commit}
    space = replace(space, variables=pinned | space.variables)
    with written_whole(folder, replace=True) as part:
        write_folder(part, space)
        if check:
            owner = {OWNER_SECRET: secrets.token_urlsafe()}  # of this trial alone
            answer = check_build(part, space.variables, owner | space.secrets)
            logger.info("it builds, starts and answers: %r", answer)
    if push:
        publish(folder, space, show)
    return space
