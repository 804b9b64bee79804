"""Speech is to be understood as its text would be: what the text model says of it is learnt too.

Beside the usual loss, the answer to a recording is drawn towards the frozen language model's own
answer to the words that are spoken in it: the Kullback-Leibler divergence of their distributions at
the answer's positions, at a temperature of 2 (Ultravox, github.com/fixie-ai/ultravox).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import nn

from phi_mm.training.targets import supervised_targets

TEACHER = "teacher"  # key of a batch: its spoken rows as text, taken out before the model sees it
STUDENTS = "students"  # in there: the numbers of the same conversations in the batch
TRANSCRIPTS = "transcripts"  # field of a row: what is said in each of its recordings, in order


class TeachingCollator:
    """A collator whose batches also hold their spoken rows as text.

    Those are rows without pictures that say in `transcripts` what their recordings hold. One whose
    answer is cut off differently as text has nothing to compare, and is left out.
    """

    def __init__(self, collator: Callable[[list[dict]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, samples: list[dict] | list[list[dict]]) -> dict[str, Any]:
        """The batch, with another one under `teacher` where it has such rows."""
        batch = self.collator(samples)
        packed = not isinstance(samples[0], dict)
        rows = list(chain.from_iterable(samples)) if packed else samples
        targets, conversation = supervised_targets(batch)
        texts, students = [], []
        for number, row in enumerate(rows):
            text = as_text(row)
            if text is None:
                continue
            try:
                taught, _ = supervised_targets(self.collator([text]))
            except ValueError:  # nothing of the answer fits behind so long a text
                continue
            if torch.equal(taught, targets[conversation == number]):
                texts.append(text)
                students.append(number)
        if texts:
            batch[TEACHER] = {**self.collator(texts), STUDENTS: torch.tensor(students)}
        return batch


def check_transcripts(rows: datasets.Dataset) -> None:
    """Raises ValueError where no row could say what its recordings hold."""
    if TRANSCRIPTS not in rows.column_names:
        raise ValueError(
            f"got `distillation` and training rows without {TRANSCRIPTS}, expected a list of what "
            "is said in each recording of a row: add it, or remove the section"
        )


def as_text(row: dict[str, Any]) -> dict[str, Any] | None:
    """A spoken row with its transcripts in the place of its recordings; None for other rows.

    Raises:
        ValueError: a row with as many transcripts as recordings was expected.
    """
    parts = [part for message in row["messages"] for part in message["content"]]
    kinds = [part["type"] for part in parts]
    transcripts = row.get(TRANSCRIPTS)
    if not transcripts or "audio" not in kinds or "image" in kinds:
        return None
    if len(transcripts) != kinds.count("audio"):
        raise ValueError(
            f"got {len(transcripts)} transcripts and {kinds.count('audio')} recordings in row "
            f"{row['id']!r}, expected one for each"
        )
    said = iter(transcripts)
    messages = [
        {
            **message,
            "content": [
                {"type": "text", "text": next(said)} if part["type"] == "audio" else part
                for part in message["content"]
            ],
        }
        for message in row["messages"]
    ]
    return {**row, "messages": messages}


@contextmanager
def as_pretrained(model: nn.Module) -> Iterator[None]:
    """The language model as it was before LoRA, without dropout or noise, while this lasts.

    Adapters by modality are silent for text anyway.
    """
    fates = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    model.eval()
    try:
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                yield
        else:
            yield
    finally:
        for parameter, learns in fates:  # PEFT opens more than was open
            parameter.requires_grad_(learns)
        model.train(training)


def teach(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the pretrained language model says at the supervised positions (S, V)."""
    inputs = {name: value for name, value in batch.items() if name != STUDENTS}
    with torch.no_grad(), as_pretrained(model):
        return model(**inputs).logits


def divergence(
    logits: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    taught: torch.Tensor,
    students: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """The divergence of answers from what was taught, summed over positions.

    It is multiplied by the square of the temperature, which keeps its gradient as large as that of
    the usual loss (Hinton et al., arXiv:1503.02531).

    Args:
        logits: the model's, of all supervised positions (S, V).
        inputs: the batch that they answer.
        taught: the teacher's, of the positions of some conversations.
        students: the numbers of these conversations.
        temperature: above 0.
    """
    _, conversation = supervised_targets(inputs)
    own = logits[torch.isin(conversation, students)].float()
    log_student = nn.functional.log_softmax(own / temperature, dim=-1)
    log_teacher = nn.functional.log_softmax(taught.float() / temperature, dim=-1)
    both = nn.functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return both * temperature**2
