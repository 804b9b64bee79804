"""The Space: loads an artefact, answers those who ask, and shows a page to talk.

PHI_MM_MODEL=artefact python app.py
"""

import contextlib
import logging
import os
import signal
import sqlite3
import sys
import time
from dataclasses import replace
from pathlib import Path

try:  # before anything that may start CUDA
    import spaces
except ImportError:  # not on the Hub
    spaces = None

from door import Door
from engine.generation import Generator
from engine.loading import load
from engine.precision import choose
from engine.service import Engine
from engine.zero import LentGenerator
from gradio.utils import get_upload_folder
from monitoring import shown
from monitoring.alerts import Alerts
from monitoring.metrics import Metrics
from monitoring.owner import Owner
from monitoring.queries import Records
from pages import dashboard
from pages.chat import ChatPage
from pages.look import CSS, HEAD, JS, theme
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from records.hub_copy import HubCopy
from records.journal import Journal
from records.store import Store
from settings import Settings
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from transformers import PreTrainedModel

log = logging.getLogger("phi-mm")
SPARE_THREADS = 40  # Gradio's tasks beside the questions that wait, so that none waits unseen
SESSIONS = 1000  # conversations that Gradio keeps in memory
ON_ZERO_GPU = spaces is not None and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "true")


def make_generator(settings: Settings) -> Generator | LentGenerator:
    """The model in the precision that suits the machine.

    Raises:
        ValueError: it does not fit.
    """
    stores = settings.media_bytes + settings.prefix_bytes
    choice = choose(settings.model, settings.revision, settings.precision, stores)
    log.info("%s", choice)
    model, processor = load(settings.model, settings.revision, choice.precision)
    generator = Generator(
        model,
        processor,
        settings.media_bytes,
        settings.prefix_bytes,
        about=f"{Path(settings.model).name} in {choice.precision}, {_senses(model)}",
        precision=choice.precision,
        name=_revision(settings),
        limits=settings.media,
    )
    return LentGenerator(generator, spaces.GPU) if ON_ZERO_GPU else generator


def _revision(settings: Settings) -> str:
    """Name of the model with its commit, or of a folder with the time it was written."""
    if settings.revision is not None:
        return f"{settings.model}@{settings.revision[:7]}"
    folder = Path(settings.model)
    written = time.gmtime((folder / "config.json").stat().st_mtime)
    return f"{folder.name}@{time.strftime('%Y-%m-%dT%H:%M', written)}"


def _senses(model: PreTrainedModel) -> str:
    """What it takes beside text, and how recordings reach it."""
    sees = ["sees pictures"] if model.config.vision_config is not None else []
    if model.config.audio_config is not None:
        hears = model.config.audio_route == "encoder"
        sees.append("hears recordings" if hears else "reads what Whisper heard in recordings")
    return " and ".join(sees) or "takes text alone"


def routes(engine: Engine, metrics: Metrics, owner: Owner) -> list[Route]:
    """/health: the process works. /ready: the model answers. /metrics: numbers for the owner."""

    def health(request: Request) -> JSONResponse:
        return _answer(engine, engine.alive)

    def ready(request: Request) -> JSONResponse:
        return _answer(engine, engine.ready)

    def measured(request: Request) -> Response:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        try:  # nothing is no wrong guess, which would count
            right = owner.admit(given) if kind.lower() == "bearer" or not owner.known else False
        except ValueError as error:
            return PlainTextResponse(str(error), 429 if owner.known else 403)
        if not right:
            return PlainTextResponse(
                "send the owner's secret: Authorization: Bearer SECRET",
                status_code=401,
                headers={"WWW-Authenticate": "Bearer"},
            )
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return [Route("/health", health), Route("/ready", ready), Route("/metrics", measured)]


def _answer(engine: Engine, good: bool) -> JSONResponse:
    told = {"state": engine.describe(), "waiting": engine.waiting, "answering": engine.answering}
    return JSONResponse(told, status_code=200 if good else 503)


def make_copy(settings: Settings, store: Store | None) -> HubCopy | contextlib.nullcontext[None]:
    """Copies the records to the Hub while its block runs, where that is asked for.

    Raises:
        ValueError: they would be public.
    """
    if settings.dataset is None:
        return contextlib.nullcontext()
    try:
        return HubCopy(store, settings.dataset, settings.dataset_minutes)
    except (OSError, sqlite3.Error) as error:
        log.error("records are not copied to %s, for the store fails: %s", settings.dataset, error)
        return contextlib.nullcontext()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    lines = logging.StreamHandler()  # of JSON, as they are
    logging.getLogger("phi-mm.requests").addHandler(lines)
    logging.getLogger("phi-mm.requests").propagate = False
    try:
        settings = Settings.read()
        store = Store(settings.store, settings.log_rows) if settings.store else None
        copying = make_copy(settings, store)
        # On ZeroGPU here and now: `spaces` pretends a GPU to this thread alone, and takes the
        # weights when the page is launched.
        loaded = make_generator(settings) if ON_ZERO_GPU else None
    except ValueError as error:
        sys.exit(f"phi-mm: {error}")
    records = Records(settings.store) if settings.store else None
    metrics, alerts = Metrics(), Alerts(settings.alerts, settings.store)
    journal = Journal(store, [metrics.watch, alerts.watch])
    limits = settings.limits
    if ON_ZERO_GPU:  # which is lent for one answer at a time
        limits = replace(limits, together=1)
    engine = Engine(lambda: loaded or make_generator(settings), limits, journal)
    metrics.read(engine, records)
    engine.start()
    alerts.start()
    owner = Owner(settings.owner_secret)
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")  # of figures that nobody reads
    page = ChatPage(engine).build()
    dashboard.Dashboard(engine, records, owner).add_to(page)
    door = Middleware(Door, settings.upload_bytes, Path(get_upload_folder()))
    # As Ctrl-C: Gradio ends the streams, the engine writes down what is left, and that is copied.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with copying, contextlib.closing(engine):
        page.launch(
            theme=theme(),
            css=CSS + shown.CSS,
            head=HEAD,
            js=JS,
            app_kwargs={"routes": routes(engine, metrics, owner), "middleware": [door]},
            max_file_size=settings.upload_bytes,
            max_threads=settings.limits.waiting + SPARE_THREADS,
            state_session_capacity=SESSIONS,
            enable_monitoring=False,
            show_error=True,
            ssr_mode=False,
        )


if __name__ == "__main__":
    main()
