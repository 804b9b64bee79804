"""Steps are done once, go on where they were cut off, and start again when their inputs change."""

from pathlib import Path

import pytest

from phi_mm.steps import Steps, digest


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def carry_out(out: Path, inputs: str, fails: bool = False) -> list[str]:
    """Runs one step that appends to its output; returns what the user was told."""
    told: list[str] = []

    def work() -> None:
        with (out / "result").open("a") as file:
            file.write(inputs)
        if fails:
            raise KeyboardInterrupt

    steps = Steps(out, told.append)
    steps.run("bake", "baking", inputs, [out / "result"], work)
    assert steps.seconds()["bake"] >= 0
    return told


def test_done_once(out: Path) -> None:
    assert carry_out(out, "a") == ["\n== baking"]
    assert carry_out(out, "a") == ["\n== baking", "done before with the same inputs: skipped"]
    assert (out / "result").read_text() == "a"


def test_changed_inputs_start_from_nothing(out: Path) -> None:
    carry_out(out, "a")
    assert carry_out(out, "b")[1] == "its inputs have changed: starting again"
    assert (out / "result").read_text() == "b"


def test_a_cut_off_step_goes_on_with_what_it_left(out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        carry_out(out, "a", fails=True)
    assert carry_out(out, "a")[1] == "going on where it was cut off"
    assert (out / "result").read_text() == "aa"


def test_lost_outputs_are_made_again(out: Path) -> None:
    carry_out(out, "a")
    (out / "result").unlink()
    assert carry_out(out, "a") == ["\n== baking"]
    assert (out / "result").read_text() == "a"


def test_digest_depends_on_content_names_and_texts(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = digest([tmp_path], "x")
    assert digest([tmp_path], "x") == before
    assert digest([tmp_path], "y") != before
    (tmp_path / "a").rename(tmp_path / "b")
    assert digest([tmp_path], "x") != before
