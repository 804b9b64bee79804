"""Six artefacts, and the record of which ways of using them work.

Every test here is one row of docs/conformance.md: `@pytest.mark.way(section, name)` names it, the
`case` fixture runs it for each artefact, and `refused` notes that phi-mm says no, and how.
`make conformance` writes the table from what the tests found.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from talk import Talk
from transformers import BatchFeature, PreTrainedModel

from phi_mm.hub.export import save_artefact
from processing import PhiMMProcessor

FAMILIES = ("phi", "phi3")
PARTS = ("image", "audio", "both")


@dataclass(frozen=True)
class Case:
    """One family of language model with one choice of towers.

    `artefact` is an exported folder of `build()`'s model; nobody may write to it.
    """

    family: str
    parts: str
    artefact: Path
    build: Callable[..., tuple[PreTrainedModel, PhiMMProcessor]]

    @property
    def sees(self) -> bool:
        return self.parts != "audio"

    @property
    def hears(self) -> bool:
        return self.parts != "image"

    def messages(self, seed: int = 0) -> list[dict]:
        """A question that shows and plays all that the artefact can take."""
        random = np.random.default_rng(seed)
        content = []
        if self.sees:
            picture = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            content.append({"type": "image", "image": picture})
        if self.hears:
            sound = random.normal(0, 0.1, 5000).astype(np.float32)
            content.append({"type": "audio", "audio": sound})
        return [{"role": "user", "content": [*content, {"type": "text", "text": "what is it?"}]}]


@pytest.fixture(
    scope="session",
    params=[(family, parts) for family in FAMILIES for parts in PARTS],
    ids=lambda param: "-".join(param),
)
def case(
    request: pytest.FixtureRequest,
    make_phi_mm: Callable,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    family, parts = request.param

    def build(**config_fields) -> tuple[PreTrainedModel, PhiMMProcessor]:
        sees, hears = parts != "audio", parts != "image"
        return make_phi_mm(family, vision=sees, audio=hears, **config_fields)

    folder = tmp_path_factory.mktemp("artefacts") / f"{family}-{parts}"
    save_artefact(*build(), folder)
    return Case(family, parts, folder, build)


@pytest.fixture(scope="session")
def talk(case: Case) -> Talk:
    """The artefact's model, a prompt, and a batch with a typed prompt and other media."""
    model, processor = case.build()
    tone = 0.5 * np.sin(np.arange(9000) / 10).astype(np.float32)
    others = case.messages(seed=2)
    for part in others[0]["content"]:
        part |= {"audio": tone} if part["type"] == "audio" else {}

    def read(*conversations: list[dict]) -> BatchFeature:
        return processor.apply_chat_template(
            list(conversations),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    typed = [{"role": "user", "content": "hello you"}]
    batch = read(case.messages(), typed, others)
    return Talk(model, processor, read(case.messages()), batch)


@pytest.fixture(scope="session")
def greedy(talk: Talk) -> list[list[int]]:
    return talk.say()


@pytest.fixture(scope="session")
def greedy_three(talk: Talk) -> list[list[int]]:
    return talk.say(talk.three)


@pytest.fixture
def refused(request: pytest.FixtureRequest) -> Callable[[object], None]:
    """Call it with the error (or words) by which phi-mm refuses this way of use."""

    def note(error: object) -> None:
        request.node.user_properties.append(("refused", str(error)))

    return note


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "way(section, name): the row of docs/conformance.md")
