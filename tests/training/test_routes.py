"""The four routes from Whisper to Phi on the tiny default: trained, cached, saved, loaded again."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, WhisperForConditionalGeneration

from phi_mm.assembly import assemble, join_parts
from phi_mm.chat import Chat
from phi_mm.datasets import mixture
from phi_mm.features import FeatureCache, fill_cache, open_cache
from phi_mm.features.towers import load_towers
from phi_mm.hub.export import save_artefact
from phi_mm.recipes import Recipe, load_recipe
from phi_mm.training import PhiMMTrainer
from processing import PhiMMCollator, PhiMMProcessor

ROOT = Path(__file__).parents[2]
WRITTEN = ("transcript", "transcript_embeddings", "decoder")
PROJECTED = ("transcript_embeddings", "decoder")
NOTHING = "(nothing was heard)"


def sound(seconds: float, seed: int) -> np.ndarray:
    """Something that the tiny Whisper takes for words: tones that change."""
    rng = np.random.default_rng(seed)
    tones = rng.uniform(100, 900, int(seconds * 10))
    phase = 2 * np.pi * np.cumsum(np.repeat(tones, 1600)) / 16_000
    return (0.3 * np.sin(phase)).astype(np.float32)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a recording, two, a recording with a picture, silence, a picture, and text alone."""
    folder, rows = tmp_path_factory.mktemp("spoken"), []
    for number in range(3):
        soundfile.write(folder / f"{number}.wav", sound(1 + 2 * number, number), 16_000)
    soundfile.write(folder / "silence.wav", np.zeros(16_000, np.float32), 16_000)
    Image.new("RGB", (48, 48), "red").save(folder / "red.png")
    shown = (["0.wav"], ["1.wav", "2.wav"], ["2.wav", "red.png"], ["silence.wav"], ["red.png"], [])
    for media in shown:
        sounds = [name for name in media if name.endswith("wav")]
        pictures = [name for name in media if name.endswith("png")]
        row = {"id": f"row-{len(rows)}"}
        row |= {"audio": sounds} if sounds else {}
        row |= {"image": pictures} if pictures else {}
        marks = "<audio>\n" * len(sounds) + "<image>\n" * len(pictures)
        row["conversations"] = [
            {"from": "human", "value": f"{marks}what is it?"},
            {"from": "gpt", "value": "a red star"},
        ]
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


@pytest.fixture
def stage1(spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function that gives the tiny recipe of stage 1 with a route."""
    monkeypatch.chdir(ROOT)

    def make(route: str, *overrides: str) -> Recipe:
        return load_recipe(
            "recipes/tiny/stage1.yaml",
            [
                f"model.audio_route={route}",
                f"data.train={spoken}",
                "data.validation=[]",
                f"features_dir={tmp_path / 'features'}",
                f"training.output_dir={tmp_path / 'run'}",
                "training.max_steps=1",
                "training.warmup_steps=0",  # whose first step is of length zero
                "training.per_device_train_batch_size=6",
                "training.use_cpu=true",
                "training.disable_tqdm=true",
                *overrides,
            ],
        )

    return make


def filled(recipe: Recipe, model, processor: PhiMMProcessor, rows) -> FeatureCache:
    cache = open_cache(recipe.features_folder, model.model, processor, recipe.features_dtype)
    fill_cache(cache, model.model, processor, [rows])
    return cache


def questions(rows) -> list[list[dict]]:
    """The users' turns, by id."""
    by_id = sorted(rows, key=lambda row: row["id"])
    return [row["messages"][:1] for row in by_id]


def prepared(processor, conversations: list[list[dict]]):
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


@pytest.mark.parametrize("route", ["encoder", *WRITTEN])
def test_a_route_trains_and_is_exported(route: str, stage1, tmp_path: Path):
    recipe = stage1(route)
    torch.manual_seed(0)
    model, processor = assemble(recipe)
    rows = mixture(recipe.data.train, 0, processor, recipe.data.max_length)
    cache = filled(recipe, model, processor, rows)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = PhiMMTrainer(
        model=model,
        args=recipe.training_arguments(),
        data_collator=PhiMMCollator(processor, cache, recipe.data.max_length, None),
        train_dataset=rows,
        processing_class=processor,
    )
    trainer.train()
    now = model.named_parameters()
    parts = {name.split(".")[1] for name, p in now if (p != before[name]).any()}
    taught = {"multi_modal_projector"} | ({"audio_projector"} if route != "transcript" else set())
    assert parts == taught

    model.eval()
    save_artefact(model, processor, tmp_path / "artefact")
    artefact = str(tmp_path / "artefact")
    again = AutoModel.from_pretrained(artefact, trust_remote_code=True).eval()
    reader = AutoProcessor.from_pretrained(artefact, trust_remote_code=True)
    assert again.config.audio_route == route
    assert reader.audio_stack == again.config.audio_stack == (1 if route in PROJECTED else 4)
    for asked in questions(rows)[1:3]:  # two recordings; a recording and a picture
        if route != "encoder":
            shown, read = processor.transcribe(asked, model), reader.transcribe(asked, again)
        else:
            shown = read = asked
        ids = model.generate(**prepared(processor, [shown]), max_new_tokens=6, do_sample=False)
        assert torch.equal(
            ids, again.generate(**prepared(reader, [read]), max_new_tokens=6, do_sample=False)
        )


@pytest.mark.parametrize("route", PROJECTED)
def test_placeholders_are_the_words_of_the_transcript(route: str, stage1, tmp_path: Path, capsys):
    model, processor = join_parts(stage1(route))
    asked = {"role": "user", "content": [{"type": "audio", "audio": sound(9, 1)}]}  # 3 windows
    mel = processor(audio=[sound(9, 1)], return_tensors="pt")["input_features"]
    ids = model.transcribe(mel)
    stock = WhisperForConditionalGeneration.from_pretrained("checkpoints/tiny-whisper").eval()
    assert len(mel) == 3 and torch.equal(ids, stock.generate(input_features=mel))
    text, words = processor.read_transcript(ids)
    count = sum(map(len, words))
    assert count == sum(i < 705 for row in ids.tolist() for i in row) > 3  # special ones follow
    [part] = processor.transcribe([asked], model)[0]["content"]
    assert part["transcript"] == text and part["audio_embeds"].shape == (count, 128)
    soundfile.write(tmp_path / "said.wav", sound(9, 1), 16_000, subtype="FLOAT")
    chat = Chat(model, processor, max_new_tokens=2)
    chat.attach("audio", str(tmp_path / "said.wav"))
    chat.ask("")
    assert f"(heard: {text})" in capsys.readouterr().out
    inputs = prepared(processor, [[{"role": "user", "content": [part]}]])
    assert (inputs["input_ids"] == model.config.audio_token_id).sum() == count
    whisper = model.model.audio_tower.model
    if route == "transcript_embeddings":
        table = whisper.decoder.embed_tokens.weight
        assert torch.equal(part["audio_embeds"], table[torch.tensor(sum(words, []))])
    else:
        spoken = [707, 708, 710, 714]  # start, English, transcribe, no timestamps
        with torch.no_grad():
            for window, own in enumerate(words):
                states = whisper(
                    input_features=mel[window : window + 1],
                    decoder_input_ids=torch.tensor([[*spoken, *own]]),
                ).last_hidden_state[0, len(spoken) :]
                start = sum(map(len, words[:window]))
                found = part["audio_embeds"][start : start + len(own)]
                torch.testing.assert_close(found, states, atol=1e-4, rtol=0)


@pytest.mark.parametrize("route", PROJECTED)
def test_a_batch_is_its_conversations_and_a_cache_is_its_model(route: str, stage1):
    recipe = stage1(route)
    torch.manual_seed(0)
    model, processor = join_parts(recipe)
    rows = mixture(recipe.data.train, 0, processor)
    written = [processor.transcribe(asked, model) for asked in questions(rows)]
    assert written[3][0]["content"][0] == {"type": "text", "text": NOTHING}
    for one, other in zip(written, processor.transcribe(questions(rows), model), strict=True):
        for part, beside in zip(one[0]["content"], other[0]["content"], strict=True):
            assert part.get("transcript") == beside.get("transcript")
            if "audio_embeds" in part:
                heard = part["audio_embeds"], beside["audio_embeds"]
                torch.testing.assert_close(*heard, atol=1e-4, rtol=0)
    together = model(**prepared(processor, written)).logits[:, -1]
    for row, asked in zip(together, written, strict=True):
        alone = model(**prepared(processor, [asked])).logits[0, -1]
        torch.testing.assert_close(row, alone, atol=1e-3, rtol=0)
    cache = filled(recipe, model, processor, rows)
    sample = rows.sort("id")
    cached = PhiMMCollator(processor, cache)(list(sample))
    by_hand = [
        {"messages": [*asked, row["messages"][1]]}
        for asked, row in zip(written, sample, strict=True)
    ]
    fresh = PhiMMCollator(processor)(by_hand)
    assert cached.keys() == (fresh.keys() | {"image_embeds"}) - {"pixel_values"}
    assert torch.equal(cached["input_ids"], fresh["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**cached).loss, model(**fresh).loss, atol=1e-4, rtol=0)
    inputs = prepared(processor, [written[1]])
    kept, anew = (
        model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(kept, anew)
    beaming = {"num_beams": 2, "min_new_tokens": 3, "max_new_tokens": 3}
    beams = model.generate(**prepared(processor, written[1:3]), **beaming)
    for found, asked in zip(beams, written[1:3], strict=True):
        one = model.generate(**prepared(processor, [asked]), **beaming)
        assert torch.equal(found[-3:], one[0, -3:])


def test_a_recording_is_written_down_once(stage1, tmp_path: Path, monkeypatch):
    recipe = stage1("decoder")
    towers, processor = load_towers(recipe)
    asked = []
    heard = towers.transcribe
    monkeypatch.setattr(towers, "transcribe", lambda mel: asked.append(len(mel)) or heard(mel))
    path = str(tmp_path / "said.wav")

    def fill() -> FeatureCache:
        soundfile.write(path, sound(1, len(asked)), 16_000)
        row = {"messages": [{"role": "user", "content": [{"type": "audio", "audio": path}]}]}
        cache = open_cache(recipe.features_folder, towers, processor)
        fill_cache(cache, towers, processor, [[row, row]])
        return cache

    first = fill()
    [lines] = (tmp_path / "features/transcripts").glob("*/00000.jsonl")
    assert (
        asked == [1]
        and json.loads(lines.read_text())["text"] == first.transcripts[first.key(path)].text
    )
    with lines.open("a") as torn:
        torn.write('{"key": "torn')
    second = fill()  # another recording under the same name
    assert asked == [1, 1] and len(second.transcripts.known) == 2
    del asked[1:]
    fill()
    assert asked == [1] and len(lines.read_text().splitlines()) == 2
    other = stage1("decoder", "model.dtype=bfloat16", f"features_dir={tmp_path / 'other'}")
    assert not open_cache(
        recipe.features_folder.parent / "other", *load_towers(other)
    ).transcripts.known


@pytest.mark.parametrize("route", WRITTEN)
def test_what_a_route_cannot_do_is_refused(route: str, stage1):
    with pytest.raises(ValueError, match=f"features: live with model.audio_route={route}"):
        stage1(route, "features=live", "features_dir=null")
    with pytest.raises(ValueError, match="no gradient would reach it"):
        stage1(route, "tune.audio_tower=full", "features=live", "features_dir=null")
    model, processor = join_parts(stage1(route))
    with pytest.raises(ValueError, match=f"audio_route is '{route}'"):
        model(input_ids=torch.tensor([[1]]), input_features=torch.zeros(1, 40, 400))
    with pytest.raises(ValueError, match=r"processor.transcribe\(messages, model\)"):
        content = [{"type": "audio", "audio": sound(1, 0)}]
        prepared(processor, [[{"role": "user", "content": content}]])


def test_the_language_of_recordings_is_a_line_of_the_recipe(stage1):
    recipe = stage1(
        "decoder", "model.transcript_language=english", "model.transcript_task=translate"
    )
    model, processor = join_parts(recipe)
    settings = model.config.transcript_generation_config
    assert (settings["language"], settings["task"]) == ("english", "translate")
    towers, _ = load_towers(recipe)
    assert towers.config.transcript_generation_config == settings
    mel = processor(audio=[sound(1, 0)], return_tensors="pt")["input_features"]
    ids = model.transcribe(mel)
    assert torch.equal(ids, model.transcribe(mel, language="en", task="translate"))
    with pytest.raises(ValueError, match="got transcript_language='de', expected one of en"):
        join_parts(stage1("decoder", "model.transcript_language=de"))


@pytest.mark.parametrize("route", ["encoder", *WRITTEN])
def test_what_comes_in_chunks_is_what_comes_at_once(route: str, stage1):
    """Nine seconds: two whole windows of the tiny Whisper and a rest, or windows with pauses."""
    model, processor = join_parts(stage1(route))
    recording = sound(9, seed=5)
    stream = processor.stream_audio(model)
    for start in range(0, len(recording), 1000):
        stream.add(recording[start : start + 1000])
    part = stream.finish()
    whole = {"type": "audio", "audio": recording}
    if route != "encoder":
        [whole] = processor.transcribe([{"role": "user", "content": [whole]}], model)[0]["content"]
        assert part.get("text") == whole.get("text")
        assert part.get("transcript") == whole.get("transcript")
    asked = [[{"role": "user", "content": [given]}] for given in (part, whole)]
    ids = [prepared(processor, [turns]) for turns in asked]
    assert torch.equal(ids[0]["input_ids"], ids[1]["input_ids"])
    with torch.no_grad():
        one, other = (model(**inputs).logits[0, -1] for inputs in ids)
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="got no samples"):
        stream.finish()
    with pytest.raises(ValueError, match="got int16 of shape"):
        stream.add(np.zeros(5, np.int16))
