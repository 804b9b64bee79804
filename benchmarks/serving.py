"""What the Space's engine gains over transformers alone, and how near it comes to the machine.

python benchmarks/serving.py runs/demo/artefact

Users ask about a picture, each about his own, and then ask again. The plain way is AutoModel,
apply_chat_template and generate in the dtype that was saved, one user after the other, everything
computed anew. Both ways have the same questions, turn about in one process. A table comes on
stdout, and one line of JSON last.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import torch
from measuring import seconds_of
from PIL import Image
from random_artefact import write_random
from torch import nn
from transformers import AutoModel, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.generation.streamers import BaseStreamer

# The Space is run with its own folder as the working directory, and imports from there.
sys.path.insert(0, str(Path(__file__).parents[1] / "spaces_app"))
from engine.generation import Answer, Begun, Generator, Request
from engine.int8 import Int8Linear
from engine.loading import load
from engine.precision import AUTO, LINEAR_BYTES, choose
from engine.service import Engine, Limits

STORE = 256 << 20  # bytes for media, and for conversations
QUESTIONS = ("now describe what you see.", "and now tell me the colour of the large thing.")
BUFFER = 256 << 20  # bytes that are read to measure bandwidth: far more than any cache holds
GIGABYTE = 1e9


@dataclass(frozen=True)
class Load:
    """What is asked of a model.

    Attributes:
        users: how many ask at a time, one measurement for each.
        tokens: longest answer.
        rounds: times that all is asked; the median is told.
    """

    users: tuple[int, ...]
    tokens: int
    rounds: int


@dataclass(frozen=True)
class Asked:
    """One answer as its user met it."""

    prompt_tokens: int
    reused_tokens: int
    tokens: int
    first_token_seconds: float  # since it was asked
    tokens_per_second: float  # after the first one
    text: str


@dataclass(frozen=True)
class Turn:
    """One turn of all users, medians over users and rounds.

    Attributes:
        together: tokens of all users by the time from the first question to the last word.
    """

    users: int
    turn: int
    prompt_tokens: int
    reused_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    together: float


class Plain:
    """transformers alone."""

    def __init__(self, artefact: str, device: torch.device):
        model = AutoModel.from_pretrained(artefact, dtype="auto", trust_remote_code=True)
        self.model = model.to(device).eval()
        self.processor = AutoProcessor.from_pretrained(artefact, trust_remote_code=True)

    def ask_all(self, conversations: dict[str, list[dict]], tokens: int) -> list[Asked]:
        """Answers one after the other; all have been asked at the beginning."""
        begun = time.monotonic()
        return [self._ask(messages, tokens, begun) for messages in conversations.values()]

    def _ask(self, messages: list[dict], tokens: int, begun: float) -> Asked:
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        times = _Times()
        ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens, streamer=times)
        length = inputs["input_ids"].shape[1]
        new = ids[0, length:]
        return Asked(
            prompt_tokens=length,
            reused_tokens=0,
            tokens=len(new),
            first_token_seconds=times.at[0] - begun,
            tokens_per_second=(len(new) - 1) / max(times.at[-1] - times.at[0], 1e-9),
            text=self.processor.tokenizer.decode(new, skip_special_tokens=True),
        )


class _Times(BaseStreamer):
    """When each token came."""

    def __init__(self):
        self.at: list[float] = []
        self.prompted = False

    def put(self, value: torch.LongTensor) -> None:
        if self.prompted:
            self.at.append(time.monotonic())
        self.prompted = True  # the prompt comes first

    def end(self) -> None:
        pass


class Ours:
    """The Space's engine."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        self.engine = Engine(lambda: Generator(model, processor, STORE, STORE), Limits())
        self.engine.start()
        self.engine.wait_until_loaded()

    def ask_all(self, conversations: dict[str, list[dict]], tokens: int) -> list[Asked]:
        """All ask at once."""

        async def all_of_them() -> list[Asked]:
            requests = (Request(name, said, tokens) for name, said in conversations.items())
            return await asyncio.gather(*map(self._ask, requests))

        return asyncio.run(all_of_them())

    async def _ask(self, request: Request) -> Asked:
        asked = begun = time.monotonic()
        async for event in self.engine.stream(request):
            if isinstance(event, Begun):
                begun = event.at
            if isinstance(event, Answer):
                answer = event
        return Asked(
            prompt_tokens=answer.prompt_tokens,
            reused_tokens=answer.reused_tokens,
            tokens=len(answer.token_ids),
            first_token_seconds=begun - asked + answer.first_token_seconds,
            tokens_per_second=answer.tokens_per_second,
            text=answer.text,
        )


def talk(way: Plain | Ours, users: int, tokens: int, folder: Path) -> list[tuple[float, list]]:
    """Both turns of some new users: seconds that the turn took, and its answers."""
    conversations = {}
    for _ in range(users):
        picture = _picture(folder)
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTIONS[0]}]
        conversations[picture] = [{"role": "user", "content": parts}]
    turns = []
    for again in (*QUESTIONS[1:], None):
        begun = time.monotonic()
        answers = way.ask_all(conversations, tokens)
        turns.append((time.monotonic() - begun, answers))
        for messages, answer in zip(conversations.values(), answers, strict=True):
            messages.append(_says("assistant", answer.text))
            messages.append(_says("user", again))
    return turns


def _picture(folder: Path) -> str:
    """A picture of noise that was never seen before."""
    path = folder / f"{len(list(folder.glob('*.png')))}.png"
    pixels = np.random.default_rng().integers(0, 256, (224, 224, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def _says(role: str, text: str | None) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def bandwidth(device: torch.device) -> float:
    """Bytes a second that this device reads from memory, with all its cores."""
    size = 16 * BUFFER if device.type == "cuda" else BUFFER
    numbers = torch.ones(size // 4, device=device)
    return size / min(seconds_of(numbers.sum, device) for _ in range(9))


def weights_read(model: PreTrainedModel) -> int:
    """Bytes of weights that a token needs: the linear layers of the language model, and its head.
    Keys, values and norms are left out.
    """
    parts = (model.model.language_model.layers, model.lm_head)
    modules = [module for part in parts for module in part.modules()]
    return sum(
        module.in_features * module.out_features * _bytes_a_weight(module)
        for module in modules
        if isinstance(module, nn.Linear | Int8Linear)
    )


def _bytes_a_weight(module: nn.Module) -> float:
    if isinstance(module, Int8Linear):
        return 1
    four_bit = type(module).__name__ == "Linear4bit"
    return LINEAR_BYTES["nf4"] if four_bit else module.weight.element_size()


def compare(artefact: Path, load_: Load, wanted: str) -> dict:
    """Both ways turn about, for every number of users."""
    precision = choose(str(artefact), None, wanted, 2 * STORE).precision
    model, processor = load(str(artefact), None, precision)
    plain, ours = Plain(str(artefact), model.device), Ours(model, processor)
    rows, reads = [], []
    with tempfile.TemporaryDirectory() as folder:
        for way in (plain, ours):
            talk(way, 1, 2, Path(folder))  # what comes first is slower
        for users in load_.users:
            rounds = {"plain": [], "ours": []}
            for number in range(load_.rounds):
                reads.append(bandwidth(model.device))
                for name, way in (("plain", plain), ("ours", ours)):
                    _tell(f"{artefact.name}: {users} users, round {number + 1}, {name}")
                    rounds[name].append(talk(way, users, load_.tokens, Path(folder)))
            rows += [_row(users, turn, rounds) for turn in range(len(QUESTIONS))]
    ours.engine.close()
    alone = rows[0]["ours"]["tokens_per_second"]
    return {
        "artefact": artefact.name,
        "parameters": sum(parameter.numel() for parameter in plain.model.parameters()),
        "precision": {"ours": precision, "plain": str(plain.model.dtype).removeprefix("torch.")},
        "bandwidth_gb": max(reads) / GIGABYTE,
        "weights_read_gb": weights_read(model) / GIGABYTE,
        "of_bandwidth": weights_read(model) * alone / max(reads),
        "turns": rows,
    }


def _row(users: int, turn: int, rounds: dict[str, list]) -> dict:
    both = {name: _turn(users, turn, given) for name, given in rounds.items()}
    ours, plain = both["ours"], both["plain"]
    return {
        "users": users,
        "turn": turn + 1,
        "ours": asdict(ours),
        "plain": asdict(plain),
        "first_token_times_better": plain.first_token_seconds / ours.first_token_seconds,
        "together_times_better": ours.together / plain.together,
    }


def _turn(users: int, turn: int, rounds: list) -> Turn:
    def median(name: str) -> float:
        return statistics.median(
            getattr(answer, name) for talked in rounds for answer in talked[turn][1]
        )

    return Turn(
        users,
        turn + 1,
        round(median("prompt_tokens")),
        round(median("reused_tokens")),
        median("first_token_seconds"),
        median("tokens_per_second"),
        statistics.median(
            sum(answer.tokens for answer in answers) / seconds
            for seconds, answers in (talked[turn] for talked in rounds)
        ),
    )


def memory(artefact: str, wanted: str) -> dict:
    """What a process of its own takes to load a model and answer, and what was predicted; of a
    GPU's memory where there is one.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_take_memory, artefact, wanted).result()


def _take_memory(artefact: str, wanted: str) -> dict:
    precision = choose(artefact, None, wanted, 2 * STORE).precision
    ours = Ours(*load(artefact, None, precision))
    with tempfile.TemporaryDirectory() as folder:
        (_, [first]), (_, [second]) = talk(ours, 1, 8, Path(folder))
    resident = psutil.Process().memory_info().rss
    if torch.cuda.is_available():
        resident = torch.cuda.max_memory_reserved()
    generator = ours.engine.generator
    kept = generator.prefixes.kept.used + generator.reader.features.used
    predicted = choose(artefact, None, precision, kept).memory.serving
    ours.engine.close()
    return {
        "artefact": Path(artefact).name,
        "precision": precision,
        "predicted_gb": predicted / GIGABYTE,
        "resident_gb": resident / GIGABYTE,
        "answered": first.tokens + second.tokens,
    }


def table(compared: list[dict], memories: list[dict]) -> str:
    """The results for people."""
    lines = []
    for model in compared:
        names = model["precision"]
        lines += [
            f"\n{model['artefact']}: {model['parameters'] / 1e9:.2f} B parameters, "
            f"{names['ours']} here, {names['plain']} by transformers alone",
            f"{'users':>5} {'turn':>4} {'prompt':>6} {'kept':>5} | {'first token, s':^23} | "
            f"{'tokens/s of one user':^20} | {'tokens/s of all':^23}",
            f"{'':>23} | {'plain':>7} {'ours':>7} {'ratio':>7} | {'plain':>9} {'ours':>10} | "
            f"{'plain':>7} {'ours':>7} {'ratio':>7}",
        ]
        for row in model["turns"]:
            ours, plain = SimpleNamespace(**row["ours"]), SimpleNamespace(**row["plain"])
            lines.append(
                f"{row['users']:5} {row['turn']:4} {ours.prompt_tokens:6} {ours.reused_tokens:5} | "
                f"{plain.first_token_seconds:7.3f} {ours.first_token_seconds:7.3f} "
                f"{row['first_token_times_better']:6.1f}x | "
                f"{plain.tokens_per_second:9.1f} {ours.tokens_per_second:10.1f} | "
                f"{plain.together:7.1f} {ours.together:7.1f} {row['together_times_better']:6.1f}x"
            )
        lines.append(
            f"a token reads {model['weights_read_gb']:.3f} GB of weights; memory gives "
            f"{model['bandwidth_gb']:.1f} GB/s; one user has {model['of_bandwidth']:.2f} of that"
        )
    for taken in memories:
        lines.append(
            f"{taken['artefact']} in {taken['precision']}: {taken['resident_gb']:.2f} GB resident, "
            f"{taken['predicted_gb']:.2f} GB predicted"
        )
    return "\n".join(lines)


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artefact", type=Path, help="a folder that `phi-mm export` wrote")
    parser.add_argument("--random", type=Path, help="where random artefacts are kept (nowhere)")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median (%(default)s)")
    parser.add_argument(
        "--precision", default=AUTO, help="of ours: bf16, nf4, int8 or fp32 (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs")
    given = parser.parse_args()
    if not (given.artefact / "config.json").is_file():
        parser.error(f"got {given.artefact}, expected the folder of an artefact: phi-mm export")
    load_ = Load((1, 2), 4, 1) if given.quick else Load((1, 8), given.tokens, given.rounds)
    sizes = ("toy",) if given.quick else ("phi-1.5", "phi-2")
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.random or Path(scratch)
        for size in sizes:
            if not (folder / size).is_dir():
                _tell(f"writing {size} with random weights")
                write_random(size, given.artefact, folder / size)
        artefacts = [given.artefact, *(folder / size for size in sizes)]
        memories = [memory(str(artefact), given.precision) for artefact in artefacts]
        compared = [compare(artefact, load_, given.precision) for artefact in artefacts[:2]]
    print(table(compared, memories))
    print(json.dumps({"models": compared, "memory": memories}))


if __name__ == "__main__":
    main()
