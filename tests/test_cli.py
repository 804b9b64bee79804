"""The command line: quick, complete, and clear about what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from phi_mm.cli import main, parser

HEAVY = ("torch", "transformers", "datasets", "numpy")


@pytest.mark.parametrize(
    "line",
    [
        "demo --out runs/x",
        "cache recipes/tiny/stage1.yaml features_dtype=int8",
        "train recipes/tiny/stage1.yaml training.max_steps=1",
        "evaluate runs/x --out y --split val --limit 3 --batch-size 2",
        "export runs/x y --metrics m.json",
        "verify y --run runs/x",
        "push y --repo ann/x --private --revision v1 --for-vllm",
        "push runs/x --repo x --adapter-only --base ann/x",
        "deploy-space d --model ann/x --revision v1 --space s --hardware t4-small --private "
        "--variable A=1 --secret B=C --no-check --no-push",
        "chat y --max-new-tokens 5",
        "serve y --revision abc --port 1",
        "data check rows.json --processor y --media-root m --max-length 9 --out o",
        "data check recipes/tiny/stage1.yaml data.max_length=9 --out o",
        "feedback export store out --share 0.5 --liked",
        "feedback delete store abc",
        "tiny build-bases --only clip --out c --work w --seed 1",
        "tiny world w --seed 1 --images 2 --test 3 --workers 1",
        "tiny examples w --seed 1",
    ],
)
def test_every_verb_parses(line: str) -> None:
    assert callable(parser().parse_args(line.split()).verb)


def test_help_loads_nothing_heavy() -> None:
    script = "import sys; from phi_mm.cli import parser; parser(); print(sorted(sys.modules))"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    loaded = set(eval(done.stdout))
    assert not loaded.intersection(HEAVY)


@pytest.mark.parametrize("line", ["", "nonsense", "evaluate", "evaluate x --limit 0", "data"])
def test_a_line_that_is_none_exits_with_usage(line: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    assert "usage: phi-mm" in capsys.readouterr().err


def test_errors_are_one_sentence_unless_the_traceback_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="phi-mm: got .*, expected a run folder") as stopped:
        main(["evaluate", str(tmp_path)])
    assert stopped.value.code != 0
    with pytest.raises(ValueError, match="expected a run folder"):
        main(["--traceback", "evaluate", str(tmp_path)])


def test_data_check_counts_faults(tmp_path: Path, capsys) -> None:
    turns = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": "a", "image": "missing.png", "conversations": turns}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(SystemExit, match="1 faults"):
        main(["data", "check", str(tmp_path / "rows.json")])
    assert "missing.png: missing" in capsys.readouterr().out


def test_world_says_what_it_wrote(tmp_path: Path, capsys) -> None:
    small = [f"--{name}=2" for name in ("images", "speeches", "sentences", "texts")]
    exams = ["--validation=1", "--test=1", "--workers=1"]
    main(["tiny", "world", str(tmp_path), *small, *exams])
    assert f"{tmp_path}/stage1.json: " in capsys.readouterr().out
    assert len(json.loads((tmp_path / "test" / "asr.json").read_text())) == 1
