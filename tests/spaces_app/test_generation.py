"""Answers from memory are the answers without it, and what is in memory is not computed again."""

import copy
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from engine.decoding import new_cache
from engine.generation import Answer, Ending, Generator, Heard, Interrupted, Request, Text
from engine.loading import load
from engine.prefix import common_prefix
from engine.zero import LentGenerator, estimate
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import DynamicCache, PreTrainedTokenizerFast

from phi_mm.assembly import LORA_TARGETS
from phi_mm.hub.export import save_artefact

from .conftest import answer_lent, assistant, plainly, user

PLENTY = 1 << 30
FOREVER = 3600.0


def ending(seconds: float = FOREVER) -> Ending:
    return Ending(threading.Event(), time.monotonic() + seconds)


class Watch:
    """Counts what passes the towers and the language model while it is installed."""

    def __init__(self, model):
        self.pictures = self.windows = self.positions = 0
        inner = model.model

        def count(name: str, tensor: Callable) -> Callable:
            def hook(module, args, kwargs):
                value = tensor(args, kwargs)
                setattr(self, name, getattr(self, name) + value)

            return hook

        self.handles = [
            inner.vision_tower.register_forward_pre_hook(
                count("pictures", lambda args, _: len(args[0])), with_kwargs=True
            ),
            inner.audio_tower.register_forward_pre_hook(
                count("windows", lambda args, _: len(args[0])), with_kwargs=True
            ),
            inner.language_model.register_forward_pre_hook(
                count("positions", lambda _, kwargs: kwargs["inputs_embeds"].shape[1]),
                with_kwargs=True,
            ),
        ]

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.fixture
def generator(loaded) -> Generator:
    return Generator(*loaded, media_budget=PLENTY, prefix_budget=PLENTY)


@pytest.fixture
def ask(generator: Generator) -> Callable[..., Answer]:
    def ask(messages: list[dict], conversation: str = "one", tokens: int = 6) -> Answer:
        request = Request(conversation, messages, tokens)
        return generator.answer(request, lambda event: None, ending())

    return ask


def test_second_turn_computes_only_what_is_new(loaded, ask, media: Path) -> None:
    model, processor = loaded
    first = [user(f"{media}/0.png", f"{media}/0.wav", "what is it?")]
    with Watch(model) as watch:
        answer = ask(first)
    assert (watch.pictures, watch.windows) == (1, 1)
    assert watch.positions == answer.prompt_tokens + 5  # the last token is never an input
    assert (answer.reused_tokens, answer.encoded_media) == (0, 2)
    assert answer.token_ids == plainly(model, processor, first, 6)
    second = [*first, assistant(answer.text), user("and then?")]
    with Watch(model) as watch:
        more = ask(second)
    assert (watch.pictures, watch.windows) == (0, 0)
    assert watch.positions == more.prompt_tokens - more.reused_tokens + 5
    assert more.reused_tokens >= answer.prompt_tokens
    assert more.encoded_media == 0
    assert more.token_ids == plainly(model, processor, second, 6)


@pytest.mark.parametrize("family", ["phi", "phi3"])
def test_any_conversation_answers_as_without_memory(
    family: str, make_phi_mm: Callable, media: Path
) -> None:
    """Turns, edits, retries, and media that change places: one conversation after the other, with
    what the one before left in memory.
    """
    model, processor = make_phi_mm(family)
    generator = Generator(model, processor, PLENTY, PLENTY)
    picture, other = f"{media}/0.png", f"{media}/1.png"
    sound, longer = f"{media}/0.wav", f"{media}/3.wav"  # 0.2 s, and 1.1 s in two windows
    turns = [
        [user(picture, "what?")],
        [user(picture, "what?")],  # retry
        [user(picture, "what?"), assistant("red"), user(sound)],
        [user(picture, "what?"), assistant("red"), user(longer)],  # the recording is another
        [user(picture, "what?"), assistant("blue"), user(longer), assistant("so"), user("yes?")],
        [user(other, "what?"), assistant("blue"), user(longer), assistant("so"), user("yes?")],
        [user(other, picture, "what?")],
        [user(picture, other, "what?")],  # as long, with as many placeholders
        [user(picture, picture, "what?")],
        [user("what?"), assistant("no"), user(longer, sound, picture, "which?")],
        [user("what?"), assistant("no"), user(longer, sound, other, "which?")],
        [user("something else")],
    ]
    reused = []
    for messages in turns:
        answer = generator.answer(Request("one", messages, 6), lambda event: None, ending())
        assert answer.token_ids == plainly(model, processor, messages, 6), messages
        reused.append(answer.reused_tokens)
    assert all(reused[i] > 0 for i in (1, 2, 3, 4, 10))
    placeholders = processor.num_image_tokens
    assert reused[7] < placeholders  # cut before the first picture, not between the two
    assert reused[10] > reused[9]


def test_conversations_share_pictures_but_nothing_else(loaded, ask, media: Path) -> None:
    first = ask([user(f"{media}/0.png", "what?")], "one")
    other = ask([user(f"{media}/0.png", "what?")], "another")
    assert (first.encoded_media, other.encoded_media) == (1, 0)
    assert other.reused_tokens == 0
    assert other.token_ids == first.token_ids


def test_a_renamed_file_is_known_and_a_changed_one_is_not(ask, media: Path, tmp_path) -> None:
    ask([user(f"{media}/0.png", "what?")])
    path = tmp_path / "picture.png"
    path.write_bytes((media / "0.png").read_bytes())
    assert ask([user(str(path), "what?")]).encoded_media == 0
    path.write_bytes((media / "1.png").read_bytes())
    changed = ask([user(str(path), "what?")])
    assert changed.encoded_media == 1
    assert changed.token_ids == ask([user(f"{media}/1.png", "what?")], "anew").token_ids


def test_memory_stays_within_its_budget(loaded, media: Path) -> None:
    model, processor = loaded
    one_token = 2 * 2 * 32 * 4  # keys and values, layers, width, bytes
    question = [user("hello there")]
    length = processor.apply_chat_template(
        question, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"].shape[1]
    kept, whole = (length + 5) * one_token, (length + 6) * one_token
    generator = Generator(model, processor, 2 * 16 * 16 * 4, 4 * whole)
    for name in ("a", "b", "a", "c", "d", "e"):
        generator.answer(Request(name, question, 6), lambda e: None, ending())
    assert generator.prefixes.kept.used == 4 * kept
    assert [name in generator.prefixes.kept for name in "abcde"] == [True, False, True, True, True]
    going = [generator.begin(Request(n, question, 6), lambda e: None, ending()) for n in "ae"]
    assert generator.prefixes.kept.reserved == 2 * whole and generator.has_room
    assert generator.prefixes.kept.used == 2 * kept
    going.append(generator.begin(Request("f", question, 6), lambda e: None, ending()))
    assert not generator.has_room and generator.prefixes.kept.used == kept
    with pytest.raises(ValueError, match=f"expected fewer than {2 * length + 12}: clear it"):
        generator.answer(Request("g", [user("long " * 30)], 6), lambda e: None, ending())
    while going := [sequence for sequence in going if sequence.answer is None]:
        generator.step(going)
    assert generator.prefixes.kept.reserved == 0 and generator.has_room
    with pytest.raises(ValueError, match="of 31 tokens, expected 32 or more: raise PHI_MM_PREFIX"):
        Generator(model, processor, 0, 63 * one_token)
    for number in range(3):  # each picture is 16 patches of width 16 in float32
        generator.answer(Request("a", [user(f"{media}/{number}.png")], 2), lambda e: None, ending())
    assert generator.reader.features.used == 2 * 16 * 16 * 4
    again = generator.answer(Request("a", [user(f"{media}/0.png")], 2), lambda e: None, ending())
    assert again.encoded_media == 1
    generator.forget("a")
    assert "a" not in generator.prefixes.kept
    generator.free()
    assert generator.prefixes.kept.used == generator.reader.features.used == 0


def test_text_grows_by_whole_characters(generator: Generator, loaded) -> None:
    _, processor = loaded
    events = []
    answer = generator.answer(Request("one", [user("hello")], 40), events.append, ending())
    texts = [event.text for event in events]
    assert all(isinstance(event, Text) for event in events)
    assert len(texts) > 3 and len(set(texts)) == len(texts)
    assert not any(text.endswith("\N{REPLACEMENT CHARACTER}") for text in texts)
    assert answer.text == processor.tokenizer.decode(answer.token_ids).strip()
    assert answer.text.startswith(texts[-1].strip())


def test_stopping_keeps_what_was_said_and_what_was_computed(generator: Generator) -> None:
    end, heard = ending(), []

    def stop_at_third(event) -> None:
        heard.append(event)
        if len(heard) == 3:
            end.stop.set()

    messages = [user("hello")]
    whole = generator.answer(Request("other", messages, 40), lambda e: None, ending())
    answer = generator.answer(Request("one", messages, 40), stop_at_third, end)
    assert answer.ended == "stopped"
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
    assert len(heard) == 3
    follow = [*messages, assistant(answer.text), user("more")]
    more = generator.answer(Request("one", follow, 4), lambda e: None, ending())
    assert more.reused_tokens >= answer.prompt_tokens


def test_time_ends_an_answer_and_a_prefill(generator: Generator, loaded, media: Path) -> None:
    model, _ = loaded
    request = Request("one", [user(f"{media}/0.png", "hello")], 40)
    with Watch(model) as watch, pytest.raises(Interrupted):
        generator.answer(request, lambda e: None, ending(seconds=0))
    assert watch.positions == 0
    late = ending(seconds=2.0)
    answer = generator.answer(request, lambda event: time.sleep(0.5), late)
    assert answer.ended == "timeout"
    assert 1 <= len(answer.token_ids) < 40


def test_what_cannot_be_answered_says_why(ask, generator: Generator, media: Path, tmp_path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    with pytest.raises(ValueError, match="expected a picture that can be opened"):
        ask([user(str(broken))])
    with pytest.raises(ValueError, match="conversation of 2[0-9]{3} tokens, expected fewer than 2"):
        ask([user("x" * 2100)])
    soundfile.write(tmp_path / "long.wav", torch.zeros(16_000 * 180).numpy(), 16_000)
    with pytest.raises(ValueError, match="recording of 180 s, which is 2340 tokens, expected"):
        ask([user(str(tmp_path / "long.wav"))])
    assert ask([user("still there?")]).token_ids


def test_an_answer_ends_at_the_end_of_the_context(ask) -> None:
    answer = ask([user("x" * 2010)], tokens=100)
    assert answer.prompt_tokens + len(answer.token_ids) == 2048
    assert answer.ended == "length"


def test_temperature_is_chance(ask, generator: Generator) -> None:
    request = Request("one", [user("hello")], 12, temperature=1.5)
    torch.manual_seed(0)
    answers = [
        tuple(generator.answer(request, lambda e: None, ending()).token_ids) for _ in range(3)
    ]
    assert len(set(answers)) > 1


@pytest.mark.parametrize("route", ["transcript", "decoder"])
def test_transcripts_are_heard_once_and_told(
    route: str, make_phi_mm: Callable, media: Path
) -> None:
    generation = {"decoder_start_token_id": 62, "max_length": 8}
    model, processor = make_phi_mm(audio_route=route, transcript_generation_config=generation)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    processor.transcript_tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    generator = Generator(model, processor, PLENTY, PLENTY)
    messages = [user(f"{media}/1.wav", "what?")]
    events = []
    answer = generator.answer(Request("one", messages, 4), events.append, ending())
    written = processor.transcribe(messages, model)
    part = written[0]["content"][0]
    assert part["type"] == ("text" if route == "transcript" else "audio")
    assert events[0] == Heard([part.get("transcript", part.get("text"))])
    assert answer.token_ids == plainly(model, processor, written, 4)
    assert answer.encoded_media == 1
    again = generator.answer(Request("one", messages, 4), events.append, ending())
    assert again.encoded_media == 0


def test_prefix_is_cut_before_a_medium_and_before_the_last_position() -> None:
    picture, other = [[("image:a", i) for i in range(3)], [("image:b", i) for i in range(3)]]
    assert common_prefix([1, 2, 3], [1, 2, 3]) == 2
    assert common_prefix([1, *picture, 4], [1, *picture, 4, 5]) == 5
    assert common_prefix([1, *picture, 4], [1, *other, 4]) == 1
    assert common_prefix([1, *picture], [1, *picture]) == 1
    assert common_prefix([], [1]) == 0


def test_lora_by_modality_and_long_rope_make_another_prefix(loaded, media: Path) -> None:
    """What was computed without the image adapter is not gone on from with it."""
    model, processor = loaded
    generator = Generator(model, processor, PLENTY, PLENTY)
    text = [user("hello"), assistant("yes")]
    then = {
        "text": [*text, user("again")],
        "image": [*text, user(f"{media}/0.png")],
        "audio": [*text, user(f"{media}/0.wav")],
    }

    def shared(config, messages: list[dict]) -> int:
        generator.prefixes.config = config
        generator.forget("one")
        generator.answer(Request("one", text[:1], 2), lambda e: None, ending())
        _, reused = generator.prefixes.take("one", generator.reader.read(messages))
        return reused

    plain = copy.deepcopy(model.config)
    assert all(shared(plain, messages) > 0 for messages in then.values())
    adapted = copy.deepcopy(model.config)
    adapted.modality_adapters = ["image"]
    assert shared(adapted, then["text"]) == shared(adapted, then["audio"]) > 0
    assert shared(adapted, then["image"]) == 0
    long = copy.deepcopy(model.config)
    long.text_config.rope_parameters = {
        "rope_type": "longrope",
        "original_max_position_embeddings": len(generator.reader.read(text[:1]).keys),
    }
    assert shared(long, then["text"]) == 0
    long.text_config.rope_parameters["original_max_position_embeddings"] = 2000
    assert shared(long, then["text"]) > 0


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_lora_by_modality_answers_as_without_memory(
    make_phi_mm: Callable, media: Path, tmp_path: Path, precision: str
) -> None:
    model, processor = make_phi_mm()
    targets = LORA_TARGETS["phi"]
    lora = {m: LoraConfig(r=4, target_modules=targets) for m in ("image", "audio")}
    model.add_modality_adapters(lora)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    save_artefact(model, processor, tmp_path / "artefact")
    apart, processor = load(str(tmp_path / "artefact"), None, precision)
    generator = Generator(apart, processor, PLENTY, PLENTY)
    messages, reused = [], []
    for question in (["hello"], [f"{media}/0.png", "what?"], ["and now?"], [f"{media}/1.wav"]):
        messages.append(user(*question))
        answer = generator.answer(Request("one", messages, 8), lambda e: None, ending())
        assert answer.token_ids == plainly(apart, processor, messages, 8), question
        reused.append(answer.reused_tokens > 0)
        messages.append(assistant(answer.text))
    # A picture, and later a recording, bring in an adapter that the turns before did not meet.
    assert reused == [False, False, True, False]


@pytest.mark.parametrize("family", ["phi", "phi3", "phi3 with a window", "phi3 with long rope"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_answers_side_by_side_are_those_of_each_alone(
    family: str, precision: str, make_phi_mm: Callable, media: Path, tmp_path: Path
) -> None:
    """Of other lengths, with other media, begun at other times, and with what is in memory."""
    model, processor = make_phi_mm(family.split()[0])
    if "window" in family:
        model.config.text_config.sliding_window = 24
    if "long rope" in family:
        text = model.config.text_config
        text.original_max_position_embeddings = 40
        factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        text.rope_parameters = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    save_artefact(model, processor, tmp_path / "artefact")
    model, processor = load(str(tmp_path / "artefact"), None, precision)
    asked = {
        "short": [user("hi")],
        "picture": [user(f"{media}/0.png", "what?")],
        "recording": [user(f"{media}/3.wav")],
        "long": [user("and so on " * 9, f"{media}/1.png", f"{media}/0.wav")],
    }
    generator = Generator(model, processor, PLENTY, PLENTY)
    begun, going = {}, []
    for name, messages in asked.items():
        begun[name] = generator.begin(Request(name, messages, 14), lambda e: None, ending())
        going = [s for s in begun.values() if s.answer is None]
        generator.step(going)
        generator.step(going)
    while going := [s for s in going if s.answer is None]:
        generator.step(going)
    for name, messages in asked.items():
        assert begun[name].answer.token_ids == plainly(model, processor, messages, 14), name
    messages = [*asked["long"], assistant(begun["long"].answer.text), user("and?")]
    more = generator.answer(Request("long", messages, 6), lambda e: None, ending())
    assert more.reused_tokens > 0
    assert more.token_ids == plainly(model, processor, messages, 6)


def test_keys_and_values_grow_and_are_cut() -> None:
    random = torch.Generator().manual_seed(0)
    cache, plain = new_cache(), DynamicCache()
    for length in (1, 255, 1, 300, 1):
        states = torch.randn(1, 2, length, 4, generator=random)
        for some in (cache, plain):
            keys, values = some.update(states, -states, 0)
        if length == 300:
            for some in (cache, plain):
                some.crop(-310)
        assert torch.equal(*(some.layers[0].keys for some in (cache, plain)))
        assert torch.equal(*(some.layers[0].values for some in (cache, plain)))
    assert cache.get_seq_length() == 248
    assert cache.layers[0].trim() == 2 * 2 * 248 * 4 * 4
    assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)


def test_a_lent_gpu_answers_alike(generator: Generator, loaded, media: Path) -> None:
    """`spaces.GPU` leaves a function as it is on a machine that is not ZeroGPU."""
    lengths = []

    def lend(function: Callable, duration: Callable) -> Callable:
        def lent(*args):
            lengths.append(duration(*args))
            return function(*args)

        return lent

    messages = [user(f"{media}/0.png", "what?")]
    request = Request("one", messages, 40)
    events, lent = [], LentGenerator(generator, lend)
    answer = answer_lent(lent, request, events.append, ending())
    assert answer.token_ids == plainly(*loaded, messages, 40)
    assert [type(event) for event in events] == [Text] * len(events)
    assert lengths == [estimate(request)] == [13]
    with pytest.raises(ValueError, match="expected fewer than 2048"):
        answer_lent(lent, Request("one", [user("x" * 2100)], 4), events.append, ending())
    end = ending()
    stopped = answer_lent(lent, request, lambda event: end.stop.set(), end)
    assert stopped.ended == "stopped" and stopped.text == events[0].text
    assert not [thread for thread in threading.enumerate() if "compute" in thread.name]


def test_int8_goes_on_from_memory_as_without(artefact: Path, media: Path) -> None:
    model, processor = load(str(artefact), None, "int8")
    names = {type(module).__name__ for module in model.model.language_model.layers.modules()}
    assert "Int8Linear" in names and "Linear" not in names
    generator = Generator(model, processor, PLENTY, PLENTY)
    messages = [user(f"{media}/0.png", "what?")]
    for question in ("and?", "why?", "so?"):
        answer = generator.answer(Request("one", messages, 8), lambda e: None, ending())
        assert answer.token_ids == plainly(model, processor, messages, 8)
        messages += [assistant(answer.text), user(question)]
    assert answer.reused_tokens > 0


def test_requests_are_plain_data() -> None:
    """They are pickled on their way to a lent GPU, and written to logs."""
    request = Request("one", [user("hello")], 4)
    assert json.loads(json.dumps(request.messages)) == request.messages
