"""What a question costs whose recording is not padded to Whisper's 30 s, by its length.

    python benchmarks/audio_padding.py

`audio_padded: false` against `true`: the same random weights in the shapes of Whisper-base and
Whisper-small before Phi-1.5, turn about. A table comes on stdout, and one line of JSON last.
"""

import argparse
import json
import statistics
import sys

import torch
from measuring import seconds_of
from random_artefact import PHI, whisper

from modeling_phi_mm import PhiMMConfig, PhiMMForConditionalGeneration

SHAPES = {"Whisper-base": (512, 6), "Whisper-small": (768, 12)}  # width, layers
SECONDS = (2, 10, 30)
QUESTION = 16  # tokens beside the recording
AUDIO_TOKEN, STACK = 1, 4
MEL_RATE, FULL = 100, 3000  # frames a second, and of a window
CPU = torch.device("cpu")


def build(shape: tuple[int, int], text: str) -> PhiMMForConditionalGeneration:
    """A model of random weights that pads."""
    config = PhiMMConfig(
        text_config=PHI[text],
        audio_config=whisper(*shape),
        audio_token_id=AUDIO_TOKEN,
        audio_stack=STACK,
    )
    torch.manual_seed(0)
    return PhiMMForConditionalGeneration(config).eval()


def inputs_of(seconds: int) -> dict[str, torch.Tensor]:
    """A question with a recording of that length, as the processor gives it."""
    mask = torch.zeros(1, FULL, dtype=torch.long)
    mask[:, : seconds * MEL_RATE] = 1
    tokens = -(-seconds * MEL_RATE // 2 // STACK)
    ids = torch.tensor([[*[AUDIO_TOKEN] * tokens, *range(10, 10 + QUESTION)]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": torch.randn(1, 80, FULL, generator=torch.Generator().manual_seed(0)),
        "input_features_mask": mask,
    }


def compare(model: PhiMMForConditionalGeneration, seconds: int, rounds: int) -> dict:
    """Median seconds of the tower alone, and to the first token, padded and not."""
    inputs = inputs_of(seconds)
    mel = {name: inputs[name] for name in ("input_features", "input_features_mask")}
    steps = {
        "tower": lambda: model.model.get_audio_tower_features(*mel.values()),
        "first_token": lambda: model(**inputs, logits_to_keep=1),
    }
    taken = {(name, padded): [] for name in steps for padded in (True, False)}
    with torch.no_grad():
        for number in range(rounds + 1):
            for name, padded in taken:
                model.config.audio_padded = padded
                found = seconds_of(steps[name], CPU)
                if number:  # the first round warms up
                    taken[name, padded].append(found)
    told = {"seconds": seconds, "tokens": inputs["input_ids"].shape[1]}
    for name in steps:
        padded, own = (statistics.median(taken[name, way]) for way in (True, False))
        told |= {f"{name}_padded": padded, f"{name}_own": own, f"{name}_ratio": own / padded}
    return told


def table(name: str, rows: list[dict]) -> str:
    """One Whisper for people."""
    lines = [
        f"\n{name}",
        f"{'sound':>6} {'tokens':>7} | {'tower, s: padded':>16} {'own':>7} {'ratio':>6} | "
        f"{'first token, s: padded':>22} {'own':>7} {'ratio':>6}",
    ]
    for row in rows:
        lines.append(
            f"{row['seconds']:>4} s {row['tokens']:>7} | {row['tower_padded']:16.3f} "
            f"{row['tower_own']:7.3f} {row['tower_ratio']:5.2f}x | "
            f"{row['first_token_padded']:22.3f} {row['first_token_own']:7.3f} "
            f"{row['first_token_ratio']:5.2f}x"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="of which the median (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs")
    given = parser.parse_args()
    shapes = {"toy": (64, 1)} if given.quick else SHAPES
    told = {}
    for name, shape in shapes.items():
        print(f"building {name}", file=sys.stderr, flush=True)
        model = build(shape, "toy" if given.quick else "phi-1.5")
        rows = []
        for seconds in SECONDS:
            print(f"{name}, {seconds} s", file=sys.stderr, flush=True)
            rows.append(compare(model, seconds, 1 if given.quick else given.rounds))
        told[name] = rows
        print(table(name, rows))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
