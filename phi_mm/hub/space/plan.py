"""What is to be deployed, and what of it can be refused before anything is done."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, SpaceHardware, hf_hub_download
from huggingface_hub.utils import validate_repo_id

from phi_mm.hub import folder as publishable
from phi_mm.hub.destination import find_model, told

MODEL, REVISION = "PHI_MM_MODEL", "PHI_MM_REVISION"
OWNER_SECRET, TOKEN = "PHI_MM_OWNER_SECRET", "HF_TOKEN"
SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
WHOLE_MODEL = "modeling_phi_mm.PhiMMForConditionalGeneration"


@dataclass(frozen=True)
class Space:
    """What is to be deployed.

    Attributes:
        model: repository of an artefact.
        name: of the Space, NAME or NAMESPACE/NAME.
        revision: branch or commit of the model.
        hardware: as the Hub calls it.
        private: whether only its owner is to see it.
        variables: settings that everybody may see.
        secrets: those that nobody may see again.

    Raises:
        ValueError: a name or a hardware that the Hub does not take, or a variable that would tell
            a secret.
    """

    model: str
    name: str
    revision: str = "main"
    hardware: str = SpaceHardware.CPU_BASIC.value
    private: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        validate_repo_id(self.model)
        validate_repo_id(self.name)
        known = [hardware.value for hardware in SpaceHardware]
        if self.hardware not in known:
            raise ValueError(
                f"got the hardware {self.hardware!r}, expected one of {', '.join(known)}"
            )
        for name, value in self.variables.items():
            if publishable.TOKEN.search(value) or name in (OWNER_SECRET, TOKEN):
                raise ValueError(
                    f"got the variable {name}, which everybody can read, for what looks like a "
                    f"secret: put it into the environment and give --secret {name}"
                )
            if name in self.secrets:
                raise ValueError(f"got {name} as a variable and as a secret, expected one of them")

    @property
    def zero(self) -> bool:
        """On ZeroGPU."""
        return self.hardware.startswith("zero-")

    @property
    def on_cpu(self) -> bool:
        return self.hardware.startswith("cpu-")


def read_variables(given: list[str]) -> dict[str, str]:
    """The variables of NAME=VALUE.

    Raises:
        ValueError: not of that form, or the name of a setting that is made here.
    """
    read = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not SETTING.fullmatch(name):
            raise ValueError(f"got --variable {text}, expected NAME=VALUE")
        if name in (MODEL, REVISION):
            raise ValueError(f"got --variable {name}, which --model and --revision set")
        read[name] = value
    return read


def read_secrets(given: list[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The secrets of NAME or NAME=ENV: values come from the environment, never from the line.

    Raises:
        ValueError: not of that form, or no such variable in the environment.
    """
    read = {}
    for text in given:
        name, _, source = text.partition("=")
        source = source or name
        if not SETTING.fullmatch(name):
            raise ValueError("got a --secret without a name, expected NAME or NAME=ENV")
        if not environment.get(source):  # it may be the secret itself, and is not repeated
            raise ValueError(
                f"got --secret {name} with nothing to read it from, expected NAME or NAME=ENV, ENV "
                "the name of an environment variable that holds it"
            )
        read[name] = environment[source]
    return read


def check_model(space: Space) -> str:
    """The commit of the model, which the Space will be able to load.

    Raises:
        ValueError: no whole artefact of phi-mm, or a private one that the Space could not read.
    """
    repo, token = space.model, space.secrets.get(TOKEN)
    found = find_model(repo, "--model", space.revision)
    config = Path(hf_hub_download(repo, "config.json", revision=found.sha))
    auto_class = json.loads(config.read_text("utf-8")).get("auto_map", {}).get("AutoModel")
    if auto_class != WHOLE_MODEL:
        raise ValueError(
            f"got --model {repo}, whose AutoModel is {auto_class}, expected {WHOLE_MODEL}: push it "
            "without --for-vllm"
        )
    if found.private and token is None:
        raise ValueError(
            f"got --model {repo}, which is private, expected a token for the Space too: make one "
            f"that may only read it, put it into the environment, and give --secret {TOKEN}=ENV"
        )
    if token is not None:
        with told(f"cannot read {repo} with the token of --secret {TOKEN}"):
            HfApi(token=token).model_info(repo)
    return found.sha
