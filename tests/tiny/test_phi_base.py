"""The tiny Phi: its tokenizer, its rows, its training, and the checkpoint in the repository."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PhiForCausalLM

from phi_mm.tiny.language import KINDS, text_dialogue
from phi_mm.tiny.phi_base import SPARE_IDS, build, build_model, build_tokenizer
from phi_mm.tiny.phi_gate import answers, conversations, prompt, scene_questions
from phi_mm.tiny.phi_training import Recipe, RowMaker, answer_logits, collate, train
from phi_mm.tiny.scenes import MORE_COLOURS, SPLITS

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "tiny-phi"
SMALL = Recipe(seed=3, steps=6, hidden_size=32, layers=2, rows=2, row_tokens=96, long_every=3)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(seed=0)


@pytest.fixture(scope="module")
def shipped():
    model = PhiForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.mark.parametrize(
    "text",
    [
        "Zürich 漢字 🙂\u200b\tTabs  and   spaces \r\n\n",
        " leading and trailing ",
        "WHAT Colour is 12345 + 6?",
        "\nOutput: \nInstruct:Instruct: output:",
        "a\x00b\x7f\u2028c",
    ],
)
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids


def test_turn_marks_and_words_are_one_token_each(tokenizer):
    ids = tokenizer("Instruct: what colour is the star?\nOutput: pink<|endoftext|>\nInstruct: hi.")
    tokens = tokenizer.convert_ids_to_tokens(ids["input_ids"])
    assert [tokenizer.convert_tokens_to_string([token]) for token in tokens] == [
        *("Instruct:", " what", " colour", " is", " the", " star", "?"),
        *("\nOutput:", " pink", "<|endoftext|>", "\nInstruct:", " hi", "."),
    ]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_word_of_the_world_is_one_token(tokenizer, split):
    rng = random.Random(1)
    for _ in range(150):
        turns = text_dialogue(rng, split)
        for word in " ".join(f"{user} {answer}" for user, answer in turns).split():
            bare = word.rstrip("?.,:")
            if bare.isalpha():
                assert len(tokenizer(f" {bare}")["input_ids"]) == 1, word


def test_vocabulary_has_spare_rows(tokenizer):
    model = build_model(tokenizer, SMALL)
    assert model.config.vocab_size - len(tokenizer) >= SPARE_IDS
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.eos_token_id == 0


def test_first_heads_look_back(tokenizer):
    model = build_model(tokenizer, Recipe(seed=0, steps=1)).eval()
    model.set_attn_implementation("eager")
    ids = torch.tensor([tokenizer("Instruct: a small pink star is on the left")["input_ids"]])
    attention = model(ids, output_attentions=True).attentions[0][0]
    for head, offset in enumerate((1, 2, 3, 4)):
        assert attention[head, -1].argmax().item() == ids.size(1) - 1 - offset


def rows(tokenizer, count=6, **changes):
    recipe = Recipe(seed=0, steps=1, **changes)
    maker = RowMaker(tokenizer, recipe)
    rng = random.Random(5)
    return [maker.row(rng, 128) for _ in range(count)]


def test_questions_in_blocks_read_as_single_turns(tokenizer):
    blocks = rows(tokenizer, talk_rows=0.0, block_rows=1.0, ahead_rows=0.0, gaps=0.0)
    model = build_model(tokenizer, SMALL).eval()
    with torch.no_grad():
        logits, targets, _ = answer_logits(model, blocks, tokenizer.pad_token_id)
    wanted = []
    for row in blocks:
        for number, (_, first, end) in enumerate(row.answers, 1):
            ids = [i for i, b in zip(row.ids, row.blocks, strict=True) if b in (0, number)]
            text = tokenizer.decode(ids)
            assert text.startswith("Instruct: ") and text.count("\nOutput:") == 1
            with torch.no_grad():
                alone = model(torch.tensor([ids])).logits[0]
            wanted.append(alone[-1 - (end - first) : -1])
    assert len(targets) == len(logits)
    assert torch.allclose(logits, torch.cat(wanted), atol=1e-4)


def test_conversation_rows_read_as_plain_causal_text(tokenizer):
    [row, *_] = rows(tokenizer, talk_rows=0.0, block_rows=0.0, ahead_rows=0.0, gaps=0.0)
    text = tokenizer.decode(row.ids)
    assert tokenizer(text)["input_ids"] == row.ids
    assert row.positions == list(range(len(row.ids)))
    for _, first, end in row.answers:
        assert tokenizer.decode(row.ids[:first]).endswith("\nOutput:")
        assert row.ids[end - 1] == tokenizer.eos_token_id
    ids, _, mask = collate([row], 0)
    assert torch.equal(mask[0, 0], torch.ones(ids.size(1), ids.size(1)).tril().bool())


def test_kinds_answered_wrongly_are_asked_more(tokenizer):
    maker = RowMaker(tokenizer, SMALL)
    before = maker.weights()
    for _ in range(500):
        maker.note("colour", True)
    after = maker.weights()
    assert after[0] < 0.2 * before[0]
    assert after[1:] == before[1:]


def test_scenes_are_plain_at_first_and_told_in_all_wordings_in_the_end(tokenizer):
    recipe = Recipe(seed=0, steps=150, restarts=(100,))
    assert [recipe.plain_share(step) for step in (0, 25, 50, 99)] == [1.0, 1.0, 0.0, 0.0]
    assert recipe.plain_share(30) == pytest.approx(0.8)
    rates = [recipe.rate(step) for step in (0, 40, 75, 99, 100, 149)]
    assert rates == pytest.approx([1 / 30, 1.0, 0.5, 0.02, 1 / 30, 0.04])
    maker = RowMaker(tokenizer, Recipe(seed=0, steps=1, talk_rows=0.0))
    rng = random.Random(5)
    plain = r"Instruct:( (and )?a (small|large) \w+ \w+ (at|on|in) the [a-z ]+?){1,3}\. "
    for share, least, most in ((1.0, 30, 30), (0.0, 0, 10)):
        texts = [tokenizer.decode(maker.row(rng, 96, share).ids) for _ in range(30)]
        assert least <= sum(re.match(plain, text) is not None for text in texts) <= most


@pytest.mark.parametrize("step, least, most", [(99, 0, 0), (100, 3, 25)])
def test_half_of_the_scenes_are_in_other_words_once_that_begins(tokenizer, step, least, most):
    recipe = Recipe(seed=0, steps=150, restarts=(50, 100), talk_rows=0.0, ahead_rows=0.0)
    maker = RowMaker(tokenizer, recipe)
    rng = random.Random(6)
    share = recipe.renamed_share(step)
    texts = [tokenizer.decode(maker.row(rng, 96, renamed_share=share).ids) for _ in range(30)]
    strange = re.compile(rf" ({'|'.join(set(MORE_COLOURS) - {'white'})})\b")  # milk is white
    assert least <= sum(strange.search(text) is not None for text in texts) <= most


def run(tokenizer, work, stop_at=None):
    model = build_model(tokenizer, SMALL)
    train(model, tokenizer, SMALL, work, stop_at)
    return model.state_dict()


def test_resumed_training_equals_uninterrupted(tokenizer, tmp_path):
    straight = run(tokenizer, tmp_path / "straight")
    run(tokenizer, tmp_path / "cut", stop_at=4)
    resumed = run(tokenizer, tmp_path / "cut")
    untrained = build_model(tokenizer, SMALL).state_dict()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name
    assert not torch.equal(
        straight["model.layers.0.mlp.fc1.weight"], untrained["model.layers.0.mlp.fc1.weight"]
    )


def test_a_saved_run_of_another_recipe_is_refused(tokenizer, tmp_path):
    run(tokenizer, tmp_path, stop_at=1)
    other = Recipe(seed=4, steps=6, hidden_size=32, layers=2)
    with pytest.raises(ValueError, match="got a saved run of recipe .*expected.*delete"):
        train(build_model(tokenizer, other), tokenizer, other, tmp_path)


def test_build_writes_a_checkpoint_with_its_gate(tmp_path):
    out = tmp_path / "tiny-phi"
    gate = build(out, seed=1, work=tmp_path / "work", steps=2, gate_questions=1)
    assert json.loads((out / "gate.json").read_text()) == gate
    assert not gate["passed"]
    assert {row["split"] for row in gate["metrics"]} == {"validation", "test"}
    model = PhiForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float16
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 0
    assert "not passed" in (out / "README.md").read_text()
    assert (out / "model.safetensors").stat().st_size <= 3_000_000


TALKS = [
    ("a small red star at the top left and a large blue circle on the right. "
     "where is the red star?", "at the top left"),
    ("in the middle there is a large black cross. at the bottom is a small pink heart. "
     "what colour is the small heart?", "pink"),
    ("look: i see a small yellow square on the left. i see a small green circle at the top. "
     "how many small things are there?", "two"),
    ("is there a red heart? a large red star at the top and a small blue heart on the left.", "no"),
    ("there is a small purple triangle at the bottom. there is a large pink star at the top. "
     "what is above the triangle?", "a pink star"),
    ("how many days are in a week?", "seven"),
    ("what is two plus three?", "five"),
    ("say this again: the red star is small.", "the red star is small"),
]  # fmt: skip


def test_the_shipped_checkpoint_answers(shipped):
    model, tokenizer = shipped
    said = answers(model, tokenizer, [prompt([turn]) for turn in TALKS])
    assert said == [answer for _, answer in TALKS]


def test_the_shipped_checkpoint_remembers_earlier_turns(shipped):
    model, tokenizer = shipped
    talks = list(conversations(random.Random(12), "validation", 150))
    said = answers(model, tokenizer, [prompt(turns) for turns in talks])
    right = [given == turns[-1][1] for given, turns in zip(said, talks, strict=True)]
    assert sum(right) / len(right) >= 0.95
    turns = [
        ("listen: a large green circle on the left and a small red star at the top.", "ok"),
        ("what colour is the star?", "red"),
        ("what is the capital of france?", "paris"),
        ("how many things are there?", "two"),
        ("list all things.", "a small red star at the top and a large green circle on the left"),
    ]  # fmt: skip
    prompts = [prompt(turns[: end + 1]) for end in range(len(turns))]
    assert answers(model, tokenizer, prompts) == [answer for _, answer in turns]


def test_the_shipped_checkpoint_answers_unseen_questions_of_every_kind(shipped):
    model, tokenizer = shipped
    rng = random.Random(11)
    cases = [case for kind in KINDS for case in scene_questions(rng, "test", kind, 10)]
    said = answers(model, tokenizer, [prompt([(f"{w} {q.text}", "")]) for _, w, q in cases])
    right = [text == q.answer for text, (_, _, q) in zip(said, cases, strict=True)]
    assert sum(right) / len(right) > 0.85


def test_the_shipped_checkpoint_passed_its_gate():
    gate = json.loads((CHECKPOINT / "gate.json").read_text())
    values = {(row["name"], row["split"]): row["value"] for row in gate["metrics"]}
    gated = [values[name, split] for name in ("questions", "later turns") for split in SPLITS[1:]]
    assert gate["lowest"] == min(gated) >= gate["bar"]
    assert gate["passed"]
