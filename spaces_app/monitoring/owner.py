"""Who may look: whoever knows the owner's secret."""

import hmac
import logging
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger("phi-mm")
MOST_WRONG = 10
WRONG_SECONDS = 60.0


class Owner:
    """Compares what is given with the owner's secret.

    Wrong ones are counted for all who try, because an address is easily changed.

    Args:
        secret: None when there is none: nobody is let in.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(self, secret: str | None, clock: Callable[[], float] = time.monotonic):
        self._secret, self._clock = secret, clock
        self._wrong: deque[float] = deque()
        self._lock = threading.Lock()

    @property
    def known(self) -> bool:
        """Whether there is a secret."""
        return self._secret is not None

    def admit(self, given: str) -> bool:
        """Whether it is the secret.

        Raises:
            ValueError: there is none, or too many wrong ones were given by now; says what to do.
        """
        if self._secret is None:
            raise ValueError(
                "got no PHI_MM_OWNER_SECRET, without which nobody is let in: set it as a secret "
                "of the Space, 16 characters or more"
            )
        with self._lock:
            now = self._clock()
            while self._wrong and self._wrong[0] <= now - WRONG_SECONDS:
                self._wrong.popleft()
            if len(self._wrong) >= MOST_WRONG:
                raise ValueError(
                    f"{MOST_WRONG} wrong secrets were given within {WRONG_SECONDS:.0f} s: try "
                    "again in a minute"
                )
            if hmac.compare_digest(given.encode(errors="replace"), self._secret.encode()):
                return True
            self._wrong.append(now)
            log.warning("a wrong secret was given: number %d in a minute", len(self._wrong))
            return False
