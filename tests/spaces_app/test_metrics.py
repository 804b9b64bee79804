"""What /metrics tells, to whom, and that the shipped Grafana dashboard asks for just that."""

import asyncio
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import promql_parser
import pytest
from app import routes
from engine.generation import Generator, Request
from engine.service import Engine, Limits
from monitoring.metrics import Metrics
from monitoring.owner import MOST_WRONG, WRONG_SECONDS, Owner
from monitoring.queries import Records
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from records.journal import Journal
from records.record import Feedback, Record
from records.store import Store
from starlette.applications import Starlette
from starlette.testclient import TestClient

from .conftest import user

GRAFANA = Path(__file__).parents[2] / "spaces_app" / "monitoring" / "grafana.json"
SECRET = "a long secret of mine"


def told(metrics: Metrics) -> list[Sample]:
    """What a scrape finds."""
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return [sample for family in families for sample in family.samples]


def value(samples: list[Sample], name: str, **labels: str) -> float:
    (found,) = [s.value for s in samples if s.name == name and s.labels == labels]
    return found


@pytest.fixture(scope="module")
def watched(loaded, media, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """An engine that answered two turns, refused a question and failed on one; with two thumbs."""
    folder, metrics, records = tmp_path_factory.mktemp("watched"), Metrics(), []
    store = Store(folder, 100)
    journal = Journal(store, [metrics.watch, records.append])
    load = partial(Generator, *loaded, 1 << 30, 1 << 30, name="toy@0123abc")
    engine = Engine(load, Limits(), journal)
    metrics.read(engine, Records(folder))
    engine.start()
    engine.wait_until_loaded()

    async def ask(*parts: str) -> None:
        async for _ in engine.stream(Request("a", [user(*parts)], 6)):
            pass

    asyncio.run(ask(f"{media}/0.png", f"{media}/1.wav", "what?"))
    asyncio.run(ask(f"{media}/0.png", f"{media}/1.wav", "what is it?"))
    with pytest.raises(ValueError):
        asyncio.run(ask("x" * 2100))
    reader, engine.generator.reader.read = engine.generator.reader.read, None
    with pytest.raises(ValueError):
        asyncio.run(ask("hello"))
    engine.generator.reader.read = reader
    for record, rating in zip(records, (1, -1, 0), strict=False):
        store.rate(Feedback(record.id, "a", 1.0, rating), {})
    yield SimpleNamespace(engine=engine, metrics=metrics, records=records, folder=folder)
    engine.close()


def test_metrics_are_the_records_and_the_engine(watched) -> None:
    samples, records = told(watched.metrics), watched.records
    model = {"precision": "fp32", "model": "toy@0123abc"}
    for outcome, error, count in (
        ("length", "", 2),
        ("refused", "ValueError", 1),
        ("failed", "TypeError", 1),
    ):
        labels = {"outcome": outcome, "error": error, **model}
        assert value(samples, "phi_mm_requests_total", **labels) == count
    for kind in ("prompt", "reused", "new"):
        total = sum(getattr(record, f"{kind}_tokens") for record in records)
        assert value(samples, "phi_mm_tokens_total", kind=kind) == total > 0
    assert value(samples, "phi_mm_media_total", kind="picture") == 2
    assert value(samples, "phi_mm_media_total", kind="recording") == 2
    assert value(samples, "phi_mm_encoded_media_total") == 2
    assert value(samples, "phi_mm_waited_seconds_count") == 4
    total = sum(record.total_seconds for record in records)
    assert value(samples, "phi_mm_total_seconds_sum") == pytest.approx(total)
    assert value(samples, "phi_mm_first_token_seconds_count") == 2
    first = sum(record.waited_seconds + record.first_token_seconds for record in records[:2])
    assert value(samples, "phi_mm_first_token_seconds_sum") == pytest.approx(first)
    for name, expected in (("waiting", 0), ("answering", 0), ("ready", 1), ("store_rows", 4)):
        assert value(samples, f"phi_mm_{name}") == expected
    assert value(samples, "phi_mm_records_not_stored") == 0
    files = sum(path.stat().st_size for path in watched.folder.rglob("*") if path.is_file())
    assert value(samples, "phi_mm_store_bytes") == files
    assert value(samples, "phi_mm_feedback", rating="up") == 1
    assert value(samples, "phi_mm_feedback", rating="down") == 1
    assert value(samples, "process_resident_memory_bytes") > 1 << 26


def matches(sample: Sample, selector: promql_parser.VectorSelector) -> bool:
    """Whether Prometheus would select a sample; a missing label is empty to it."""
    if sample.name != selector.name:
        return False
    operations = promql_parser.MatchOp
    labels = sample.labels | {"job": "the space"}
    for matcher in selector.matchers.matchers:
        given = labels.get(matcher.name, "")
        equal = given == matcher.value
        if matcher.op in (operations.Re, operations.NotRe):
            equal = re.fullmatch(matcher.value, given) is not None
        if equal != (matcher.op in (operations.Equal, operations.Re)):
            return False
    return True


def test_every_query_of_the_grafana_dashboard_finds_something(watched) -> None:
    samples, panels = told(watched.metrics), json.loads(GRAFANA.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 15
    asked = set()
    for panel in panels:
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "5m").replace("$job", "the space")
            selectors: list[promql_parser.VectorSelector] = []
            grouped: set[str] = set()

            def visit(node, selectors=selectors, grouped=grouped) -> bool:
                if isinstance(node, promql_parser.MatrixSelector):
                    assert node.vector_selector.name.endswith(("_total", "_bucket"))
                    selectors.append(node.vector_selector)
                elif isinstance(node, promql_parser.VectorSelector):
                    selectors.append(node)
                elif isinstance(node, promql_parser.AggregateExpr) and node.modifier:
                    grouped.update(node.modifier.labels)
                return True

            promql_parser.walk(promql_parser.parse(query), visit)
            assert selectors, query
            for selector in selectors:
                found = [sample for sample in samples if matches(sample, selector)]
                assert found, f"{panel['title']}: nothing is exposed for {selector}"
                known = {name for sample in found for name in sample.labels}
                named = {matcher.name for matcher in selector.matchers.matchers} - {"job"}
                assert named <= known and grouped <= known, query
                asked.add(selector.name)
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert legend <= (grouped or known), query
            assert ("histogram_quantile" in query) == ("le" in grouped)
    ours = {sample.name for sample in samples if not sample.name.endswith(("_created", "_sum"))}
    ours = {name for name in ours if name.startswith("phi_mm_") and not name.endswith("_count")}
    assert ours <= asked, "the dashboard shows all that there is"


def test_metrics_are_the_owners(watched) -> None:
    now = [0.0]

    def client(secret: str | None) -> TestClient:
        owner = Owner(secret, clock=lambda: now[0])
        return TestClient(Starlette(routes=routes(watched.engine, watched.metrics, owner)))

    closed = client(None).get("/metrics", headers={"Authorization": "Bearer "})
    assert closed.status_code == 403 and "got no PHI_MM_OWNER_SECRET" in closed.text
    space = client(SECRET)
    right = {"Authorization": f"Bearer {SECRET}"}
    for _ in range(2 * MOST_WRONG):  # no guess, so not counted
        answer = space.get("/metrics")
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    answer = space.get("/metrics", headers=right)
    assert answer.status_code == 200 and "phi_mm_ready 1.0" in answer.text
    for number in range(MOST_WRONG):
        wrong = space.get("/metrics", headers={"Authorization": f"Bearer {number}"})
        assert wrong.status_code == 401 and "phi_mm" not in wrong.text
    late = space.get("/metrics", headers=right)
    assert late.status_code == 429 and "try again in a minute" in late.text
    now[0] += WRONG_SECONDS
    assert space.get("/metrics", headers=right).status_code == 200


def test_a_broken_store_and_none_leave_the_rest(tmp_path: Path, caplog) -> None:
    for folder in (tmp_path, None):
        metrics, journal = Metrics(), Journal()
        metrics.read(Engine(None, Limits(), journal), Records(folder) if folder else None)
        metrics.watch(Record("r", "a", 0.0, outcome="failed", error="E"))
        (tmp_path / "requests.sqlite3").write_text("this is no database " * 100)
        samples = told(metrics)
        assert value(samples, "phi_mm_ready") == 0
        assert value(samples, "phi_mm_first_token_seconds_count") == 0
        assert not any(sample.name.startswith("phi_mm_store") for sample in samples)
    assert "the store cannot be read for /metrics: file is not a database" in caplog.text
