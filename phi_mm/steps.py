"""A sequence of steps that is done once: finished ones are skipped, a cut-off one goes on."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from phi_mm.files import write_whole

STATE = "steps.json"


class Steps:
    """Notes in `out`/steps.json which step was done with which inputs.

    Args:
        out: folder that the steps fill.
        say: takes a line for the user.
    """

    def __init__(self, out: Path, say: Callable[[str], None]):
        self.path, self.say = out / STATE, say
        out.mkdir(parents=True, exist_ok=True)
        self.notes: dict[str, dict] = {}
        if self.path.is_file():
            self.notes = json.loads(self.path.read_text(encoding="utf-8"))

    def run(
        self, name: str, title: str, inputs: str, outputs: list[Path], work: Callable[[], object]
    ) -> None:
        """Does the work, unless it was done with the same inputs and its outputs are there.

        Args:
            name: of the step in the notes.
            title: what the user reads.
            inputs: digest of all that decides the result.
            outputs: what the step writes; deleted first where it was made from other inputs.
            work: goes on by itself where it was cut off.
        """
        self.say(f"\n== {title}")
        note = self.notes.get(name)
        same = note is not None and note["inputs"] == inputs
        if same and note["done"] and all(path.exists() for path in outputs):
            self.say("done before with the same inputs: skipped")
            return
        if same and not note["done"]:
            self.say("going on where it was cut off")
        if note is not None and not same:
            self.say("its inputs have changed: starting again")
            for path in outputs:
                _remove(path)
        self._note(name, inputs, done=False, seconds=0.0)
        began = time.monotonic()
        work()
        self._note(name, inputs, done=True, seconds=time.monotonic() - began)

    def seconds(self) -> dict[str, float]:
        """How long each step took when it was done."""
        return {name: note["seconds"] for name, note in self.notes.items()}

    def _note(self, name: str, inputs: str, done: bool, seconds: float) -> None:
        self.notes[name] = {"inputs": inputs, "done": done, "seconds": round(seconds, 1)}
        write_whole(self.path, json.dumps(self.notes, indent=1))


def digest(paths: Iterable[Path], *texts: str) -> str:
    """Fingerprint of files, of all files in folders, and of texts."""
    total = hashlib.sha256("\0".join(texts).encode())
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in (file for file in files if file.is_file()):
            total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
