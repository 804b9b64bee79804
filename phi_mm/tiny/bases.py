"""The three base models, built from nothing, two at a time.

phi-mm tiny build-bases
"""

import logging
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        builds = [pool.submit(_build, name, out, seed, work) for name in names]
        for name, build in zip(names, builds, strict=True):
            build.result()
            logger.info("%s is built; its README.md has what it can do", out / f"tiny-{name}")


def _build(name: str, out: Path, seed: int, work: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    BUILDERS[name](out / f"tiny-{name}", seed, work / name)
