"""One raw training row (LLaVA json or HF style) -> messages made of text, image and audio parts."""

import json
import re
from collections.abc import Callable
from typing import Any

# The marker takes the whitespace around it along: the chat template sets its own spacing.
MARKER = re.compile(r"\s*<(image|audio)>\s*")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
TURNS = ("conversations", "messages")
MEDIA = {"image": ("image", "images"), "audio": ("audio", "audios")}
UNREADABLE = ("video", "videos", "tools")

# Rough sizes in tokens, good enough to group rows of like length; nothing else reads them.
CHARACTERS_PER_TOKEN = 4
TOKENS_PER_IMAGE = 144
TOKENS_PER_AUDIO = 50

Message = dict[str, Any]
Medium = dict[str, Any]  # {"bytes": bytes or None, "path": str or None}, as `datasets` stores media


class PlaceholderError(ValueError):
    """A row has other numbers of markers and of media."""


def to_messages(row: dict, place: Callable[[Medium], str]) -> list[Message]:
    """Turn one row into messages; `<image>` and `<audio>` become parts exactly where they stand.

    Args:
        row: `conversations` of `{from, value}` (haotian-liu/LLaVA) or `messages` of `{role,
            content}`, where content is a string or a list of parts (Hugging Face); media beside
            them in `image`/`images`/`audio`/`audios`: a path, `{bytes, path}`, bytes, or a list of
            these; `system`, where no turn has that role (LLaMA-Factory). An assistant's turn with
            `"weight": 0` is read and not learnt.
        place: says where a medium is to be found, as an absolute path or URL.

    Returns:
        `[{"role", "content": [{"type", <type>: payload}]}]`, the payload being the text or the
        place of the medium; with `"weight": 0` where it was given.

    Raises:
        PlaceholderError: other numbers of markers and of media.
        ValueError: anything else that is wrong with the row.
    """
    turns = _turns(row)
    media = {kind: _collect(row, columns) for kind, columns in MEDIA.items()}
    waiting = {kind: list(items) for kind, items in media.items()}
    needed = dict.fromkeys(MEDIA, 0)
    messages = []
    for turn in turns:
        role, content = _role_and_content(turn)
        parts = _parts(content, markers=role == "user")
        for part in parts:
            kind = part["type"]
            if kind in MEDIA and part[kind] is None:
                needed[kind] += 1
                part[kind] = waiting[kind].pop(0) if waiting[kind] else None
        messages.append({"role": role, "content": parts, **_weight(turn, role)})
    for kind, count in needed.items():
        if count != len(media[kind]):
            raise PlaceholderError(
                f"got {count} <{kind}> markers and {len(media[kind])} {kind} files, "
                "expected as many markers as files"
            )
    _check_order(messages)
    for part in (part for message in messages for part in message["content"]):
        if part["type"] in MEDIA:
            part[part["type"]] = place(part[part["type"]])
    return messages


def estimate_length(messages: list[Message]) -> int:
    """Cheap estimate of a row's length in tokens, from its characters and its media."""
    parts = [part for message in messages for part in message["content"]]
    kinds = [part["type"] for part in parts]
    characters = sum(len(part["text"]) for part in parts if part["type"] == "text")
    return (
        characters // CHARACTERS_PER_TOKEN
        + TOKENS_PER_IMAGE * kinds.count("image")
        + TOKENS_PER_AUDIO * kinds.count("audio")
    )


def _turns(row: dict) -> list[dict]:
    for name in UNREADABLE:
        if row.get(name):
            raise ValueError(f"got a row with {name!r}, expected text, images and audio only")
    turns = next((row[name] for name in TURNS if row.get(name)), None)
    if isinstance(turns, str):  # a column of the Hub's json type arrives as its text
        turns = json.loads(turns)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"got no turns, expected a list of them under {' or '.join(TURNS)}")
    system = row.get("system")
    if isinstance(system, str) and system.strip() and "system" not in map(_speaker, turns):
        turns = [{"role": "system", "content": system}, *turns]
    return turns


def _speaker(turn: dict) -> Any:
    return turn.get("from") or turn.get("role")


def _collect(row: dict, columns: tuple[str, ...]) -> list[Medium]:
    """All media of one kind, in order, as `{bytes, path}`."""
    items = []
    for value in (row.get(column) for column in columns):
        items += value if isinstance(value, list) else [value] if value else []
    return [_medium(item) for item in items]


def _medium(item: Any) -> Medium:
    if isinstance(item, str) and item:
        return {"bytes": None, "path": item}
    if isinstance(item, bytes) and item:
        return {"bytes": item, "path": None}
    if isinstance(item, dict) and (item.get("bytes") or item.get("path")):
        return {"bytes": item.get("bytes"), "path": item.get("path")}
    raise ValueError(f"got media {item!r:.80}, expected a path or {{bytes, path}}")


def _role_and_content(turn: dict) -> tuple[str, Any]:
    name = _speaker(turn)
    if name not in ROLES:
        raise ValueError(f"got a turn by {name!r}, expected one of {', '.join(ROLES)}")
    content = turn["value"] if turn.get("value") is not None else turn.get("content")
    if isinstance(content, (str, list)):
        return ROLES[name], content
    raise ValueError(f"got content {content!r:.80}, expected a string or a list of parts")


def _weight(turn: dict, role: str) -> dict[str, int]:
    weight = turn.get("weight")
    if weight in (None, 1):
        return {}
    if weight != 0 or role != "assistant":
        raise ValueError(
            f"got the weight {weight!r} in the {role}'s turn, expected 0 or 1 in an assistant's"
        )
    return {"weight": 0}


def _parts(content: str | list, markers: bool) -> list[dict]:
    """Content -> parts; a medium that is only marked, not given, has the payload None."""
    if isinstance(content, list):
        return [_given_part(part) for part in content]
    if not markers:  # an assistant that writes "<image>" means the word
        return [{"type": "text", "text": content}]
    # re.split with one group gives text, kind, text, kind, ..., text
    pieces = MARKER.split(content)
    parts = []
    for position, piece in enumerate(pieces):
        if position % 2:
            parts.append({"type": piece, piece: None})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _given_part(part: Any) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in MEDIA:
        payload = part.get(kind) or part.get("path")
        return {"type": kind, kind: _medium(payload) if payload else None}
    raise ValueError(f"got the part {part!r:.80}, expected type text, image or audio")


def _check_order(messages: list[Message]) -> None:
    """[system,] user, assistant, user, assistant, ...: and every turn says something."""
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or spoken != expected:
        raise ValueError(
            f"got the turns {', '.join(roles)}; expected user and assistant in turn, "
            "the user first and an answer last"
        )
    for number, message in enumerate(messages, start=1):
        if not any(part.get("text", "media").strip() for part in message["content"]):
            raise ValueError(f"got an empty turn (number {number}, {message['role']})")
        if message["role"] != "user" and any(p["type"] != "text" for p in message["content"]):
            raise ValueError(f"got media in the {message['role']}'s turn, expected text only")
