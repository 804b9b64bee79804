"""Caches, prefill and inputs: greedy's own tokens where they should be, or a refusal."""

import copy
import importlib.util

import pytest
import torch
from talk import TOKENS
from transformers import BatchFeature, CompileConfig, DynamicCache, StaticCache


def check_same(talk, greedy, greedy_three, **options) -> None:
    """The option changes nothing, alone and in a batch."""
    assert talk.say(**options) == greedy
    assert talk.say(talk.three, **options) == greedy_three


@pytest.mark.way("Generate", "dynamic cache")
def test_dynamic_cache(talk, greedy, greedy_three):
    assert greedy_three[0] == greedy[0]
    assert greedy_three[2] != greedy[0]  # other media, another answer
    check_same(talk, greedy, greedy_three, cache_implementation="dynamic")
    config = talk.model.config.get_text_config()
    assert talk.say(past_key_values=DynamicCache(config=config)) == greedy


@pytest.mark.way("Generate", "static cache")
def test_static_cache(talk, greedy, greedy_three):
    check_same(talk, greedy, greedy_three, cache_implementation="static")
    config = talk.model.config.get_text_config()
    assert talk.say(past_key_values=StaticCache(config=config, max_cache_len=100)) == greedy


@pytest.mark.way("Generate", "offloaded cache, the model on the CPU")
def test_offloaded_cache(talk, refused):
    for name in ("offloaded", "offloaded_static"):
        with pytest.raises(ValueError, match=f"got cache_implementation='{name}'") as error:
            talk.say(cache_implementation=name)
    refused(error.value)


@pytest.mark.way("Generate", "quantised cache")
def test_quantised_cache(talk, refused):
    if importlib.util.find_spec("optimum") is not None:  # no dependency of phi-mm
        assert len(talk.say(cache_implementation="quantized")[0]) == TOKENS
        return
    with pytest.raises(ImportError, match="install optimum-quanto") as error:
        talk.say(cache_implementation="quantized")
    refused(error.value)


@pytest.mark.way("Generate", "`use_cache=False`")
def test_no_cache(talk, greedy, greedy_three):
    check_same(talk, greedy, greedy_three, use_cache=False)


@pytest.mark.way("Generate", "a second turn on the first one's cache")
def test_cache_of_an_earlier_turn(talk):
    first = talk.model.generate(
        **talk.one, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True
    )
    more = talk.processor.tokenizer(" and?", return_tensors="pt").input_ids
    ids = torch.cat([first.sequences, more], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cache = copy.deepcopy(first.past_key_values)
    whole = talk.say(turn | talk.media)
    assert talk.say(turn, past_key_values=first.past_key_values) == whole
    fresh = ids[:, cache.get_seq_length() :]
    assert talk.say(turn | {"input_ids": fresh}, past_key_values=cache) == whole


@pytest.mark.way("Generate", "a second turn on a cache, with the media that it holds given again")
def test_cached_media_given_again(talk, refused):
    first = talk.model.generate(
        **talk.one, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
    )
    turn = {
        "input_ids": first.sequences,
        "attention_mask": torch.ones_like(first.sequences),
    }
    with pytest.raises(ValueError, match="got media with a prompt of which past_key_val") as error:
        talk.say(turn | talk.media, past_key_values=first.past_key_values)
    refused(error.value)


@pytest.mark.way("Generate", "`torch.compile` of the decode step, as one graph (backend `eager`)")
def test_compiled_decoding(talk, greedy):
    torch._dynamo.reset()  # the graph of another model with these layers would do
    settings = CompileConfig(backend="eager", fullgraph=True)
    settings._compile_all_devices = True  # transformers compiles on accelerators alone otherwise
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    said = talk.say(cache_implementation="static", compile_config=settings, min_new_tokens=TOKENS)
    assert said == talk.say(min_new_tokens=TOKENS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


@pytest.mark.way("Generate", "chunked prefill: `prefill_chunk_size`")
@pytest.mark.parametrize("size", [1, 7, 64])
def test_chunked_prefill(talk, greedy, greedy_three, size):
    check_same(talk, greedy, greedy_three, prefill_chunk_size=size)


@pytest.mark.way("Generate", "chunked prefill with beams, and with a static cache")
def test_chunked_prefill_of_beams(talk, greedy_three):
    beams = talk.say(talk.three, num_beams=2)
    assert talk.say(talk.three, num_beams=2, prefill_chunk_size=5) == beams
    static = talk.say(talk.three, prefill_chunk_size=5, cache_implementation="static")
    assert static == greedy_three


def embedded(talk, inputs: BatchFeature) -> dict:
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    return rest | {"inputs_embeds": talk.model.get_input_embeddings()(inputs["input_ids"])}


@pytest.mark.way("Generate", "`inputs_embeds` beside the media")
def test_inputs_embeds(talk, greedy, greedy_three):
    assert talk.say(embedded(talk, talk.one)) == greedy
    assert talk.say(embedded(talk, talk.three)) == greedy_three
    both = embedded(talk, talk.one) | {"input_ids": talk.one["input_ids"]}
    assert talk.say(both) == greedy
    assert talk.say(embedded(talk, talk.one), num_beams=3) == talk.say(num_beams=3)


@pytest.mark.way("Generate", "`inputs_embeds` that hold the media")
def test_merged_inputs_embeds(talk, greedy):
    inputs = embedded(talk, talk.one)
    with torch.no_grad():
        encoded = talk.model.model.encode_media(dict(talk.media))
        merged = talk.model.model.merge_media(
            talk.one["input_ids"], inputs["inputs_embeds"], encoded
        )
    given = {"inputs_embeds": merged, "attention_mask": talk.one["attention_mask"]}
    assert talk.say(given) == greedy


@pytest.mark.way("Generate", "`inputs_embeds` in chunks")
def test_chunked_inputs_embeds(talk, refused):
    with pytest.raises(ValueError, match="got inputs_embeds and prefill_chunk_size") as error:
        talk.say(embedded(talk, talk.one), prefill_chunk_size=5)
    refused(error.value)


@pytest.mark.way("Generate", "`mm_encoder_outputs`, also a second time and with beams")
def test_encoder_outputs(talk, greedy):
    with torch.no_grad():
        encoded = talk.model.model.encode_media(dict(talk.media))
    given = talk.text | {"mm_encoder_outputs": encoded}
    assert talk.say(given) == greedy
    assert talk.say(given, num_beams=3) == talk.say(num_beams=3)
    assert talk.say(given, prefill_chunk_size=7) == greedy


@pytest.mark.way("Generate", "`mm_encoder_outputs` beside the same media")
def test_encoder_outputs_twice(talk, refused):
    encoded = talk.model.model.encode_media(dict(talk.media))
    with pytest.raises(ValueError, match="got both mm_encoder_outputs and raw inputs") as error:
        talk.say(mm_encoder_outputs=encoded)
    refused(error.value)


@pytest.mark.way("Generate", "placeholders without their media")
def test_missing_media(talk, refused):
    with pytest.raises(ValueError, match="got 0 .* tokens from the encoder and [1-9]") as error:
        talk.say(talk.text)
    refused(error.value)
