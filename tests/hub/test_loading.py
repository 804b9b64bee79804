"""Loading in smaller dtypes and fewer bits, with weights that were trained: the shipped bases."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BatchFeature, BitsAndBytesConfig, PreTrainedModel

from modeling_phi_mm import PhiMMForConditionalGeneration, PhiMMModel
from phi_mm.assembly import join_parts
from phi_mm.hub.export import save_artefact
from phi_mm.hub.probes import make_probes
from phi_mm.recipes import load_recipe

ROOT = Path(__file__).parents[2]
FLOAT = ("vision_tower", "multi_modal_projector", "audio_tower", "audio_projector")


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[BatchFeature]]:
    """The tiny bases joined by projectors as they are drawn, and five prompts."""
    bases = {"text": "tiny-phi", "vision": "tiny-clip", "audio": "tiny-whisper"}
    words = [f"model.{part}={ROOT / 'checkpoints' / name}" for part, name in bases.items()]
    torch.manual_seed(0)
    model, processor = join_parts(load_recipe(ROOT / "recipes/tiny/stage1.yaml", words))
    folder = tmp_path_factory.mktemp("trained") / "artefact"
    save_artefact(model, processor, folder)
    prompts = [
        processor.apply_chat_template(
            probe.messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        for probe in make_probes(tmp_path_factory.mktemp("probes"), processor)
    ]
    return folder, prompts


def load(folder: Path, **options) -> PreTrainedModel:
    return PhiMMForConditionalGeneration.from_pretrained(folder, **options)


def difference(found: PreTrainedModel, exact: PreTrainedModel, prompts: list) -> float:
    """Largest difference of logits over the largest logit, of all prompts the worst."""
    with torch.no_grad():
        pairs = [(found(**p).logits.float(), exact(**p).logits) for p in prompts]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def linear_kinds(model: PreTrainedModel) -> dict[str, set[str]]:
    """Kinds of linear layers of each part."""
    kinds: dict[str, set[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            part = path.removeprefix("model.").split(".")[0]
            kinds.setdefault(part, set()).add(type(module).__name__)
    return kinds


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dtype": "float16"}, 5e-3),
        ({"dtype": "bfloat16"}, 5e-2),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, 5e-2),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, 3e-1),
        (
            {
                "quantization_config": BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4"
                )
            },
            3e-1,
        ),
    ],
    ids=["float16", "bfloat16", "8-bit", "4-bit", "4-bit, nf4"],
)
def test_logits_stay_within_the_stated_tolerance(artefact, options: dict, tolerance: float):
    folder, prompts = artefact
    off = difference(load(folder, **options), load(folder, dtype="float32"), prompts)
    assert 0 < off <= tolerance


@pytest.mark.parametrize("skipped", [None, ["lm_head"], ["model.language_model.layers.0"]])
def test_a_list_of_the_users_own_adds_to_what_stays_float(artefact, skipped: list[str] | None):
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    kinds = linear_kinds(load(artefact[0], quantization_config=settings))
    assert {part: kinds[part] for part in FLOAT} == dict.fromkeys(FLOAT, {"Linear"})
    own = {"Linear"} if skipped == ["model.language_model.layers.0"] else set()
    assert kinds["language_model"] == {"Linear4bit"} | own
    assert kinds["lm_head"] == {"Linear"}


def test_the_model_without_its_head_is_quantised_alike(artefact):
    settings = BitsAndBytesConfig(load_in_4bit=True)
    kinds = linear_kinds(PhiMMModel.from_pretrained(artefact[0], quantization_config=settings))
    assert kinds == {**dict.fromkeys(FLOAT, {"Linear"}), "language_model": {"Linear4bit"}}


def test_a_quantised_model_is_saved_and_loaded_again(artefact, tmp_path: Path):
    folder, prompts = artefact
    model = load(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert linear_kinds(again) == linear_kinds(model)
    assert difference(again, model, prompts) == 0


def test_moving_to_a_dtype_is_loading_in_it(make_phi_mm: Callable, tmp_path: Path):
    """Far positions too, where rounded rotary frequencies would turn by another angle."""
    model, processor = make_phi_mm()
    model.save_pretrained(tmp_path)
    ids = processor.tokenizer("a long way " * 120, return_tensors="pt").input_ids
    with torch.no_grad():
        loaded = load(tmp_path, dtype="bfloat16")(ids).logits
        moved = model.to(torch.bfloat16)(ids).logits
    assert torch.equal(moved, loaded)


def test_shards_are_loaded_and_pickled_shards_are_not(make_phi_mm: Callable, tmp_path: Path):
    model, _ = make_phi_mm()
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    again = load(tmp_path / "shards").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    for shard in shards:
        shard.unlink()
    torch.save({}, tmp_path / "shards" / "pytorch_model-00001-of-00001.bin")
    with pytest.raises(ValueError, match="got pytorch_model-00001-of-00001.bin, expected weights"):
        PhiMMModel.from_pretrained(tmp_path, subfolder="shards")
