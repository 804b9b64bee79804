"""A training that ends itself, abruptly and at a given moment; run in a process of its own."""

import logging
import os
import resource
import signal
import sys
from pathlib import Path

import bitsandbytes  # noqa: F401 (imported once, before the victims are forked)
import torch

from phi_mm.checkout import run_train
from phi_mm.training import PhiMMTrainer  # noqa: F401


class Fate:
    """Audit hook that counts openings, renamings and deletions of files, and ends the process.

    Args:
        folder: only files in it count.
        moment: the number of the event at which it ends; 0 for never.
        room: bytes that a file may still grow to after that moment: whatever writes one more is
            killed in the middle. None kills at once.
    """

    EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")

    def __init__(self, folder: Path, moment: int, room: int | None):
        self.folder, self.moment, self.room, self.seen = str(folder), moment, room, 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in self.EVENTS or not str(arguments[0]).startswith(self.folder):
            return
        self.seen += 1
        if self.seen != self.moment:
            return
        if self.room is None:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would make an exception of it
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, self.room))


def train(arguments: list[str], folder: Path, moment: int, room: int | None, output: Path) -> None:
    """train.py with these arguments; a run that is not to be killed leaves its words in `output`,
    and the number of events at the end.
    """
    torch.set_num_threads(1)
    target = os.open(output if not moment else os.devnull, os.O_WRONLY | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(target, stream)
    logging.getLogger().handlers.clear()
    fate = Fate(folder, moment, room)
    sys.addaudithook(fate)
    run_train(arguments)
    sys.stdout.write(f"{fate.seen}\n")
    sys.stdout.flush()
