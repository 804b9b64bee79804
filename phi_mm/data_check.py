"""What `phi-mm data check` reports on: all data of a recipe, or one data set."""

from pathlib import Path

from phi_mm.assembly import load_processor
from phi_mm.datasets import Report, check
from phi_mm.recipes import load_recipe
from processing import PhiMMProcessor


def check_recipe(path: str, overrides: list[str]) -> Report:
    """What the recipe trains on, validates with and measures by."""
    recipe = load_recipe(path, overrides)
    return check(
        recipe.data.train,
        recipe.data.validation,
        [task.data for task in recipe.evaluation],
        recipe.data_seed,
        load_processor(recipe),
        recipe.data.max_length,
    )


def check_rows(
    source: str,
    processor: Path | None = None,
    media_root: Path | None = None,
    max_length: int | None = None,
) -> Report:
    """A file, folder or Hub id of rows; `processor` is the folder of one that counts tokens."""
    counter = PhiMMProcessor.from_pretrained(processor) if processor else None
    return check(
        [{"path": source, "media_root": media_root}], processor=counter, max_length=max_length
    )
