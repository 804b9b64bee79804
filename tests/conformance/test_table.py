"""The page of conformance: in order, every refusal once, and never with a hole."""

from pathlib import Path

import pytest
from conformance_table import COLUMNS, Table


def filled() -> Table:
    table = Table(Path("unused"))
    for column in COLUMNS:
        table.note("Push", "later", column, None)
        table.note("Load", "one", column, None)
        refusal = "got |\nno image" if "audio" in column else None
        table.note("Load", "other", column, refusal)
    return table


def test_sections_have_their_order_and_refusals_stand_once() -> None:
    page = filled().markdown()
    load, push = page.split("\n## ")[1:]
    assert load == (
        "Load\n\n"
        "| way | phi image | phi audio | phi both | phi3 image | phi3 audio | phi3 both |\n"
        "|---|---|---|---|---|---|---|\n"
        "| one | works | works | works | works | works | works |\n"
        "| other | works | refused (1) | works | works | refused (1) | works |\n\n"
        "1. got \\| no image\n"
    )
    assert push.startswith("Push\n") and "refused" not in push


def test_a_table_with_holes_is_not_written() -> None:
    table = filled()
    table.expect("Load", "third", "phi image")
    table.note("Load", "one", "phi both", "refused by one test of two")
    table.problems.append("Load, other, phi image: failed")
    with pytest.raises(ValueError) as error:
        table.markdown()
    assert str(error.value).splitlines()[1:] == [
        "Load, other, phi image: failed",
        "Load, one, phi both: both outcomes",
        *(f"Load, third, {column}: no outcome" for column in COLUMNS),
    ]
    with pytest.raises(ValueError, match="no table"):
        Table(Path("unused")).markdown()
