"""Alerts: said once when they begin, once when they end, and not for a single bad luck."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from monitoring.alerts import FEWEST_REQUESTS, WINDOW_SECONDS, Alerts, Bounds
from records.record import Record
from settings import Settings


@pytest.fixture
def clock() -> list[float]:
    return [1000.0]


@pytest.fixture
def alerts(clock: list[float]) -> Alerts:
    return Alerts(Bounds(20, 30, 1), None, clock=lambda: clock[0])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture):
    """What was said since it was last asked."""
    caplog.set_level(logging.INFO, "phi-mm.alerts")

    def take() -> list[str]:
        words = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return words

    return take


def ask(alerts: Alerts, count: int, outcome: str = "finished", first: float = 1.0) -> None:
    tokens = 5 if outcome == "finished" else 0
    record = Record("r", "a", 0.0, outcome=outcome, first_token_seconds=first, new_tokens=tokens)
    for _ in range(count):
        alerts.watch(record)


def test_errors_begin_and_end_once(alerts, clock, said) -> None:
    ask(alerts, FEWEST_REQUESTS - 1, "failed")
    alerts.check()
    assert said() == []  # too few to say
    ask(alerts, 1, "timeout")
    alerts.check()
    alerts.check()
    (words,) = said()
    assert words.startswith("errors: 100% of 10 requests, bound 20%: look for the exceptions")
    ask(alerts, 40)
    alerts.check()
    assert said() == ["errors: over, 20% of 50 requests, bound 20%"]
    ask(alerts, 1, "failed")
    alerts.check()
    assert said()[0].startswith("errors: 22% of 51 requests, bound 20%")
    clock[0] += WINDOW_SECONDS
    alerts.check()
    assert said() == ["errors: over, fewer than 10 requests in 5 minutes"]


def test_what_users_do_wrong_is_no_error(alerts, said) -> None:
    ask(alerts, 20, "refused")
    ask(alerts, 20, "stopped")
    alerts.check()
    assert said() == []


def test_slow_first_tokens(alerts, said) -> None:
    waited = Record("r", "a", 0.0, outcome="finished", waited_seconds=39.0, new_tokens=5)
    ask(alerts, 18)
    for _ in range(2):
        alerts.watch(replace(waited, first_token_seconds=1.0))
    ask(alerts, 20, "refused")  # has no first token
    alerts.check()
    # Of 20 the 95th percentile lies at 0.95 * 19 = 18.05, between two that took 40 s.
    assert said() == [
        "first token: 40.0 s for 95 of 100 answers, bound 30 s: take better hardware or a "
        "smaller model, or let fewer wait (PHI_MM_WAITING)"
    ]
    ask(alerts, 80)
    alerts.check()
    assert said() == ["first token: over, 1.0 s for 95 of 100 answers, bound 30 s"]


def test_a_disk_that_fills(tmp_path: Path, said) -> None:
    folder = tmp_path / "not" / "made yet"
    alerts = Alerts(Bounds(disk_megabytes=10**9), folder)
    alerts.check()
    alerts.check()
    (words,) = said()
    assert words.startswith("disk: ") and "keep fewer records (PHI_MM_LOG_ROWS)" in words
    assert f"MB are free at {folder}, bound {10**9} MB" in words
    alerts.bounds = Bounds(disk_megabytes=1)
    alerts.check()
    (words,) = said()
    assert words.startswith("disk: over, ") and words.endswith("bound 1 MB")


def test_settings_of_watching(tmp_path: Path) -> None:
    given = {"PHI_MM_MODEL": str(tmp_path)}
    settings = Settings.read(given)
    assert settings.alerts == Bounds(errors=20, first_token_seconds=30, disk_megabytes=500)
    assert settings.owner_secret is None
    names = ("ERRORS", "FIRST_TOKEN_SECONDS", "DISK_MB")
    given |= {f"PHI_MM_ALERT_{name}": str(number) for number, name in enumerate(names, start=5)}
    settings = Settings.read(given | {"PHI_MM_OWNER_SECRET": "0123456789abcdef"})
    assert settings.alerts == Bounds(5, 6, 7) and settings.owner_secret == "0123456789abcdef"
    assert settings.owner_secret not in repr(settings)
    with pytest.raises(ValueError, match="SECRET of 15 characters, expected 16 or more"):
        Settings.read(given | {"PHI_MM_OWNER_SECRET": "0123456789abcde"})
