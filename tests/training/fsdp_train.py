"""train.py under FSDP2 on CPUs, for `torchrun --nproc_per_node 2`; the arguments are train.py's.

accelerate divides models among accelerators alone. Here it takes two processes on CPUs, joined by
gloo, for such; all else is as recipes/accelerate/fsdp.yaml has it.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import PartialState
from accelerate.utils import DistributedType

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Environment as the launcher makes it, then train.py."""
    settings = load_config_from_file(str(ROOT / "recipes/accelerate/fsdp.yaml")).fsdp_config
    os.environ |= {name.upper(): str(value) for name, value in settings.items()}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_XPU)
    torch.distributed.init_process_group("gloo")
    sys.path.insert(0, str(ROOT))
    from train import main as train

    train()


if __name__ == "__main__":
    main()
