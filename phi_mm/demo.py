"""The whole way in one command: data, two stages of training, scores, an artefact that answers.

phi-mm demo
"""

import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image
from transformers.utils import logging as transformers_logging

from phi_mm.checkout import MODEL_CARD, TINY_RECIPES, launch_train
from phi_mm.evaluation import evaluate_run, write_report
from phi_mm.evaluation.page import CONTROL_NAMES, task_name
from phi_mm.evaluation.report import percent
from phi_mm.evaluation.tasks import Item, load_items
from phi_mm.hub import ask_fresh, export
from phi_mm.hub.probes import Probe
from phi_mm.recipes import load_recipe
from phi_mm.steps import Steps, digest
from phi_mm.tiny.rows import write_world

PROCESSES = 2  # that train together
ANSWER_TOKENS = 48
COLUMNS = 24  # of a picture in the terminal
SHOWN = {
    "text_qa": "a typed question",
    "image_qa": "a question about a picture",
    "audio_qa": "a spoken question",
    "image_qa_spoken": "a spoken question about a picture",
}
REPORT = ("metrics.json", "predictions.jsonl", "report.html")


@dataclass
class Demo:
    """Everything in one folder, made step by step; what is there and up to date is kept.

    Args:
        out: folder for the world, both runs, the report and the artefact.
        recipes: folder with stage1.yaml and stage2.yaml.
        amounts: of `write_world`, where they are not its own.
        seed: of the world, of both trainings and of the controls.
    """

    out: Path
    recipes: Path = TINY_RECIPES
    amounts: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    def run(self) -> None:
        """All steps, then a summary for someone who has never seen this project.

        Raises:
            ValueError: the bases that the recipes name are not there.
        """
        began = time.monotonic()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        bases = self._bases()
        print("phi-mm demo: a Phi that sees and hears, trained from its parts on this machine.")
        print("\n== the world: pictures, recordings and questions")
        write_world(self.out / "world", self.seed, **self.amounts)  # keeps by itself what is right
        world_took = time.monotonic() - began
        steps = Steps(self.out, print)
        made = digest([self.out / "world" / "manifest.json", *bases])
        made = self._train(steps, "stage1", "the projectors learn to speak Phi's language", made)
        made = self._train(steps, "stage2", "Phi learns to answer what is shown and said", made)
        report = [self.out / name for name in REPORT]
        steps.run("evaluate", "scores on what training never met", made, report, self._evaluate)
        made = digest([MODEL_CARD, self.out / "metrics.json"], made)
        artefact = self.out / "artefact"
        steps.run(
            "export", "the artefact, proven in a fresh process", made, [artefact], self._export
        )
        self._answer()
        self._summarise({"world": world_took, **steps.seconds()}, time.monotonic() - began)

    def _bases(self) -> list[Path]:
        model = load_recipe(self.recipes / "stage2.yaml").model
        bases = [Path(name) for name in (model.text, model.vision, model.audio) if name]
        for base in bases:
            if not (base / "config.json").is_file():
                raise ValueError(
                    f"got no base model in {base}, expected one: start in the repository's own "
                    "folder, or build them with `phi-mm tiny build-bases`"
                )
        return bases

    def _train(self, steps: Steps, stage: str, title: str, made: str) -> str:
        """One stage by train.py; returns the digest of all that went into it."""
        recipe = self.recipes / f"{stage}.yaml"
        arguments = [str(recipe), *self._overrides(recipe, stage)]
        made = digest([recipe], made, *arguments)
        outputs = [self.out / stage, *([self.out / "features"] if stage == "stage1" else [])]
        steps.run(
            stage, f"{stage}: {title}", made, outputs, lambda: launch_train(arguments, PROCESSES)
        )
        return made

    def _overrides(self, path: Path, stage: str) -> list[str]:
        """What moves a recipe into this demo's folder."""
        recipe, world = load_recipe(path), self.out / "world"
        batch = recipe.training["per_device_train_batch_size"]
        moved = {
            "training.output_dir": str(self.out / stage),
            "training.seed": self.seed,
            # All processes together make the recipe's batch.
            "training.per_device_train_batch_size": batch // PROCESSES,
            "data.train": str(world / f"{stage}.json"),
            "data.validation": str(world / "validation.json"),
            "evaluation": [
                {**asdict(task), "data": str(world / "test" / Path(task.data).name)}
                for task in recipe.evaluation
            ],
        }
        if recipe.features == "cached":
            moved["features_dir"] = str(self.out / "features")
        if recipe.model.init_from:
            moved["model.init_from"] = str(self.out / "stage1")
        return [f"{key}={json.dumps(value)}" for key, value in moved.items()]

    def _evaluate(self) -> None:
        tasks = evaluate_run(self.out / "stage2", seed=self.seed)
        write_report(tasks, self.out, "phi-mm demo")

    def _export(self) -> None:
        export(self.out / "stage2", self.out / "artefact", self.out / "metrics.json")

    def _answer(self) -> None:
        """One question of each kind, drawn at random, to the artefact in a fresh process."""
        print("\n== the artefact answers, loaded by AutoModel in a process without this project")
        rng = random.Random(self.seed)
        asked = {
            task: rng.choice(load_items(self.out / "world" / "test" / f"{task}.json", task))
            for task in SHOWN
        }
        probes = [Probe(task, item.prompt, ANSWER_TOKENS) for task, item in asked.items()]
        with tempfile.TemporaryDirectory(prefix="phi-mm-demo-") as folder:
            answers, _ = ask_fresh(self.out / "artefact", probes, Path(folder))
        for (task, item), answer in zip(asked.items(), answers, strict=True):
            print(f"\n{SHOWN[task]}")
            _show(item)
            print(f"  answer     {answer}")
            print(f"  the truth  {item.reference}")

    def _summarise(self, seconds: dict[str, float], total: float) -> None:
        rows = json.loads((self.out / "metrics.json").read_text(encoding="utf-8"))
        print("\n== what it can do, on colours, shapes, voices and sentences that it never met")
        print(score_table(rows))
        print("\n== how long it took")
        print(", ".join(f"{name} {took:.0f} s" for name, took in seconds.items()))
        print(f"this time {total / 60:.1f} minutes")
        print("\n== where things are")
        print(f"{self.out}/report.html   every kind of question, with pictures, sound and answers")
        print(
            f"{self.out}/artefact      the model: a folder that can be pushed to the Hub as it is"
        )
        print(f"{self.out}/stage1, stage2, world   the runs, and what they learned from")
        print("\n== what to type next")
        print(f"phi-mm chat {self.out}/artefact          talk to it: /image FILE, /audio FILE")
        print("phi-mm data check FILE                   look at data of your own")
        print("phi-mm train recipes/tiny/stage2.yaml    change the recipe, train, measure again")


def score_table(rows: list[dict]) -> str:
    """metrics.json for a newcomer: each task in words, its score, and what guessing would give."""
    lines = []
    for row in (row for row in rows if row["control"] is None):
        without = [r for r in rows if r["task"] == row["task"] and r["control"]]
        kind = "word errors" if row["metric"] == "wer" else "right"
        beside = [f"{CONTROL_NAMES[r['control']]} {percent(r['value'])}" for r in without]
        if row["metric"] != "wer":
            beside.insert(0, f"guessing {percent(row['baseline'])}")
        lines.append((task_name(row["task"]), f"{percent(row['value'])} {kind}", beside))
    first, second = (max(len(line[column]) for line in lines) for column in (0, 1))
    return "\n".join(
        f"  {name:<{first}}  {score:>{second}}   {', '.join(beside)}".rstrip()
        for name, score, beside in lines
    )


def _show(item: Item) -> None:
    """A question as lines, its picture as coloured blocks where the terminal has colours."""
    for part in (part for message in item.prompt for part in message["content"]):
        if part["type"] == "image" and sys.stdout.isatty():
            print(blocks(Path(part["image"])))
        elif part["type"] == "image":
            print(f"  picture    {part['image']}")
        elif part["type"] == "audio":
            print(f"  recording  {part['audio']}\n  it says    {item.transcript}")
        else:
            print(f"  question   {part['text']}")


def blocks(path: Path) -> str:
    """A picture as half blocks: each character shows two pixels, one over the other."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    height = 2 * round(COLUMNS * small.height / small.width / 2)
    small = small.resize((COLUMNS, height), Image.Resampling.BOX)
    pixels = small.load()
    lines = []
    for y in range(0, height, 2):
        cells = []
        for x in range(COLUMNS):
            upper, lower = (";".join(map(str, pixels[x, y + k])) for k in (0, 1))
            cells.append(f"\x1b[38;2;{upper}m\x1b[48;2;{lower}m▀")
        lines.append(f"  {''.join(cells)}\x1b[0m")
    return "\n".join(lines)
