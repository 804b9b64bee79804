"""The page to talk: text, pictures and recordings in, words out."""

from collections.abc import AsyncIterator
from pathlib import Path

import gradio as gr
from engine.service import Engine

from .conversation import Conversation, Turn
from .fields import Picture, Recording
from .rating import THUMBS, RatingForm

EXAMPLES = Path(__file__).parents[1] / "examples"
KEEP_FILES = 3600  # seconds that uploaded pictures and recordings stay on the disk
POLL_SECONDS = 1.0  # while the model is being loaded
TITLE = "phi-mm"
ABOUT = "# phi-mm\nA language model that also sees and hears. It may be wrong."


class ChatPage:
    """Everything on the page, and what it does.

    Args:
        engine: answers.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.stored = engine.journal.store is not None
        self.rating = RatingForm(engine.journal)

    def build(self) -> gr.Blocks:
        with gr.Blocks(title=TITLE, delete_cache=(KEEP_FILES, KEEP_FILES)) as blocks:
            gr.Markdown(ABOUT, elem_id="about")
            self._build_state(blocks)
            # Each visitor's own; changed in place, so that an answer that breaks off is in it too.
            self.conversation = gr.State(Conversation(), delete_callback=self._drop)
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    self._build_talk()
                    examples = gr.Column()
                with gr.Column(scale=1, min_width=280):
                    self._build_media()
                    self._build_settings()
            with examples:  # they fill fields that are built by now
                self._build_examples()
            self._connect()
            self._build_api()
        return blocks.queue(default_concurrency_limit=None)

    def _build_state(self, blocks: gr.Blocks) -> None:
        state, timer = gr.Markdown(elem_id="state"), gr.Timer(POLL_SECONDS)

        def look() -> tuple[str, gr.Timer]:
            return self.engine.describe(), gr.Timer(active=self.engine.loading)

        gr.on(
            [blocks.load, timer.tick],
            look,
            None,
            [state, timer],
            show_progress="hidden",
            api_visibility="private",
        )

    def _build_talk(self) -> None:
        self.talk = gr.Chatbot(
            label="Conversation",
            show_label=False,  # it would lie on the messages
            elem_id="talk",
            editable="user",
            group_consecutive_messages=False,  # or gradio 6.31 edits the first, a picture
            buttons=["copy", "copy_all"],
            feedback_options=THUMBS if self.stored else None,
            allow_tags=False,
            placeholder="Show a picture, say something, or type a question.",
        )
        self.rating.build()
        self.text = gr.Textbox(
            label="Question",
            placeholder="What is in the picture?",
            max_lines=8,
            elem_id="question",
            submit_btn=False,
        )
        with gr.Row():
            self.send = gr.Button("Send", variant="primary", min_width=80)
            self.stop = gr.Button("Stop", variant="stop", min_width=80)
            self.clear = gr.Button("Clear", min_width=80)

    def _build_media(self) -> None:
        self.image = Picture(
            label="Picture",
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard", "webcam"],
            height=200,
            buttons=["download", "fullscreen"],
            elem_id="picture",
        )
        self.audio = Recording(
            label="Recording",
            type="filepath",
            sources=["upload", "microphone"],
            buttons=["download"],
            elem_id="recording",
        )

    def _build_settings(self) -> None:
        with gr.Accordion("Settings", open=False):
            self.temperature = gr.Slider(
                0.0,
                1.5,
                value=0.0,
                step=0.1,
                label="Temperature",
                info="0 gives the likeliest words, more leaves more to chance",
            )
            self.length = gr.Slider(
                16, 512, value=256, step=16, label="Longest answer", info="in tokens"
            )
        self.keep = gr.Checkbox(
            False,
            label="The owner may keep what I ask and show, and the answers",
            info="Otherwise only numbers are kept: times, lengths, what went wrong.",
            visible=self.stored,
            elem_id="keep",
        )
        self.delete = gr.Button(
            "Delete this conversation and what is kept of it", size="sm", visible=self.stored
        )

    def _build_examples(self) -> None:
        def path(name: str) -> str | None:
            return str(EXAMPLES / name) if name else None

        lines = (EXAMPLES / "examples.tsv").read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t") for line in lines]
        gr.Examples(
            [[text, path(image), path(audio)] for text, image, audio in rows],
            [self.text, self.image, self.audio],
            label="Examples",
            example_labels=[_named(*row) for row in rows],
            examples_per_page=len(rows),
        )

    def _connect(self) -> None:
        settings = [self.length, self.temperature, self.keep]
        private = {"api_visibility": "private", "show_progress": "hidden"}
        fields = [self.text, self.image, self.audio]
        gr.on(
            [self.send.click, self.text.submit],
            self._send,
            [*fields, *settings, self.conversation],
            [self.talk, *fields],
            # With "once" the page itself drops a question asked just after Stop or Clear.
            trigger_mode="multiple",
            **private,
        )
        self.talk.retry(self._retry, [*settings, self.conversation], self.talk, **private)
        self.talk.edit(self._edit, [*settings, self.conversation], self.talk, **private)
        self.stop.click(self._stop, self.conversation, None, queue=False, **private)
        gr.on(
            [self.clear.click, self.talk.clear],
            self._clear,
            self.conversation,
            [self.talk, *fields],
            queue=False,
            **private,
        )
        self.delete.click(
            self._delete, self.conversation, [self.talk, *fields], queue=False, **private
        )
        if self.stored:
            cleared = [self.clear.click, self.talk.clear, self.delete.click]
            self.rating.connect(self.talk, self.conversation, self.keep, cleared)

    async def _send(
        self, text, image, audio, length, temperature, keep, conversation: Conversation
    ) -> AsyncIterator[tuple]:
        try:
            if conversation.answering:
                raise ValueError("the last question is still being answered: wait, or press Stop")
            conversation.ask(text, image, audio)
        except ValueError as error:
            gr.Warning(str(error))
            yield (gr.skip(),) * 4
            return
        fields = "", None, None
        async for _ in conversation.answer(self.engine, length, temperature, keep):
            yield conversation.shown(), *fields
            fields = (gr.skip(),) * 3  # what is typed meanwhile stays

    async def _retry(
        self, length, temperature, keep, conversation: Conversation, asked: gr.RetryData
    ) -> AsyncIterator[list]:
        self.engine.stop(conversation.name)
        conversation.go_back(asked.index)
        yield gr.update(feedback_value=conversation.thumbs())
        async for _ in conversation.answer(self.engine, length, temperature, keep):
            yield conversation.shown()

    async def _edit(
        self, length, temperature, keep, conversation: Conversation, asked: gr.EditData
    ) -> AsyncIterator[list]:
        self.engine.stop(conversation.name)
        conversation.go_back(asked.index)
        conversation.turns[-1].text = asked.value
        yield gr.update(feedback_value=conversation.thumbs())
        async for _ in conversation.answer(self.engine, length, temperature, keep):
            yield conversation.shown()

    def _stop(self, conversation: Conversation) -> None:
        self.engine.stop(conversation.name)

    def _clear(self, conversation: Conversation) -> tuple:
        self._drop(conversation)
        return [], "", None, None

    async def _delete(self, conversation: Conversation) -> tuple:
        try:
            await self._delete_kept(conversation)
        except ValueError as error:
            gr.Warning(str(error))
        return [], "", None, None

    async def _delete_kept(self, conversation: Conversation) -> None:
        self._drop(conversation)
        await self.engine.journal.delete(conversation.name)
        conversation.name = ""  # what is asked next is another conversation

    def _drop(self, conversation: Conversation) -> None:
        conversation.turns.clear()
        self.engine.stop(conversation.name)
        self.engine.forget(conversation.name)

    def _build_api(self) -> None:
        """Endpoints for programs; gradio documents them by these functions' docstrings."""
        answer = gr.Textbox(label="answer", visible=False)
        rating = gr.Number(label="rating", visible=False)
        talk, words = self.conversation, [self.rating.reason, self.rating.correction]
        asked = [self.text, self.image, self.audio, self.length, self.temperature, talk, self.keep]
        endpoints = [("ask", self.ask, asked, answer), ("forget", self.forget, talk, None)]
        if self.stored:
            rated = [rating, *words, self.keep, talk]
            endpoints.append(("feedback", self.feedback, rated, None))
            endpoints.append(("delete", self.delete_kept, talk, None))
        for name, function, inputs, outputs in endpoints:
            gr.Button(visible=False).click(
                function, inputs, outputs, api_name=name, show_progress="hidden"
            )

    async def ask(
        self,
        text: str = "",
        image: str | None = None,
        audio: str | None = None,
        length: float = 256,
        temperature: float = 0.0,
        conversation: Conversation | None = None,
        keep: bool = False,
        request: gr.Request | None = None,
    ) -> AsyncIterator[str]:
        """Ask phi-mm about text, a picture, a recording, or all of them; the answer grows.

        Calls of one client (one session_hash) are one conversation.

        Args:
            text: the question; may be empty when a recording asks it.
            image: a picture to look at.
            audio: a recording to listen to.
            length: most tokens of the answer.
            temperature: 0 for the likeliest words.
            keep: the owner may keep what is asked and shown, and the answer.
        """
        # All users of the MCP endpoint are one client, so there every question stands alone.
        alone = request is not None and request.headers.get("x-gradio-user") == "mcp"
        conversation = Conversation() if alone or conversation is None else conversation
        try:
            conversation.ask(text, image, audio)
            async for turn in conversation.answer(self.engine, length, temperature, keep):
                if turn.error:
                    conversation.turns.pop()
                    raise ValueError(turn.error)
                yield turn.answer
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        finally:
            if alone:
                self._drop(conversation)

    def forget(self, conversation: Conversation | None = None) -> None:
        """Forget this client's conversation."""
        if conversation is not None:
            self._drop(conversation)

    async def feedback(
        self,
        rating: int,
        reason: str = "",
        correction: str = "",
        keep: bool = False,
        conversation: Conversation | None = None,
    ) -> None:
        """Rate the last answer of this client's conversation.

        Args:
            rating: 1 for a good answer, -1 for a bad one, 0 to take a rating back.
            reason: what was wrong.
            correction: what the answer should have been.
            keep: the owner may keep these words, and the whole conversation with them; must be set
                when there are any.
        """
        conversation = conversation or Conversation()
        try:
            turn = conversation.turns[-1] if conversation.turns else Turn()
            await self.rating.rate(conversation, turn, rating, reason, correction, keep)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    async def delete_kept(self, conversation: Conversation | None = None) -> None:
        """Delete this client's conversation and all that is kept of it."""
        if conversation is None:
            return
        try:
            await self._delete_kept(conversation)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None


def _named(text: str, image: str, audio: str) -> str:
    """What an example consists of."""
    media = ["a picture"] if image else []
    media += ["a spoken question"] if audio else []
    return " + ".join([text, *media] if text else media)
