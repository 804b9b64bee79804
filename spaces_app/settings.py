"""What the owner sets, by environment variables; README.md lists them."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.media import MILLION, MediaLimits
from engine.precision import AUTO, ON_CPU, ON_GPU
from engine.service import Limits
from monitoring.alerts import Bounds

COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
MEGABYTE = 1 << 20
SHORTEST_SECRET = 16  # ten guesses a minute do not find it


@dataclass(frozen=True)
class Settings:
    """Everything that can be set.

    Attributes:
        model: the artefact, a folder or a Hub id.
        revision: the commit of a Hub id.
        precision: one of engine.precision's, or "auto".
        media_bytes, prefix_bytes: memory for what was seen and heard, and for conversations.
        limits: of queue and time.
        upload_bytes: largest file that is taken.
        media: of the files that are opened.
        store, log_rows: folder of the records of requests, None to keep none, and how many to keep.
        dataset, dataset_minutes: Hub id of the data set that they are copied to, None for none, and
            how often.
        alerts: when to warn in the log.
        owner_secret: opens the dashboard and /metrics; None when they are closed.
    """

    model: str
    revision: str | None
    precision: str
    media_bytes: int
    prefix_bytes: int
    limits: Limits
    upload_bytes: int
    media: MediaLimits
    store: Path | None
    log_rows: int
    dataset: str | None
    dataset_minutes: int
    alerts: Bounds
    owner_secret: str | None = field(repr=False)

    @classmethod
    def read(cls, given: Mapping[str, str] = os.environ) -> "Settings":
        """The settings in the environment.

        Raises:
            ValueError: the model is missing or not pinned, or a value is none.
        """
        model, revision = given.get("PHI_MM_MODEL"), given.get("PHI_MM_REVISION")
        if not model:
            raise ValueError("got no PHI_MM_MODEL, expected an artefact: a folder or a Hub id")
        if not Path(model).is_dir() and not COMMIT.fullmatch(revision or ""):
            raise ValueError(
                f"got PHI_MM_MODEL={model}, which is no folder here, with PHI_MM_REVISION="
                f"{revision}, expected the 40 digits of a commit on the Hub: the model's code is "
                "run, and must not change without the owner"
            )
        precision = given.get("PHI_MM_PRECISION", AUTO)
        if precision not in (AUTO, *ON_GPU, *ON_CPU):
            raise ValueError(
                f"got PHI_MM_PRECISION={precision}, expected one of {AUTO}, "
                f"{', '.join((*ON_GPU, *ON_CPU))}"
            )
        dataset = given.get("PHI_MM_DATASET") or None
        if dataset and not (REPOSITORY.fullmatch(dataset) and given.get("PHI_MM_STORE")):
            raise ValueError(
                f"got PHI_MM_DATASET={dataset} with PHI_MM_STORE={given.get('PHI_MM_STORE')}, "
                "expected OWNER/NAME, and a folder for the records that are copied there"
            )
        limits = Limits(
            _number(given, "PHI_MM_WAITING", Limits.waiting),
            _number(given, "PHI_MM_TOGETHER", Limits.together),
            _number(given, "PHI_MM_WAIT_SECONDS", Limits.wait_seconds),
            _number(given, "PHI_MM_ANSWER_SECONDS", Limits.answer_seconds),
        )
        media = MediaLimits(
            _number(given, "PHI_MM_PICTURE_MEGAPIXELS", MediaLimits.pixels / MILLION) * MILLION,
            _number(given, "PHI_MM_RECORDING_SECONDS", MediaLimits.seconds),
        )
        return cls(
            model=model,
            revision=revision,
            precision=precision,
            media_bytes=_number(given, "PHI_MM_MEDIA_MB", 256) * MEGABYTE,
            prefix_bytes=_number(given, "PHI_MM_PREFIX_MB", 3072) * MEGABYTE,
            limits=limits,
            upload_bytes=_number(given, "PHI_MM_UPLOAD_MB", 32) * MEGABYTE,
            media=media,
            store=Path(given["PHI_MM_STORE"]) if given.get("PHI_MM_STORE") else None,
            log_rows=_number(given, "PHI_MM_LOG_ROWS", 100_000),
            dataset=dataset,
            dataset_minutes=_number(given, "PHI_MM_DATASET_MINUTES", 5),
            alerts=Bounds(
                _number(given, "PHI_MM_ALERT_ERRORS", Bounds.errors),
                _number(given, "PHI_MM_ALERT_FIRST_TOKEN_SECONDS", Bounds.first_token_seconds),
                _number(given, "PHI_MM_ALERT_DISK_MB", Bounds.disk_megabytes),
            ),
            owner_secret=_secret(given),
        )


def _secret(given: Mapping[str, str]) -> str | None:
    secret = given.get("PHI_MM_OWNER_SECRET") or None
    if secret is not None and len(secret) < SHORTEST_SECRET:
        raise ValueError(
            f"got a PHI_MM_OWNER_SECRET of {len(secret)} characters, expected "
            f"{SHORTEST_SECRET} or more, which nobody guesses"
        )
    return secret


def _number(given: Mapping[str, str], name: str, default: float) -> int:
    text = given.get(name, str(round(default)))
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"got {name}={text}, expected a whole number of 1 or more")
    return int(text)
