"""Rules that speak up in the log: errors, slow answers, a disk that fills."""

import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from records.record import Record

log = logging.getLogger("phi-mm.alerts")
WINDOW_SECONDS = 300.0
MOST_REQUESTS = 10_000  # in memory
FEWEST_REQUESTS = 10  # or one error of one would be 100%
CHECK_SECONDS = 10.0
FAILED = ("failed", "timeout")  # what is refused is the user's mistake, or the queue's length
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Bounds:
    """When to speak up.

    Attributes:
        errors: percent of the requests of the last five minutes.
        first_token_seconds: from question to first token, for 95 of 100 answers.
        disk_megabytes: that are free at the store.
    """

    errors: int = 20
    first_token_seconds: int = 30
    disk_megabytes: int = 500


class Alerts:
    """Says once when a number is past its bound, and once when it is back.

    Args:
        bounds: of each rule.
        folder: of the store, whose disk is looked at; None for none.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self, bounds: Bounds, folder: Path | None, clock: Callable[[], float] = time.monotonic
    ):
        self.bounds, self.folder, self._clock = bounds, folder, clock
        self._window: deque[tuple[float, bool, float]] = deque(maxlen=MOST_REQUESTS)
        self._lock = threading.Lock()
        self._begun: set[str] = set()

    def watch(self, record: Record) -> None:
        """Takes a request into the window; a watcher of `Journal`."""
        seconds = record.waited_seconds + record.first_token_seconds if record.new_tokens else 0.0
        with self._lock:
            self._window.append((self._clock(), record.outcome in FAILED, seconds))

    def start(self) -> None:
        """Checks from now on, in the background, as long as the process lives."""
        threading.Thread(target=self._work, name="alerts", daemon=True).start()

    def check(self) -> None:
        """Says what began or ended since the last time."""
        for name, past, words, remedy in self._rules():
            if past and name not in self._begun:
                self._begun.add(name)
                log.warning("%s: %s: %s", name, words, remedy)
            elif not past and name in self._begun:
                self._begun.remove(name)
                log.warning("%s: over, %s", name, words)

    def _work(self) -> None:
        while True:
            time.sleep(CHECK_SECONDS)
            self.check()

    def _rules(self) -> Iterator[tuple[str, bool, str, str]]:
        """Name, whether it is past its bound, both numbers in words, and what to do."""
        since = self._clock() - WINDOW_SECONDS
        with self._lock:
            while self._window and self._window[0][0] <= since:
                self._window.popleft()
            window = list(self._window)
        bounds, known = self.bounds, len(window) >= FEWEST_REQUESTS
        few = f"fewer than {FEWEST_REQUESTS} requests in 5 minutes"
        percent = 100 * sum(failed for _, failed, _ in window) / max(len(window), 1)
        yield (
            "errors",
            known and percent > bounds.errors,
            f"{percent:.0f}% of {len(window)} requests, bound {bounds.errors}%" if known else few,
            "look for the exceptions in the log, and for what the questions have in common",
        )
        times = [seconds for _, _, seconds in window if seconds]
        known = len(times) >= FEWEST_REQUESTS
        slow = float(np.quantile(times, 0.95)) if known else 0.0
        yield (
            "first token",
            known and slow > bounds.first_token_seconds,
            f"{slow:.1f} s for 95 of 100 answers, bound {bounds.first_token_seconds} s"
            if known
            else few,
            "take better hardware or a smaller model, or let fewer wait (PHI_MM_WAITING)",
        )
        if self.folder is not None:
            free = _free_bytes(self.folder) // MEGABYTE
            yield (
                "disk",
                free < bounds.disk_megabytes,
                f"{free} MB are free at {self.folder}, bound {bounds.disk_megabytes} MB",
                "keep fewer records (PHI_MM_LOG_ROWS), or take a bigger disk",
            )


def _free_bytes(folder: Path) -> int:
    """Of the disk that it is on, or will be when it is made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free
