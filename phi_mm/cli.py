"""The `phi-mm` command: verbs that call the rooms of this package, nothing more.

phi-mm --help
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

BASES = ("phi", "clip", "whisper")


def main(arguments: list[str] | None = None) -> None:
    """Parses and carries out one verb; what the user got wrong is told in one sentence."""
    given = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # It warns on import where an optional CPU kernel is missing; it works without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for client in ("httpx", "httpx2"):  # it tells of every request to the Hub
        logging.getLogger(client).setLevel(logging.WARNING)
    try:
        given.verb(given)
    except ValueError as error:  # by the house rule, what is wrong with the user's input
        if given.traceback:
            raise
        sys.exit(f"phi-mm: {error}")
    except KeyboardInterrupt:
        sys.exit("\nphi-mm: interrupted")


def parser() -> argparse.ArgumentParser:
    """The whole command line. Each verb imports what it needs, so that --help is quick."""
    top = argparse.ArgumentParser(prog="phi-mm", description="A Phi that sees and hears.")
    top.add_argument("--traceback", action="store_true", help="show where an error came from")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    verb = _verb(verbs, "demo", demo)
    verb.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (%(default)s)")
    verb.add_argument("--seed", type=int, default=0, help="of world and training (%(default)s)")

    verb = _verb(verbs, "cache", cache)
    verb.add_argument("recipe", type=Path)
    verb.add_argument("overrides", nargs="*", metavar="section.key=value")

    verb = _verb(verbs, "train", train)
    verb.add_argument("arguments", nargs="+", metavar="RECIPE [section.key=value]")

    _add_estimate(verbs)

    verb = _verb(verbs, "evaluate", evaluate)
    verb.add_argument("run", type=Path, help="run folder that training filled")
    verb.add_argument("--out", type=Path, help="folder of the report (the run folder)")
    verb.add_argument("--split", choices=("test", "val"), default="test")
    verb.add_argument("--limit", type=_positive, help="questions a task")
    verb.add_argument("--batch-size", type=_positive, default=64)

    verb = _verb(verbs, "export", export)
    verb.add_argument("run", type=Path, help="run folder that training filled")
    verb.add_argument("out", type=Path, help="folder to write")
    verb.add_argument("--metrics", type=Path, help="metrics.json for the model card (the run's)")

    verb = _verb(verbs, "merge", merge)
    verb.add_argument("adapter", help="folder or Hub id of a PEFT adapter")
    verb.add_argument("out", type=Path, help="folder to write")
    verb.add_argument("--base", help="the artefact it was trained on (the one that it names)")

    verb = _verb(verbs, "verify", verify)
    verb.add_argument("artefact", type=Path)
    verb.add_argument("--run", type=Path, help="also compare its logits with this run's")

    verb = _verb(verbs, "push", push)
    verb.add_argument("folder", type=Path, metavar="DIR", help="exported folder (a run folder)")
    verb.add_argument("--repo", required=True, metavar="NAME", help="[NAMESPACE/]NAME")
    verb.add_argument("--private", action="store_true", help="make the repository private")
    verb.add_argument("--revision", default="main", metavar="BRANCH", help="(%(default)s)")
    verb.add_argument("--adapter-only", action="store_true", help="push the LoRA of a run folder")
    verb.add_argument("--base", metavar="REPO", help="phi-mm repository that the LoRA adapts")
    verb.add_argument("--for-vllm", action="store_true", help="AutoModel gives the base model")

    _add_deploy_space(verbs)

    verb = _verb(verbs, "chat", chat)
    verb.add_argument("artefact", help="exported folder or Hub id")
    verb.add_argument("--max-new-tokens", type=_positive, default=256)

    verb = _verb(verbs, "serve", serve)
    verb.add_argument("artefact", help="exported folder or Hub id")
    verb.add_argument("--revision", help="commit of a Hub id")
    verb.add_argument("--port", type=_positive, default=7860)

    _add_data(verbs)
    _add_feedback(verbs)
    _add_tiny(verbs)
    return top


def _add_estimate(verbs: argparse._SubParsersAction) -> None:
    verb = _verb(verbs, "estimate", estimate)
    verb.add_argument("recipe", metavar="RECIPE")
    verb.add_argument("overrides", nargs="*", metavar="section.key=value")
    for name, kind, default, help_text in (
        ("memory", float, 24.0, "GiB of a device (%(default)g)"),
        ("length", _positive, None, "tokens of a row (data.max_length)"),
        ("supervised", _positive, None, "of them with a label (all that are no media)"),
        ("seconds", float, None, "of sound in a row (a whole window)"),
        ("rows", _positive, 100_000, "rows to give hours for (%(default)s)"),
        ("speed", float, 125.0, "TFLOP/s of a device (%(default)g)"),
        ("processes", _positive, 1, "devices that train together (%(default)s)"),
    ):
        verb.add_argument(f"--{name}", type=kind, default=default, help=help_text)


def _add_deploy_space(verbs: argparse._SubParsersAction) -> None:
    verb = _verb(verbs, "deploy-space", deploy_space)
    verb.add_argument("folder", type=Path, metavar="DIR", help="folder to write")
    verb.add_argument("--model", required=True, metavar="REPO", help="what phi-mm push pushed")
    verb.add_argument("--revision", default="main", help="its branch or commit (%(default)s)")
    verb.add_argument("--space", required=True, metavar="NAME", help="[NAMESPACE/]NAME")
    verb.add_argument("--hardware", default="cpu-basic", help="as the Hub calls it (%(default)s)")
    verb.add_argument("--private", action="store_true", help="make the Space private")
    verb.add_argument(
        "--variable", action="append", default=[], metavar="NAME=VALUE", help="a public setting"
    )
    verb.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME[=ENV]",
        help="a secret setting, read from the environment variable of that name, or from ENV",
    )
    verb.add_argument("--no-check", action="store_true", help="do not build and ask it here")
    verb.add_argument("--no-push", action="store_true", help="leave the Hub as it is")


def _add_data(verbs: argparse._SubParsersAction) -> None:
    data = verbs.add_parser("data", help="look at training data").add_subparsers(
        required=True, metavar="VERB"
    )
    verb = _verb(data, "check", check_data)
    verb.add_argument(
        "source",
        metavar="RECIPE|DATA",
        help="a recipe (.yaml), or a file, folder or Hub id of rows",
    )
    verb.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the recipe")
    verb.add_argument("--out", type=Path, metavar="DIR", help="folder of the page, data.html")
    verb.add_argument("--processor", type=Path, help="run or artefact that counts DATA's tokens")
    verb.add_argument("--media-root", type=Path, help="where DATA's media paths start (beside it)")
    verb.add_argument("--max-length", type=_positive, help="report rows of DATA with more tokens")


def _add_feedback(verbs: argparse._SubParsersAction) -> None:
    feedback = verbs.add_parser("feedback", help="what users of the Space thought").add_subparsers(
        required=True, metavar="VERB"
    )
    verb = _verb(feedback, "export", export_feedback)
    verb.add_argument("store", help="the Space's folder of records, or their data set's Hub id")
    verb.add_argument("out", type=Path, help="new folder to write")
    verb.add_argument(
        "--share", type=float, default=0.2, help="of conversations, to measure by (%(default)s)"
    )
    verb.add_argument("--liked", action="store_true", help="also take answers with a thumb up")

    verb = _verb(feedback, "delete", delete_conversation)
    verb.add_argument("store", help="the Space's folder of records, or their data set's Hub id")
    verb.add_argument("conversation", help="its name")


def _add_tiny(verbs: argparse._SubParsersAction) -> None:
    tiny = verbs.add_parser("tiny", help="the embedded default").add_subparsers(
        required=True, metavar="VERB"
    )
    verb = _verb(tiny, "build-bases", build_bases)
    verb.add_argument("--only", choices=BASES)
    verb.add_argument("--out", type=Path, default=Path("checkpoints"), help="(%(default)s)")
    verb.add_argument("--work", type=Path, default=Path("runs/bases"), help="(%(default)s)")
    verb.add_argument("--seed", type=int, default=0)

    verb = _verb(tiny, "world", world)
    verb.add_argument("out", type=Path)
    verb.add_argument("--seed", type=int, default=0)
    for name, help_text in (
        ("images", "training pictures"),
        ("speeches", "spoken conversations without a picture"),
        ("sentences", "recordings that are only to be written down"),
        ("texts", "conversations in text alone"),
        ("validation", "questions of each task in val/"),
        ("test", "questions of each task in test/"),
    ):
        verb.add_argument(f"--{name}", type=_positive, help=help_text)
    verb.add_argument("--workers", type=_positive, help="processes")

    verb = _verb(tiny, "examples", examples)
    verb.add_argument("out", type=Path)
    verb.add_argument("--seed", type=int, default=0)


def _verb(
    verbs: argparse._SubParsersAction, name: str, function: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    about = function.__doc__[0].lower() + function.__doc__[1:].removesuffix(".")
    verb = verbs.add_parser(name, help=about, description=function.__doc__)
    verb.set_defaults(verb=function)
    return verb


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return number


# The verbs


def demo(given: argparse.Namespace) -> None:
    """Everything at once: data, training, scores, answers."""
    from phi_mm.demo import Demo

    Demo(given.out, seed=given.seed).run()


def cache(given: argparse.Namespace) -> None:
    """Compute what the frozen towers say about a recipe's data, for training to read."""
    from accelerate import PartialState

    from phi_mm.features import fill_for_recipe
    from phi_mm.recipes import load_recipe

    recipe = load_recipe(given.recipe, given.overrides)
    computed = sum(prediction.missing for prediction in fill_for_recipe(recipe))
    if PartialState().is_main_process:
        print(f"{recipe.features_folder} is complete: {computed:,} computed now")


def train(given: argparse.Namespace) -> None:
    """Train one stage; the same as python train.py."""
    from phi_mm.checkout import run_train

    run_train(given.arguments)


def estimate(given: argparse.Namespace) -> None:
    """Predict the memory and the time of a training run."""
    from dataclasses import fields

    from phi_mm.estimate import Question, describe
    from phi_mm.recipes import load_recipe

    question = Question(**{field.name: vars(given)[field.name] for field in fields(Question)})
    for line in describe(load_recipe(given.recipe, given.overrides), question):
        print(line, flush=True)


def evaluate(given: argparse.Namespace) -> None:
    """Measure a run on what its recipe names."""
    from phi_mm.evaluation import evaluate_run, table, write_report

    tasks = evaluate_run(given.run, given.split, given.limit, given.batch_size)
    out = given.out or given.run
    write_report(tasks, out, f"phi-mm, {given.run.name}")
    print(table([outcome.row for task in tasks for outcome in task.outcomes]))
    print(f"\n{out}/report.html shows answers; metrics.json and predictions.jsonl hold the rest")


def export(given: argparse.Namespace) -> None:
    """Write a run as a Hub repository, and verify it."""
    from phi_mm.hub import export as run

    for probe in run(given.run, given.out, given.metrics):
        print(f"{probe.probe.name}: {probe.answer!r}, logits within {probe.difference:.1e}")
    print(f"{given.out} is complete and verified; next: phi-mm chat {given.out}")


def merge(given: argparse.Namespace) -> None:
    """Write an artefact with an adapter inside its weights, and verify it."""
    from phi_mm.hub import merge as run

    answered, difference = run(given.adapter, given.out, given.base)
    for probe in answered:
        print(f"{probe.probe.name}: {probe.answer!r}, logits within {probe.difference:.1e}")
    print(f"merging changed logits by at most {difference:.1e} of the largest")
    print(f"{given.out} is complete and verified; next: phi-mm chat {given.out}")


def verify(given: argparse.Namespace) -> None:
    """Load an artefact in a fresh process and ask it."""
    from phi_mm.assembly import load_run
    from phi_mm.hub import verify as run
    from processing import PhiMMProcessor

    if given.run:
        model, processor = load_run(given.run, merge=True)
    else:
        model, processor = None, PhiMMProcessor.from_pretrained(given.artefact)
    for probe in run(given.artefact, processor, model):
        compared = "" if model is None else f", logits within {probe.difference:.1e}"
        print(f"{probe.probe.name}: {probe.answer!r}{compared}")
    print(f"{given.artefact} loads and answers in a fresh process")


def push(given: argparse.Namespace) -> None:
    """Push an artefact to the Hub, and verify what is there."""
    if given.adapter_only != (given.base is not None):
        raise ValueError("got one of --adapter-only and --base, expected both or neither")
    if given.adapter_only and given.for_vllm:
        raise ValueError(
            "got --adapter-only and --for-vllm, expected one: vLLM serves whole models"
        )
    from phi_mm.hub import Destination
    from phi_mm.hub import push as run
    from phi_mm.hub import push_adapter as run_adapter

    destination = Destination(given.repo, given.revision, given.private)
    if given.adapter_only:
        pushed = run_adapter(given.folder, destination, given.base)
    else:
        pushed = run(given.folder, destination, given.for_vllm)
    for probe, answer in pushed.answers:
        print(f"{probe.name}: {answer!r}")
    print(f"{pushed.repo} at {pushed.commit} was downloaded again and answers the same")


def deploy_space(given: argparse.Namespace) -> None:
    """Serve an artefact of the Hub in a Space of your own."""
    from phi_mm.hub.space import Space, deploy, read_secrets, read_variables

    space = Space(
        model=given.model,
        name=given.space,
        revision=given.revision,
        hardware=given.hardware,
        private=given.private,
        variables=read_variables(given.variable),
        secrets=read_secrets(given.secret),
    )
    push = not given.no_push
    space = deploy(given.folder, space, _show_owner_secret, not given.no_check, push)
    if not push:
        print(f"{given.folder} is written; without --no-push it becomes the Space {space.name}")
        return
    print(f"https://huggingface.co/spaces/{space.name} is being built; it serves {space.model}")
    if space.hardware not in ("cpu-basic", "zero-a10g"):
        print(f"{space.hardware} is billed by the hour, until you pause the Space in its settings")


def _show_owner_secret(secret: str) -> None:
    print(f"the owner's secret, shown this once (PHI_MM_OWNER_SECRET): {secret}", flush=True)


def chat(given: argparse.Namespace) -> None:
    """Talk with an artefact: text, pictures, recordings."""
    from phi_mm.chat import chat as run

    run(given.artefact, sys.stdin, given.max_new_tokens)


def serve(given: argparse.Namespace) -> None:
    """Show a page to talk with an artefact in the browser."""
    from phi_mm.checkout import run_space

    run_space(given.artefact, given.revision, given.port)


def check_data(given: argparse.Namespace) -> None:
    """Report on a recipe's data, or on a data set, and every fault in it."""
    from phi_mm.data_check import check_recipe, check_rows
    from phi_mm.datasets import write_page

    settings = (given.processor, given.media_root, given.max_length)
    if Path(given.source).suffix in (".yaml", ".yml"):
        if any(settings):
            raise ValueError(
                "got --processor, --media-root or --max-length beside a recipe, which says them"
            )
        report = check_recipe(given.source, given.overrides)
    elif given.overrides:
        raise ValueError(f"got {given.overrides[0]} beside {given.source}, which is no recipe")
    else:
        report = check_rows(given.source, *settings)
    print(report)
    if given.out:
        print(f"\n{write_page(report, given.out, given.source)} shows rows and lengths")
    if report.faults:
        sys.exit(f"phi-mm: {report.faults} faults in {given.source}")


def export_feedback(given: argparse.Namespace) -> None:
    """Write what users corrected as rows to train on and to measure by."""
    from phi_mm.feedback import export as run

    print(run(given.store, given.out, given.share, given.liked))


def delete_conversation(given: argparse.Namespace) -> None:
    """Delete all that is kept of a conversation."""
    from phi_mm.checkout import run_records

    folder = Path(given.store)
    store = str(folder.resolve()) if folder.is_dir() else given.store
    run_records(["delete", store, given.conversation])


def build_bases(given: argparse.Namespace) -> None:
    """Train the tiny Phi, CLIP and Whisper."""
    from phi_mm.tiny.bases import build_bases as build

    build([given.only] if given.only else [*BASES], given.out, given.seed, given.work)


def world(given: argparse.Namespace) -> None:
    """Write the drawn and spoken training world."""
    from phi_mm.tiny.rows import write_world

    names = ("images", "speeches", "sentences", "texts", "validation", "test", "workers")
    amounts = {name: vars(given)[name] for name in names if vars(given)[name] is not None}
    for file, rows in write_world(given.out, given.seed, **amounts).items():
        print(f"{given.out / file}: {rows} rows")


def examples(given: argparse.Namespace) -> None:
    """Draw and speak the examples on the page of the Space."""
    from phi_mm.tiny.showcase import write_examples

    for line in write_examples(given.out, given.seed):
        print(" | ".join(line))


if __name__ == "__main__":
    main()
