"""The three base models, built from nothing, two at a time.

phi-mm tiny build-bases
"""

import logging
import multiprocessing
from functools import partial
from pathlib import Path

import torch

from phi_mm.tiny import clip_base, phi_base, whisper_base

logger = logging.getLogger(__name__)

BUILDERS = {"phi": phi_base.build, "clip": clip_base.build, "whisper": whisper_base.build}
PROCESSES = 2


def build_bases(names: list[str], out: Path, seed: int, work: Path) -> None:
    """Build the named bases (keys of BUILDERS) into `out`/tiny-NAME; state is kept in `work`.

    Each is trained by one thread of a process of its own: models of this size gain nothing from a
    second one. Interrupted builds go on when this is called again.
    """
    build = partial(_build, out=out, seed=seed, work=work)
    # Spawned, not forked: torch's threads would not survive. Leaving the pool ends its processes.
    with multiprocessing.get_context("spawn").Pool(min(PROCESSES, len(names))) as pool:
        for name in pool.imap(build, names):
            logger.info("%s is built; its README.md has what it can do", out / f"tiny-{name}")


def _build(name: str, out: Path, seed: int, work: Path) -> str:
    """Returns the name."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    BUILDERS[name](out / f"tiny-{name}", seed, work / name)
    return name
