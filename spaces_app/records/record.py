"""What is kept of a request, and the tables that keep it."""

from dataclasses import dataclass, field, fields

TYPES = {str: "TEXT", int: "INTEGER", float: "REAL"}


@dataclass
class Record:
    """One request, without anything that its user typed, showed or said.

    Attributes:
        id, conversation: of the request, and of the conversation that it is a turn of.
        parent: id of the request that was the turn before; empty for a first turn.
        time: when it was asked, in seconds since 1970.
        outcome: "finished", "length", "stopped", "timeout", "refused" or "failed".
        error: class of the error behind the last three; empty when an answer was cut.
        precision, model: of the model, with its revision; empty while there is none.
        resident_bytes: memory of the process when the request ended.
        waited_seconds: in the queue.
        media_seconds, first_token_seconds: since the answer was begun; 0 when none came to its end.
        total_seconds: since it was asked.
        prompt_tokens, reused_tokens, new_tokens: of a whole answer, 0 otherwise.
        waiting: how many were in the queue when it was asked.
        characters, images, recordings: of the question.
        encoded_media: pictures and recordings that had to be looked at or heard now.
    """

    id: str
    conversation: str
    time: float
    parent: str = ""
    outcome: str = ""
    error: str = ""
    precision: str = ""
    model: str = ""
    resident_bytes: int = 0
    waited_seconds: float = 0.0
    media_seconds: float = 0.0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    waiting: int = 0
    characters: int = 0
    images: int = 0
    recordings: int = 0
    encoded_media: int = 0


@dataclass(frozen=True)
class Content:
    """What was typed, shown, said and answered; written only with the user's consent."""

    question: str
    answer: str
    media: list[str] = field(default_factory=list)  # paths


@dataclass(frozen=True)
class Feedback:
    """What a user thinks of an answer.

    Attributes:
        request, conversation: of the answer.
        time: when it was said, in seconds since 1970.
        rating: 1, -1, or 0 when it was taken back.
        reason: what was wrong, in the user's words; None where nothing may be kept.
        correction: what the answer should have been; likewise.
    """

    request: str
    conversation: str
    time: float
    rating: int
    reason: str | None = None
    correction: str | None = None


COLUMNS = [item.name for item in fields(Record)]
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY,
    {", ".join(f"{item.name} {TYPES[item.type]} NOT NULL" for item in fields(Record))},
    question TEXT, answer TEXT, media TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS requests_of ON requests (conversation);
CREATE INDEX IF NOT EXISTS requests_by ON requests (id);
CREATE TABLE IF NOT EXISTS feedback (
    request TEXT PRIMARY KEY, conversation TEXT NOT NULL, time REAL NOT NULL,
    rating INTEGER NOT NULL, reason TEXT, correction TEXT
);
CREATE TABLE IF NOT EXISTS copies (dataset TEXT PRIMARY KEY, cursor INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS deletions (
    dataset TEXT NOT NULL, conversation TEXT NOT NULL, PRIMARY KEY (dataset, conversation)
);
"""
INSERT = (
    f"INSERT INTO requests ({', '.join(COLUMNS)}, question, answer, media) "
    f"VALUES ({', '.join('?' * (len(COLUMNS) + 3))})"
)
# Words stay when only the rating changes, and go with the rating.
RATE = """
INSERT INTO feedback VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (request) DO UPDATE SET
    time = excluded.time, rating = excluded.rating,
    reason = iif(excluded.rating = 0, NULL, coalesce(excluded.reason, reason)),
    correction = iif(excluded.rating = 0, NULL, coalesce(excluded.correction, correction))
"""
NAMED = "FROM requests WHERE id = ? AND conversation = ?"
MISSING = f"{NAMED} AND question IS NULL"
FILL = """
UPDATE requests SET question = ?, answer = ?, media = ?
WHERE id = ? AND conversation = ? AND question IS NULL
"""
DELETE_COPIES = "INSERT OR IGNORE INTO deletions SELECT dataset, ? FROM copies"
