"""One of the processes of a test: trains on rows of text and rows with a picture, in turn."""

import sys
from pathlib import Path

import torch

from phi_mm.assembly import assemble
from phi_mm.datasets import mixture
from phi_mm.recipes import Recipe, load_recipe
from phi_mm.training import PhiMMTrainer
from phi_mm.training.sampler import row_kinds
from processing import PhiMMCollator


def train(recipe: Recipe) -> None:
    """Into the recipe's run folder."""
    arguments = recipe.training_arguments()
    torch.manual_seed(0)
    model, processor = assemble(recipe)
    rows = mixture(recipe.data.train, 0)
    places = {"text": [], "image": [], "audio": [], "image_audio": []}
    for place, kind in enumerate(row_kinds(rows)):
        places[kind].append(place)
    pairs = zip(places["text"], places["image"], strict=True)
    trainer = PhiMMTrainer(
        model=model,
        args=arguments,
        data_collator=PhiMMCollator(processor),
        train_dataset=rows.select([place for pair in pairs for place in pair]),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(load_recipe(Path(sys.argv[1])))
