"""`phi-mm cache`: alone, in two processes, and what training finds afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from phi_mm.cli import main
from phi_mm.features.towers import load_towers
from phi_mm.recipes import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(rows: list[dict], tmp_path: Path, monkeypatch) -> list[str]:
    """The tiny recipe on the rows."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return [
        "recipes/tiny/stage1.yaml",
        f"data.train={tmp_path / 'rows.json'}",
        "data.validation=[]",
        f"features_dir={tmp_path / 'features'}",
        f"training.output_dir={tmp_path / 'run'}",
        "training.use_cpu=true",
    ]


def index(folder: Path, shard: int) -> set[str]:
    lines = (folder / f"{shard:05d}.jsonl").read_text().splitlines()
    return {json.loads(line)["key"] for line in lines}


def test_it_fills_what_is_missing_and_says_so(arguments: list[str], tmp_path: Path, capsys):
    main(["cache", *arguments])
    assert f"{tmp_path / 'features'} is complete: 11 computed now" in capsys.readouterr().out
    main(["cache", *arguments])
    assert "is complete: 0 computed now" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_row_that_training_skips_is_skipped(
    arguments: list[str], one_picture, rows: list[dict], tmp_path: Path, capsys
):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    (tmp_path / "rows.json").write_text(json.dumps([*rows, one_picture(str(broken))]))
    source = f"path: {tmp_path / 'rows.json'}, on_bad_row: skip"
    main(["cache", *arguments, f"data.train=[{{{source}, skip_at_most: 1}}]"])
    assert "is complete: 11 computed now" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="broken.png"):
        main(["cache", *arguments, f"data.train=[{{{source}, skip_at_most: 0}}]"])


def test_a_tower_that_an_earlier_stage_taught_is_the_one_that_fills_it(
    arguments: list[str], tmp_path: Path
):
    untaught, _ = load_towers(load_recipe(arguments[0], arguments[1:]))
    taught = {k: v + 1 for k, v in untaught.vision_tower.state_dict(prefix="vision_tower.").items()}
    (tmp_path / "earlier").mkdir()
    save_file(taught, tmp_path / "earlier" / "towers.safetensors")
    plan = ["tune={language_model: full}", "quantization=null", "lora=null"]
    recipe = load_recipe(
        arguments[0], [*arguments[1:], f"model.init_from={tmp_path / 'earlier'}", *plan]
    )
    towers, _ = load_towers(recipe)
    assert torch.equal(
        towers.vision_tower.state_dict()["post_layernorm.bias"],
        taught["vision_tower.post_layernorm.bias"],
    )
    assert torch.equal(
        next(towers.audio_tower.parameters()), next(untaught.audio_tower.parameters())
    )


def test_a_recipe_that_reads_no_cache_is_refused(arguments: list[str]):
    live = [word for word in arguments if not word.startswith("features_dir")]
    with pytest.raises(SystemExit, match="got features: live, which reads no cache"):
        main(["cache", *live, "features=live", "features_dir=null"])


def test_two_processes_write_disjoint_shards(arguments: list[str], tmp_path: Path, capsys):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*launcher, "-m", "phi_mm.cli", "cache", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("11 computed now") == 1
    for modality, counts in (("image", (3, 2)), ("audio", (3, 3))):
        shards = [index(tmp_path / "features" / modality, shard) for shard in (0, 1)]
        assert tuple(len(shard) for shard in shards) == counts
        assert not shards[0] & shards[1]
    main(["cache", *arguments])  # one process, which reads both shards
    assert "is complete: 0 computed now" in capsys.readouterr().out
