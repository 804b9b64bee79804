"""A conversation with an artefact in the terminal: typed, with pictures, with recordings.

phi-mm chat DIR
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import (
    AutoModel,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    TextStreamer,
)

HELP = """\
Type a question and press Enter.
  /image FILE   attach a picture to the next question; several are fine
  /audio FILE   attach a recording; an empty line then asks what is said in it
  /reset        forget the conversation
  /help         this list
  /quit         leave (so does the end of the input)"""
PROMPT = "> "


@dataclass
class Chat:
    """The state of a conversation: what was said, and what waits for the next question."""

    model: PreTrainedModel
    processor: ProcessorMixin
    max_new_tokens: int
    messages: list[dict[str, Any]] = field(default_factory=list)
    attached: list[dict[str, str]] = field(default_factory=list)

    def attach(self, kind: str, name: str) -> str:
        """Adds a file to the next question; returns what to tell the user.

        Raises:
            ValueError: the file cannot be opened, or the model has no tower for it.
        """
        if not name:
            raise ValueError(f"got no file: type /{kind} FILE")
        path = str(Path(name.strip("'\"")).expanduser())
        media = {"images": [path]} if kind == "image" else {"audio": [path]}
        self.processor(**media, return_tensors="pt")  # opened here, so that a fault shows here
        self.attached.append({"type": kind, kind: path})
        return f"attached {path}" + (" (an empty line asks it)" if kind == "audio" else "")

    def reset(self) -> None:
        """Forgets everything."""
        self.messages, self.attached = [], []

    def ask(self, text: str) -> None:
        """Asks, with what is attached; the answer appears on the screen word by word.

        A question that fails or is interrupted is forgotten, what came before it stays.

        Raises:
            ValueError: nothing is asked, or the model cannot take it.
        """
        if not text and not any(part["type"] == "audio" for part in self.attached):
            raise ValueError("got no question: type one, or attach a recording that asks it")
        written = [{"type": "text", "text": text}] if text else []
        question = {"role": "user", "content": [*self.attached, *written]}
        self.attached = []
        answer = self._answer([*self.messages, question])
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        self.messages += [question, reply]

    def _answer(self, messages: list[dict[str, Any]]) -> str:
        if self.processor.transcript_tokenizer is not None:
            messages = self._written(messages)
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        room = self.model.config.text_config.max_position_embeddings - length
        if room < 1:
            raise ValueError(
                f"got a conversation of {length} tokens, expected fewer than {length + room}: "
                "type /reset"
            )
        tokenizer = self.processor.tokenizer
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=min(self.max_new_tokens, room),
            streamer=streamer,
        )
        return tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()

    def _written(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The recordings written down; the screen says what was heard in the new ones."""
        written = self.processor.transcribe(messages, self.model)
        pairs = zip(messages[-1]["content"], written[-1]["content"], strict=True)
        heard = [new.get("transcript", new.get("text")) for old, new in pairs if "audio" in old]
        if heard:
            print(f"(heard: {'; '.join(heard)})")
        return written


def chat(artefact: str, source: TextIO, max_new_tokens: int = 256) -> None:
    """Loads an artefact (a folder or a Hub id) and talks until the input ends.

    Args:
        artefact: what `phi-mm export` wrote, or a repository on the Hub.
        source: where the lines come from; a pipe works as well as a keyboard.
        max_new_tokens: longest answer.
    """
    model = AutoModel.from_pretrained(artefact, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(artefact, trust_remote_code=True)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    state = Chat(model, processor, max_new_tokens)
    typed = source.isatty()
    print(HELP)
    while True:
        print(PROMPT if typed else "", end="", flush=True)
        line = source.readline()
        if not line or line.strip() == "/quit":
            break
        if not typed:
            print(f"{PROMPT}{line.strip()}")
        try:
            _obey(state, line.strip())
        except ValueError as error:
            print(error)
        except KeyboardInterrupt:
            print("\n(interrupted: that question is forgotten)")


def _obey(state: Chat, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command in ("/image", "/audio"):
        print(state.attach(command[1:], rest.strip()))
    elif line == "/reset":
        state.reset()
        print("forgotten")
    elif line == "/help":
        print(HELP)
    elif line.startswith("/"):
        print(f"got {command}, expected /image, /audio, /reset, /help or /quit")
    elif line or state.attached:
        state.ask(line)
