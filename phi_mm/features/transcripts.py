"""What Whisper writes down of a data set's recordings, once for each, kept beside the features.

    <folder>/<fingerprint>/00000.jsonl    a line for each recording: key, text, ids of its words

The key is that of the recording's content, and the fingerprint that of the Whisper that wrote:
another recording or another Whisper gets another transcript, and none is ever stale. Each process
appends to a file of its own, and all read all of them. A torn last line does not count.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Transcript(NamedTuple):
    """What one recording says."""

    text: str  # empty where Whisper wrote no word
    words: list[list[int]]  # for each window the ids of its words


class TranscriptStore:
    """Transcripts by content key.

    Args:
        folder: holds those of every Whisper.
        fingerprint: JSON-like facts that decide what is written.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]):
        facts = json.dumps(fingerprint, sort_keys=True).encode()
        self.folder = folder / hashlib.blake2b(facts, digest_size=16).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, Transcript] = {}
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def __getitem__(self, key: str) -> Transcript:
        """Raises KeyError for a recording that was never written down."""
        return self.known[key]

    def refresh(self) -> None:
        """Reads what other processes have written since."""
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n") and line.strip():
                    key, text, words = json.loads(line).values()
                    self.known[key] = Transcript(text, words)

    def append(self, process: int, written: Iterable[tuple[str, Transcript]]) -> None:
        """Adds lines to the file of a process; they are on disk when this returns."""
        path = self.folder / f"{process:05d}.jsonl"
        with path.open("ab+") as file:
            whole = _whole_lines(path)
            file.truncate(whole)  # what a killed process left behind its last line
            for key, transcript in written:
                line = {"key": key, "text": transcript.text, "words": transcript.words}
                file.write(json.dumps(line).encode() + b"\n")
                self.known[key] = transcript
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1
