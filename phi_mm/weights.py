"""What a run has trained without LoRA, in files of its own: the projectors, and towers that learnt.

What stands in no pretrained part must be in the run folder, and nothing else need be.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from modeling_phi_mm.media_phi_mm import is_trained
from phi_mm.plan import PROJECTORS, TOWERS, TuneSection

PROJECTOR_FILE = "projectors.safetensors"
TOWER_FILE = "towers.safetensors"


def projectors(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The projectors that this model has, by their name inside `model.model`."""
    return _children(model, PROJECTORS)


def learning_towers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The towers of which something learns, by their name inside `model.model`."""
    towers = _children(model, TOWERS)
    return {name: tower for name, tower in towers.items() if is_trained(tower)}


def save_parts(
    model: PreTrainedModel, folder: Path, whole: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes the projectors, and the towers that learn where one does.

    Args:
        whole: the state dict of a model whose own weights are divided among processes.
    """
    state = model.state_dict() if whole is None else whole
    save_file(_state(state, projectors(model)), folder / PROJECTOR_FILE)
    if learning := learning_towers(model):
        save_file(_state(state, learning), folder / TOWER_FILE)


def load_parts(model: PreTrainedModel, folder: Path, towers: Iterable[str]) -> None:
    """Puts back what `save_parts` wrote, into all projectors and these towers.

    Raises:
        ValueError: a file is missing, or holds another model's shapes.
    """
    load_projectors(model, folder)
    if wanted := _children(model, [name for name in TOWERS if name in towers]):
        _load(wanted, folder / TOWER_FILE)


def load_aligned(model: PreTrainedModel, run_dirs: list[Path], tune: TuneSection) -> None:
    """Goes on from earlier stages: their projectors, and their towers where they learnt. What two
    of them hold is taken from the later one.

    Raises:
        ValueError: a projector of this model is in none of them, or of other shapes, or a tower
            learnt that this run would not save.
    """
    own, found = projectors(model), set()
    for run_dir in run_dirs:
        held = {key.partition(".")[0] for key in load_file(_projector_file(run_dir))}
        _load({name: own[name] for name in own if name in held}, run_dir / PROJECTOR_FILE)
        found |= held
        _check_kept(learnt_towers(run_dir), run_dir, tune)
        load_learnt_towers(model.model, run_dir)
    if missing := own.keys() - found:
        raise ValueError(
            f"got model.init_from={', '.join(map(str, run_dirs))}, which holds no "
            f"{', '.join(sorted(missing))}: add the run that trained it"
        )


def learnt_towers(run_dir: Path) -> list[str]:
    """The towers that a run has trained in full."""
    path = run_dir / TOWER_FILE
    keys = load_file(path) if path.is_file() else {}
    return [name for name in TOWERS if any(key.startswith(f"{name}.") for key in keys)]


def load_learnt_towers(parts: nn.Module, run_dir: Path) -> None:
    """Puts the towers that a run has trained into those that `parts` has.

    Raises:
        ValueError: a tower of other shapes than this one.
    """
    own = dict(parts.named_children())
    learnt = {name: own[name] for name in learnt_towers(run_dir) if name in own}
    if learnt:
        _load(learnt, run_dir / TOWER_FILE)


def _check_kept(learnt: list[str], run_dir: Path, tune: TuneSection) -> None:
    for name in learnt:
        if tune.language_model != "full" and tune.fate(name) != "full":
            raise ValueError(
                f"got model.init_from={run_dir}, which trained its {name}, and tune.{name}="
                f"{tune.fate(name)}, with which this run would save nothing of it: set "
                f"tune.{name}=full"
            )


def load_projectors(model: PreTrainedModel, run_dir: Path) -> None:
    """Puts the projectors of an aligned run (or of one of its checkpoints) into `model`.

    Raises:
        ValueError: no projectors there, or projectors of other shapes than this model's.
    """
    _load(projectors(model), _projector_file(run_dir))


def _projector_file(run_dir: Path) -> Path:
    path = run_dir / PROJECTOR_FILE
    if not path.is_file():
        raise ValueError(
            f"got {run_dir}, expected the run folder of a stage with tune.language_model: frozen "
            f"(holding {PROJECTOR_FILE}): train that stage first"
        )
    return path


def _children(model: PreTrainedModel, names: Iterable[str]) -> dict[str, nn.Module]:
    children = dict(model.model.named_children())
    return {name: children[name] for name in names if name in children}


def _state(whole: dict[str, torch.Tensor], modules: Iterable[str]) -> dict[str, torch.Tensor]:
    """Of a state dict that of several modules, keys as `multi_modal_projector.linear_1.weight`."""
    prefixes = tuple(f"model.{name}." for name in modules)
    return {
        key.removeprefix("model."): value.detach().contiguous()
        for key, value in whole.items()
        if key.startswith(prefixes)
    }


def _load(modules: dict[str, nn.Module], path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"got no {path}, expected the weights of {', '.join(modules)} in it")
    state = load_file(path)
    for name, module in modules.items():
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        shapes = {k: tuple(v.shape) for k, v in own.items()}
        expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
        if shapes != expected:
            raise ValueError(
                f"got {name} of {shapes} in {path}, expected {expected}: the model sections of "
                "both recipes must agree"
            )
        module.load_state_dict(own)
