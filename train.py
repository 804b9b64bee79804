"""Train one stage of phi-mm from a recipe.

    python train.py recipes/tiny/stage1.yaml
    python train.py recipes/tiny/stage2.yaml training.max_steps=10 data.max_length=512

Started again, a run goes on behind its last checkpoint. On several GPUs: `accelerate launch
train.py ...`.
"""

import argparse
import json
import logging

from peft import PeftModel
from transformers import TrainingArguments, set_seed

from phi_mm.assembly import assemble
from phi_mm.datasets import Stream, mixture
from phi_mm.features import FeatureCache, fill_cache, open_cache
from phi_mm.hub.destination import check_destination
from phi_mm.recipes import Recipe, load_recipe
from phi_mm.training import PhiMMTrainer, begin_or_resume, by_modality
from processing import PhiMMCollator, PhiMMProcessor


def main() -> None:
    """Parse, assemble, data, Trainer, train, evaluate, save: in that order."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = parse()
    arguments = recipe.training_arguments()
    if arguments.push_to_hub:
        check_destination(arguments.hub_model_id, arguments.hub_private_repo)
    with arguments.main_process_first(desc="run folder"):
        checkpoint = begin_or_resume(recipe)

    set_seed(arguments.seed)
    model, processor = assemble(recipe)

    with arguments.main_process_first(desc="check of the data"):
        taken = (recipe.data_seed, processor, recipe.data.max_length)
        train = (Stream if recipe.streams else mixture)(recipe.data.train, *taken)
        validation = recipe.data.validation and mixture(recipe.data.validation, *taken)
    features = cached_features(recipe, arguments, model, processor, [train, validation or []])

    trainer = PhiMMTrainer(
        model=model,
        args=arguments,
        data_collator=PhiMMCollator(
            processor, features, recipe.data.max_length, recipe.data.packed_length
        ),
        train_dataset=train,
        eval_dataset=by_modality(validation) if validation else None,
        processing_class=processor,
        learning_rates=recipe.tune.learning_rates,
        gradient_norm_limit=recipe.tune.gradient_norm_limit,
        distillation=recipe.distillation,
        group_by_modality=recipe.data.group_by_modality,
        augmentation=recipe.data.augmentation,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    if validation:
        metrics = trainer.evaluate()
        if "text" in trainer.eval_dataset and recipe.tune.adapted:
            metrics["eval_pretrained_text_loss"] = trainer.pretrained_text_loss()
        trainer.save_metrics("eval", metrics)
        losses = {key: round(value, 4) for key, value in metrics.items() if key.endswith("loss")}
        say(arguments, f"validation {json.dumps(losses)}")

    trainer.save_model()
    trainer.save_state()
    say(arguments, f"saved {recipe.run_dir}")


def say(arguments: TrainingArguments, line: str) -> None:
    """Print once, however many processes there are."""
    if arguments.process_index == 0:
        print(line)


def parse() -> Recipe:
    """The recipe named on the command line, with its overrides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a YAML file, such as recipes/tiny/stage1.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_args()
    return load_recipe(given.recipe, given.overrides)


def cached_features(
    recipe: Recipe,
    arguments: TrainingArguments,
    model: object,
    processor: PhiMMProcessor,
    datasets: list,
) -> FeatureCache | None:
    """What the frozen towers say about the data, computed once; None for `features: live`."""
    if recipe.features == "live":
        return None
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    cache = open_cache(recipe.features_folder, base.model, processor, recipe.features_dtype)
    fill_cache(cache, base.model, processor, datasets, arguments.device)
    return cache


if __name__ == "__main__":
    main()
