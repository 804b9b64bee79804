"""Numbers for Prometheus: counted as requests end, and read from the engine when they are asked."""

import logging
import sqlite3
from collections.abc import Iterator

from engine.service import Engine
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from records.record import Record

from .queries import Records

log = logging.getLogger("phi-mm")
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)


class Metrics:
    """Everything that `/metrics` tells; `registry` holds it."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, open files
        about = {"registry": self.registry, "namespace": "phi_mm"}
        self._requests = Counter(
            "requests",
            "Requests that ended",
            ["outcome", "error", "precision", "model"],
            **about,
        )
        self._waited = Histogram("waited_seconds", "In the queue", buckets=SECONDS, **about)
        self._first_token = Histogram(
            "first_token_seconds", "From question to first token", buckets=SECONDS, **about
        )
        self._total = Histogram(
            "total_seconds", "From question to the answer's end", buckets=SECONDS, **about
        )
        self._tokens = Counter("tokens", "Tokens of whole answers", ["kind"], **about)
        self._media = Counter("media", "Pictures and recordings asked about", ["kind"], **about)
        self._encoded = Counter("encoded_media", "Media that passed a tower", **about)

    def watch(self, record: Record) -> None:
        """Counts a request; a watcher of `Journal`."""
        self._requests.labels(record.outcome, record.error, record.precision, record.model).inc()
        self._waited.observe(record.waited_seconds)
        self._total.observe(record.total_seconds)
        if record.new_tokens:
            self._first_token.observe(record.waited_seconds + record.first_token_seconds)
        for kind, count in (
            ("prompt", record.prompt_tokens),
            ("reused", record.reused_tokens),
            ("new", record.new_tokens),
        ):
            self._tokens.labels(kind).inc(count)
        self._media.labels("picture").inc(record.images)
        self._media.labels("recording").inc(record.recordings)
        self._encoded.inc(record.encoded_media)

    def read(self, engine: Engine, records: Records | None) -> None:
        """Tells also what the engine is doing, and what is in the store where there is one."""
        self.registry.register(_Now(engine, records))


class _Now(Collector):
    """What is so at the moment of asking."""

    def __init__(self, engine: Engine, records: Records | None):
        self.engine, self.records = engine, records

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, about, value in (
            ("waiting", "Requests in the queue", self.engine.waiting),
            ("answering", "Requests that are answered now", self.engine.answering),
            ("ready", "1 when the model answers", self.engine.ready),
            (
                "records_not_stored",
                "Records lost since the store failed; 0 when it works",
                self.engine.journal.lost,
            ),
        ):
            yield GaugeMetricFamily(f"phi_mm_{name}", about, value)
        if self.records is not None:
            yield from self._stored()

    def _stored(self) -> Iterator[GaugeMetricFamily]:
        try:
            rows, size = self.records.size()
            good, bad = self.records.ratings()
        except (OSError, sqlite3.Error) as error:
            log.error("the store cannot be read for /metrics: %s", error)
            return
        yield GaugeMetricFamily("phi_mm_store_rows", "Records in the store", rows)
        yield GaugeMetricFamily("phi_mm_store_bytes", "Size of the store with its media", size)
        feedback = GaugeMetricFamily("phi_mm_feedback", "Answers by thumb", labels=["rating"])
        feedback.add_metric(["up"], good)
        feedback.add_metric(["down"], bad)
        yield feedback
