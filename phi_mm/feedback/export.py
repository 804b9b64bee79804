"""Consented turns that users corrected or liked -> training rows and an evaluation set."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from phi_mm.datasets.media import audio_fault, image_fault
from phi_mm.feedback.records import Turn, open_records
from phi_mm.files import write_whole

TRAIN, TEST = "train.jsonl", "test.jsonl"


class _LeftOut(Exception):
    """Why a turn gives no row, in words that are counted."""


@dataclass
class Summary:
    """How many rows each file has, and how many rated turns were left out, by reason."""

    rows: Counter = field(default_factory=Counter)
    left_out: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{name}: {self.rows[name]} rows" for name in (TRAIN, TEST)]
        lines += [f"left out: {count} ({why})" for why, count in sorted(self.left_out.items())]
        return "\n".join(lines)


def export(store: str, out: Path, share: float = 0.2, liked: bool = False) -> Summary:
    """Writes `train.jsonl`, `test.jsonl` and `media/`, in the form that training reads.

    A row is a conversation up to a turn that was rated. Its last answer is the corrected one; those
    before are the model's, with weight 0: they are read and not learnt. All turns of a conversation
    are on one side, chosen by a hash of its name, so that later exports choose alike.

    Args:
        store: as `open_records` takes it.
        out: folder to write; must be new or empty. A file of no rows is not written.
        share: of the conversations, for `test.jsonl`.
        liked: also takes whole answers with a thumb up and no correction, as they were given.

    Raises:
        ValueError: bad arguments, no records, or no turn that can be taken.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"got the share {share}, expected one from 0 to 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"got {out}, which holds something: give a new folder, so that nothing stays that was "
            "deleted since"
        )
    summary, lines = Summary(), {TRAIN: [], TEST: []}
    with open_records(store) as turns:
        for turn in turns.values():
            if not turn.rating:
                continue
            side = TEST if _fraction(turn.conversation) < share else TRAIN
            try:
                row = _row(turn, turns, out / "media", liked)
            except _LeftOut as why:
                summary.left_out[str(why)] += 1
            else:
                summary.rows[side] += 1
                lines[side].append(json.dumps(row, ensure_ascii=False))
    if not summary.rows:
        raise ValueError(f"got no turn to export from {store}\n{summary}")
    for name, rows in lines.items():
        if rows:
            write_whole(out / name, "\n".join([*rows, ""]))
    return summary


def _fraction(conversation: str) -> float:
    """Of a conversation's name, from 0 up to 1, and always the same."""
    return int.from_bytes(hashlib.sha256(conversation.encode()).digest()[:6]) / 2**48


def _row(turn: Turn, turns: dict[str, Turn], media: Path, liked: bool) -> dict:
    answer = turn.correction
    if answer is None:
        if turn.rating < 0:
            raise _LeftOut("disliked, without a corrected answer")
        if not liked:
            raise _LeftOut("liked; --liked takes them")
        if turn.outcome != "finished":
            raise _LeftOut("liked, but the answer was cut")
        answer = turn.answer
    if turn.question is None or not (answer or "").strip():
        raise _LeftOut("no consent")
    chain = _chain(turn, turns)
    for one in chain:
        _check_files(one)
    messages = []
    for one in chain:
        messages.append({"role": "user", "content": _question(one, media)})
        messages.append({"role": "assistant", "content": one.answer, "weight": 0})
    messages[-1] = {"role": "assistant", "content": answer}
    return {"id": turn.id, "conversation": turn.conversation, "messages": messages}


def _chain(turn: Turn, turns: dict[str, Turn]) -> list[Turn]:
    """The turns that the model was told of, this one last."""
    chain = [turn]
    while chain[0].parent:
        before = turns.get(chain[0].parent)
        if before is None:
            raise _LeftOut("an earlier turn is gone")
        if before.question is None:
            raise _LeftOut("no consent for an earlier turn")
        chain.insert(0, before)
    return chain


def _check_files(turn: Turn) -> None:
    if len(turn.media) != turn.images + turn.recordings:
        raise _LeftOut("a picture or recording is gone")
    for number, path in enumerate(turn.media):
        fault = (image_fault if number < turn.images else audio_fault)(str(path))
        if fault == "missing":
            raise _LeftOut("a picture or recording is gone")
        if fault and not (number < turn.images and fault.startswith("mislabelled")):
            raise _LeftOut("a picture or recording cannot be trained on")


def _question(turn: Turn, media: Path) -> list[dict]:
    """The parts of the user's message, as the Space said them to the model; copies the files."""
    parts = []
    for number, path in enumerate(turn.media):
        kind, name = "audio", path.name
        if number < turn.images:
            with Image.open(path) as image:  # the name of an upload may not say what it is
                kind, name = "image", f"{path.stem}.{image.format.lower()}"
        media.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, media / name)
        parts.append({"type": kind, kind: f"{media.name}/{name}"})
    return parts + ([{"type": "text", "text": turn.question}] if turn.question else [])
