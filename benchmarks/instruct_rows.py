"""Rows as long as those of LLaVA-Instruct-150K, and the batches that LLaVA makes of them.

Their words and pictures are noise.

Lengths are those of what LLaVA publishes for each of its three kinds of rows, 30 questions and
answers of GPT-4 (playground/data/coco2014_val_gpt4_qa_30x3.jsonl of haotian-liu/LLaVA), in tokens
of Phi-2. The kinds' shares are those of docs/Data.md there. A conversation has as many turns as
make up the 2,170 bytes that docs/Data.md gives a row of conversation_58k.json.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from processing import PhiMMProcessor, chat_template_for

SHORTEST, LONGEST = 5, 200  # tokens of a question or an answer
MARKS = ("Instruct:", "Output:")  # what the chat template writes


@dataclass(frozen=True)
class Kind:
    """One kind of rows.

    Attributes:
        share: of all rows, in thousands.
        turns: questions in a row.
        question, answer: mean and standard deviation in tokens.
    """

    share: int
    turns: int
    question: tuple[float, float]
    answer: tuple[float, float]


INSTRUCT = (
    Kind(58, 8, (10.4, 1.5), (19.7, 9.3)),  # conversation
    Kind(23, 1, (9.2, 2.3), (92.3, 21.9)),  # detailed description
    Kind(77, 1, (13.6, 3.1), (122.9, 28.3)),  # complex reasoning
)
CAPTIONS = (Kind(1, 1, (0, 0), (12, 5)),)  # as in LLaVA-Pretrain: a picture, and what is on it


def write_pictures(folder: Path, count: int, side: int) -> list[str]:
    """Pictures of noise, as paths."""
    paths = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def make_rows(kinds: Sequence[Kind], pictures: Sequence[str], words: int, seed: int) -> list[dict]:
    """A row `{"id", "messages"}` for each picture.

    Args:
        words: that `word_tokenizer` was made with.
    """
    rng = random.Random(seed)
    rows = []
    for number, picture in enumerate(pictures):
        [kind] = rng.choices(kinds, [kind.share for kind in kinds])
        messages = []
        for turn in range(kind.turns):
            asked = {"type": "text", "text": _words(rng, kind.question, words)}
            shown = [{"type": "image", "image": picture}] if turn == 0 else []
            said = {"type": "text", "text": _words(rng, kind.answer, words)}
            messages += [
                {"role": "user", "content": [*shown, asked]},
                {"role": "assistant", "content": [said]},
            ]
        rows.append({"id": str(number), "messages": messages})
    return rows


def _words(rng: random.Random, length: tuple[float, float], words: int) -> str:
    mean, deviation = length
    if mean == 0:
        return ""
    count = round(min(max(rng.gauss(mean, deviation), SHORTEST), LONGEST))
    return " ".join(f"w{rng.randrange(words)}" for _ in range(count))


def word_processor(vocabulary: int, side: int, num_image_tokens: int) -> PhiMMProcessor:
    """A processor for which every word `w0`, `w1`, ... is a token.

    Args:
        vocabulary: rows of the embedding; `spare_words` of them are words.
        side: of a picture, in pixels.
    """
    names = ["<|endoftext|>", "<|image|>", *MARKS]
    names += [f"w{number}" for number in range(spare_words(vocabulary))]
    ids = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|image|>"]})
    return PhiMMProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        num_image_tokens=num_image_tokens,
        chat_template=chat_template_for(tokenizer),
    )


def spare_words(vocabulary: int) -> int:
    return vocabulary - 2 - len(MARKS)


def llava_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The rows of one optimiser step as LLaVA shares them out (`group_by_modality_length`): longest
    first, each to the batch that has the fewest tokens so far and room for a row.

    Every batch then has about as many tokens, and a row that is nearly the longest.
    """
    batches: list[list[int]] = [[] for _ in range(len(lengths) // batch_size)]
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        open_ones = [batch for batch in batches if len(batch) < batch_size]
        min(open_ones, key=lambda batch: sum(lengths[other] for other in batch)).append(row)
    return batches


def alike_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The same rows, like with like, as `LengthGroupedSampler` has them."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
