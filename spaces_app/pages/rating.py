"""What users think of the answers: thumbs under them, and a form for words."""

from collections.abc import Sequence
from typing import Any

import gradio as gr
from records.journal import Journal

from .conversation import Conversation, Turn

THUMBS = ("Like", "Dislike")  # which gradio draws as thumbs
ABOUT_CHARACTERS = 200
HIDDEN = {"api_visibility": "private", "show_progress": "hidden"}


class RatingForm:
    """Opens under the conversation when a thumb is clicked.

    Args:
        journal: takes what is thought.
    """

    def __init__(self, journal: Journal):
        self.journal = journal

    def build(self) -> None:
        """Makes the form, where the page has come to."""
        with gr.Column(visible=False, elem_id="rating") as self.form:
            self.about = gr.Textbox(label="Your rating is of this answer", interactive=False)
            self.reason = gr.Textbox("", label="What was wrong, or good?", max_lines=4)
            self.correction = gr.Textbox(
                "",
                label="What should it have said?",
                info="With the box for it ticked, these words are kept, and the conversation up to "
                "this answer. The model may learn from them.",
                max_lines=8,
            )
            self.send = gr.Button("Send feedback", size="sm")

    def connect(
        self, talk: gr.Chatbot, conversation: gr.State, keep: gr.Checkbox, cleared: Sequence
    ) -> None:
        """Lets the form answer to the page.

        Args:
            talk, conversation: the answers that are rated.
            keep: whether words may be kept.
            cleared: events that end the conversation.
        """
        words = [self.about, self.reason, self.correction]
        talk.like(self._like, conversation, [talk, self.form, *words], **HIDDEN)
        self.send.click(
            self._send,
            [self.reason, self.correction, keep, conversation],
            [self.form, *words],
            **HIDDEN,
        )
        gr.on(cleared, _clear, None, [talk, self.form, *words], **HIDDEN)

    async def _like(self, conversation: Conversation, given: gr.LikeData) -> tuple:
        try:
            turn = conversation.turn_of(given.index)
            await self.rate(conversation, turn, {True: 1, False: -1}.get(given.liked, 0))
        except ValueError as error:
            gr.Warning(str(error))
            return gr.update(feedback_value=conversation.thumbs()), *(gr.skip(),) * 4
        conversation.rated = turn
        thumbs = gr.update(feedback_value=conversation.thumbs())
        if not turn.rating:
            return thumbs, *_closed()
        return thumbs, gr.update(visible=True), turn.answer[:ABOUT_CHARACTERS], "", ""

    async def _send(
        self, reason: str, correction: str, keep: bool, conversation: Conversation
    ) -> tuple:
        turn = conversation.rated
        try:
            if turn not in conversation.turns:
                raise ValueError("the answer that you rated is gone: rate another one")
            if not f"{reason}{correction}".strip():
                raise ValueError("got no words: type what was wrong, or what it should have said")
            await self.rate(conversation, turn, turn.rating, reason, correction, keep)
        except ValueError as error:
            gr.Warning(str(error))
            return (gr.skip(),) * 4
        gr.Info("Thank you.")
        return _closed()

    async def rate(
        self,
        conversation: Conversation,
        turn: Turn,
        rating: int,
        reason: str = "",
        correction: str = "",
        keep: bool = False,
    ) -> None:
        """Writes down what a user thinks of an answer, as `Conversation.feedback`.

        Raises:
            ValueError: it was not written; says what to do.
        """
        feedback = conversation.feedback(turn, rating, reason, correction, keep)
        await self.journal.rate(*feedback)
        turn.rating = rating


def _closed() -> tuple[Any, ...]:
    return gr.update(visible=False), "", "", ""


def _clear() -> tuple[Any, ...]:
    return gr.update(feedback_value=None), *_closed()
