"""The owner's page: what is asked, how it is answered, and each request on its own."""

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import gradio as gr
import pandas as pd
import psutil
from engine.service import Engine
from monitoring import figures, shown
from monitoring.owner import Owner
from monitoring.queries import Records

log = logging.getLogger("phi-mm")
PATH = "dashboard"
NO_SECRET = """No secret is set, so nobody is let in. Set `PHI_MM_OWNER_SECRET`, 16 characters or
more, as a secret of the Space, and start it again."""
NO_STORE = """Nothing is kept, so there is nothing to show. Set `PHI_MM_STORE` to a folder, and
start the Space again."""
PIECES = 60  # of a time, in a plot
ROWS = 200  # of the table
GREEN, YELLOW, RED, GREY, BLUE = "#10b981", "#f59e0b", "#ef4444", "#94a3b8", "#6366f1"
COLORS = {
    "outcome": {
        "finished": GREEN,
        "length": "#0ea5e9",
        "stopped": GREY,
        "timeout": YELLOW,
        "refused": "#a855f7",
        "failed": RED,
    },
    "thumb": {"up": GREEN, "down": RED},
    "series": {
        "p50": GREEN,
        "p95": YELLOW,
        "p99": RED,
        "median": GREEN,
        figures.NEW_MODEL: BLUE,
    },
    "part": {"before": GREY, "now": BLUE},
}
DOWNLOAD = """(text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
    link.download = "phi-mm-requests.csv";
    link.click();
    URL.revokeObjectURL(link.href);
    return "";
}"""


@dataclass(frozen=True)
class Span:
    """A time to look at.

    Attributes:
        seconds: until now; None for all.
        every: seconds between two looks while the page is live.
    """

    seconds: float | None
    every: float


SPANS = {
    "last hour": Span(3600.0, 10.0),
    "last day": Span(86_400.0, 30.0),
    "last week": Span(604_800.0, 60.0),
    "all": Span(None, 60.0),
}
ALL = "all outcomes"


class Dashboard:
    """Everything on the page. Every handler but the login asks on the server whether this visitor
    is logged in, since handlers can be called without the page.

    Args:
        engine: is watched.
        records: of its store; None when it keeps none.
        owner: is let in.
    """

    def __init__(self, engine: Engine, records: Records | None, owner: Owner):
        self.engine, self.records, self.owner = engine, records, owner

    def add_to(self, blocks: gr.Blocks) -> None:
        """Makes it a page of an app, at /dashboard."""
        with blocks.route("Dashboard", PATH, show_in_navbar=False):
            gr.Markdown("# phi-mm: dashboard")
            if not self.owner.known:
                gr.Markdown(NO_SECRET)
            elif self.records is None:
                gr.Markdown(NO_STORE)
            else:
                self._build()

    def _build(self) -> None:
        self.logged_in = gr.State(False)
        with gr.Column() as self.door:
            self.secret = gr.Textbox(label="Secret", type="password", elem_id="secret")
            self.enter = gr.Button("Log in", variant="primary")
        with gr.Column(visible=False) as self.board:
            self.timer = gr.Timer(SPANS["last hour"].every, active=False)
            with gr.Row():
                self.span = gr.Radio(list(SPANS), value="last hour", label="Time", elem_id="span")
                self.live = gr.Checkbox(True, label="Live", info="looks again by itself")
                self.refresh = gr.Button("Look now", min_width=80)
                self.csv = gr.Button("CSV of this time", min_width=80, elem_id="csv")
                self.download = gr.Textbox(visible=False)
            self.tiles = gr.HTML(label="In short", elem_id="tiles")
            self._build_plots()
            self._build_requests()
        self._connect()

    def _build_plots(self) -> None:
        self.plots: list[gr.Component] = []

        def plot(kind: type, title: str, y: str, color: str | None = None, x: str = "when") -> None:
            made = kind(
                x=x,
                y=y,
                color=color,
                title=title,
                x_title={"when": "time"}.get(x, x),
                y_lim=[0, None],
                color_title=" ",
                color_map=COLORS.get(color),
                height=240,
                min_width=320,
            )
            self.plots.append(made)

        with gr.Row():
            plot(gr.BarPlot, "Requests", "requests", "outcome")
            plot(gr.BarPlot, "Errors", "requests", "outcome")
        with gr.Row():
            plot(gr.LinePlot, "Time to the first token", "seconds", "series")
            plot(gr.LinePlot, "Speed", "tokens per second", "series")
        with gr.Row():
            plot(gr.LinePlot, "Longest queue", "waiting")
            plot(gr.LinePlot, "Memory", "GB")
        with gr.Row():
            plot(gr.BarPlot, "What was given", "requests", "given")
            plot(gr.BarPlot, "Thumbs", "requests", "thumb")
        gr.Markdown(
            "## Lengths of questions\nThis time against the time before it of the same length; of "
            "all, the second half against the first. Each line tells how many percent of the "
            "questions are at most so long."
        )
        self.drift = gr.HTML(elem_id="drift")
        with gr.Row():
            for title in figures.LENGTHS.values():
                plot(gr.LinePlot, title.capitalize(), "percent", "part", x="length")

    def _build_requests(self) -> None:
        gr.Markdown(f"## Requests\nThe newest {ROWS} of this time. Choose one to see all of it.")
        self.outcome = gr.Dropdown([ALL, *figures.OUTCOMES], value=ALL, label="Outcome")
        self.table = gr.Dataframe(
            headers=list(shown.TABLE),
            datatype="str",
            interactive=False,
            label="Requests",
            max_height=360,
            elem_id="requests",
        )
        self.request = gr.Textbox(label="Request", info="its id, as in the log", elem_id="request")
        with gr.Row():
            self.numbers = gr.JSON(label="Numbers", min_width=320)
            with gr.Column(min_width=320):
                texts = ("Question", "Answer", "Rating", "Reason", "Corrected answer")
                self.texts = [gr.Textbox(label=label, interactive=False) for label in texts]
                self.media = gr.HTML(label="Media", elem_id="media")

    def _connect(self) -> None:
        private = {"api_visibility": "private", "show_progress": "hidden"}
        looked = [self.tiles, self.drift, *self.plots, self.table]
        inputs = [self.logged_in, self.span, self.outcome]
        gr.on(
            [self.enter.click, self.secret.submit],
            self._log_in,
            self.secret,
            [self.logged_in, self.secret, self.door, self.board],
            **private,
        ).success(self._look, inputs, looked, **private).success(
            self._pace, [self.logged_in, self.live, self.span], self.timer, **private
        )
        gr.on(
            [self.span.change, self.outcome.change, self.refresh.click, self.timer.tick],
            self._look,
            inputs,
            looked,
            trigger_mode="once",
            **private,
        )
        gr.on(
            [self.span.change, self.live.change],
            self._pace,
            [self.logged_in, self.live, self.span],
            self.timer,
            **private,
        )
        details = [self.numbers, *self.texts, self.media]
        self.request.submit(self._open, [self.logged_in, self.request], details, **private)
        self.table.select(self._choose, self.logged_in, [self.request, *details], **private)
        self.csv.click(self._csv, [self.logged_in, self.span], self.download, **private).success(
            None, self.download, self.download, js=DOWNLOAD
        )

    def _log_in(self, secret: str) -> tuple:
        try:
            right = self.owner.admit(secret or "")
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        if not right:
            raise gr.Error("this is not the owner's secret", print_exception=False)
        return True, "", gr.Column(visible=False), gr.Column(visible=True)

    def _pace(self, logged_in: bool, live: bool, span: str) -> gr.Timer:
        _check(logged_in)
        return gr.Timer(SPANS[span].every, active=live)

    def _look(self, logged_in: bool, span: str, outcome: str) -> list:
        _check(logged_in)
        seconds, now = SPANS[span].seconds, time.time()
        with _readable():
            if seconds is None:
                records = self.records.between(0.0, now)
                since = records.time.min() if len(records) else now
                middle = (since + now) / 2
            else:
                records = self.records.between(now - 2 * seconds, now)
                since = middle = now - seconds
            chosen = None if outcome == ALL else outcome
            table = self.records.table(since, now, chosen, ROWS)
        width = max(now - since, 1.0) / PIECES
        frame, when = figures.prepare(records, width), figures.pieces(since, now, width)
        inside, lengths = frame[frame.time >= since], frame[frame.prompt_tokens > 0]
        before, after = lengths[lengths.time < middle], lengths[lengths.time >= middle]
        return [
            self._summary(inside),
            shown.drift(before, after),
            figures.outcomes(inside, when),
            figures.errors(inside, when),
            figures.first_token(inside, when),
            figures.speed(inside, when),
            figures.queue(inside, when),
            figures.memory(inside, when),
            figures.modalities(inside, when),
            figures.ratings(inside, when),
            *(figures.distribution(before[name], after[name]) for name in figures.LENGTHS),
            shown.rows(table),
        ]

    def _summary(self, frame: pd.DataFrame) -> str:
        engine, memory = self.engine, psutil.Process().memory_info().rss
        now = {
            "in the queue now": engine.waiting,
            "memory now": f"{memory / 1e9:.2f} GB",
        }
        numbers = shown.tiles(now | figures.summary(frame))
        parts = [shown.state(engine.describe()), numbers, shown.errors(frame), shown.changes(frame)]
        return "".join(parts)

    def _open(self, logged_in: bool, request: str) -> list:
        _check(logged_in)
        with _readable():
            found = self.records.one(request.strip())
        if found is None:
            raise gr.Error(
                "no such request is kept: it may have been deleted, or be too old",
                print_exception=False,
            )
        names = ("question", "answer", "rating", "reason", "correction")
        question, answer, rating, *words = (found.pop(name) for name in names)
        media = shown.media(found.pop("media"), found["images"])
        if question is None:
            question = answer = "not kept: the user did not consent"
        return [found, question, answer, shown.thumb(rating), *words, media]

    def _choose(self, logged_in: bool, event: gr.SelectData) -> list:
        _check(logged_in)
        request = str(event.row_value[list(shown.TABLE).index("request")])
        return [request, *self._open(logged_in, request)]

    def _csv(self, logged_in: bool, span: str) -> str:
        _check(logged_in)
        seconds, now = SPANS[span].seconds, time.time()
        since = 0.0 if seconds is None else now - seconds
        with _readable():
            return self.records.table(since, now).to_csv(index=False)


def _check(logged_in: bool) -> None:
    if logged_in is not True:
        raise gr.Error("you are not logged in: load the page again", print_exception=False)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        log.error("the store cannot be read for the dashboard: %s", error)
        raise gr.Error(f"the store cannot be read now: {error}", print_exception=False) from None
