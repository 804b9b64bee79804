"""Decoding: each way of choosing tokens works with media in the prompt, or is refused."""

import copy

import pytest
import torch
from talk import TOKENS
from transformers import (
    LogitsProcessorList,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)


@pytest.mark.way("Generate", "assisted by a small Phi: `assistant_model`")
def test_assisted(talk, greedy):
    assert talk.say(assistant_model=talk.phi(layers=1)) == greedy
    assert talk.say(assistant_model=talk.phi(layers=1), prefill_chunk_size=7) == greedy
    same = talk.phi(layers=2)  # an assistant whose guesses are often right
    same.model.load_state_dict(talk.model.model.language_model.state_dict())
    same.lm_head.load_state_dict(talk.model.lm_head.state_dict())
    assert talk.say(assistant_model=same) == greedy


@pytest.mark.way("Generate", "assisted, more than one prompt at once")
def test_assisted_batch(talk, refused):
    with pytest.raises(ValueError, match="only supported for batch_size = 1") as error:
        talk.say(talk.three, assistant_model=talk.phi(layers=1))
    refused(error.value)


@pytest.mark.way("Generate", "assisted by a Phi of another vocabulary, without its tokenizer")
def test_assistant_of_another_vocabulary(talk, refused):
    with pytest.raises(ValueError, match="have different tokenizers. Please provide") as error:
        talk.say(assistant_model=talk.phi(layers=1, vocab_size=310))
    refused(error.value)


@pytest.mark.way("Generate", "assisted by a Phi of another vocabulary, with both tokenizers")
def test_assistant_with_its_tokenizer(talk, greedy):
    own = talk.processor.tokenizer
    other = copy.deepcopy(own)
    other.add_tokens(["zz"])
    said = talk.say(
        assistant_model=talk.phi(layers=1, vocab_size=310),
        tokenizer=own,
        assistant_tokenizer=other,
    )
    assert said == greedy


@pytest.mark.way("Generate", "assisted by a phi-mm")
def test_assisted_by_a_phi_mm(talk, refused):
    with pytest.raises(ValueError, match="expected a text-only Phi") as error:
        talk.say(assistant_model=talk.model)
    refused(error.value)


@pytest.mark.way("Generate", "assisted by its own early layers: `assistant_early_exit`")
def test_early_exit(talk, refused):
    with pytest.raises(ValueError, match="got assistant_early_exit") as error:
        talk.say(assistant_early_exit=1)
    refused(error.value)


@pytest.mark.way("Generate", "prompt lookup: `prompt_lookup_num_tokens`")
def test_prompt_lookup(talk):
    lookup = talk.say(max_new_tokens=30, prompt_lookup_num_tokens=3)
    assert lookup == talk.say(max_new_tokens=30)


@pytest.mark.way("Generate", "`num_return_sequences`, sampled")
def test_sampled_sequences(talk):
    options = {"do_sample": True, "top_k": 0}
    torch.manual_seed(0)
    together = talk.say(num_return_sequences=2, **options)
    twice = {key: torch.cat([value, value]) for key, value in talk.one.items()}
    torch.manual_seed(0)
    assert together == talk.say(twice, **options)
    assert together[0] != together[1]


@pytest.mark.way("Generate", "`num_return_sequences` of beams")
def test_beams(talk):
    alone = talk.say(num_beams=3, num_return_sequences=2)
    batch = talk.say(talk.three, num_beams=3, num_return_sequences=2)
    assert batch[:2] == alone and alone[0] == talk.say(num_beams=3)[0] and alone[0] != alone[1]


@pytest.mark.way("Generate", "`TextStreamer` and `TextIteratorStreamer`")
def test_streamers(talk, greedy, capsys):
    text = talk.processor.tokenizer.decode(greedy[0])
    streamer = TextIteratorStreamer(talk.processor.tokenizer, skip_prompt=True)
    assert talk.say(streamer=streamer) == greedy
    assert "".join(streamer) == text
    talk.say(streamer=TextStreamer(talk.processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.way("Generate", "a streamer with beams")
def test_streamed_beams(talk, refused):
    with pytest.raises(ValueError, match="`streamer` cannot be used with beam search") as error:
        talk.say(num_beams=2, streamer=TextStreamer(talk.processor.tokenizer))
    refused(error.value)


@pytest.mark.way("Generate", "`stop_strings`")
def test_stop_strings(talk):
    def spell(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Whatever the media, "a", "b", "c", ... follow the prompt."""
        step = ids.shape[1] - talk.one["input_ids"].shape[1]
        letter = talk.processor.tokenizer.convert_tokens_to_ids("abcdef"[step])
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([letter]), 0.0)

    tokenizer = talk.processor.tokenizer
    said = talk.say(logits_processor=[spell], stop_strings=["cd"], tokenizer=tokenizer)
    assert tokenizer.decode(said[0]) == "abcd"


@pytest.mark.way("Generate", "logits processors and `prefix_allowed_tokens_fn`")
def test_logits_processors(talk, greedy):
    def forbid(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([greedy[0][0]]), -torch.inf)

    with torch.no_grad():
        logits = talk.model(**talk.one).logits[0, -1]
    logits[[*talk.model.generation_config.suppress_tokens, greedy[0][0]]] = -torch.inf
    said = talk.say(logits_processor=LogitsProcessorList([forbid]))
    assert said[0][0] == logits.argmax().item() and greedy[0][0] not in said[0]
    assert talk.say(prefix_allowed_tokens_fn=lambda batch, ids: [65]) == [[65] * TOKENS]


@pytest.mark.way("Generate", "stopping criteria, `max_length`, `min_new_tokens`")
def test_lengths(talk, greedy):
    prompt = talk.one["input_ids"].shape[1]

    def three(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] == prompt + 3)

    assert talk.say(stopping_criteria=StoppingCriteriaList([three])) == [greedy[0][:3]]
    by_length = talk.say(max_new_tokens=None, max_length=prompt + 2)
    assert by_length == [greedy[0][:2]]
    stop = {"eos_token_id": greedy[0][0], "pad_token_id": 0}
    assert talk.say(**stop) == [greedy[0][:1]]
    assert len(talk.say(**stop, min_new_tokens=4)[0]) >= 4


@pytest.mark.way("Generate", "scores, logits and hidden states of every step")
def test_outputs_of_every_step(talk):
    asked = dict.fromkeys(("output_scores", "output_logits", "output_hidden_states"), True)
    output = talk.model.generate(
        **talk.one, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **asked
    )
    ids = output.sequences[:, :-1]
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | talk.media
    with torch.no_grad():
        logits = talk.model(**full).logits[:, -3:]
    torch.testing.assert_close(torch.stack(output.logits, 1), logits, rtol=0, atol=1e-4)
    suppressed = torch.stack(output.scores, 1)[..., talk.model.generation_config.suppress_tokens]
    assert (suppressed == -torch.inf).all()
    assert [states[-1].shape[1] for states in output.hidden_states] == [ids.shape[1] - 2, 1, 1]


@pytest.mark.way("Generate", "attentions of every step, with eager attention")
def test_attentions(case):
    model, processor = case.build()
    model.set_attn_implementation("eager")
    ids = processor.tokenizer("what is it?", return_tensors="pt").input_ids
    asked = {"output_attentions": True, "return_dict_in_generate": True}
    output = model.generate(ids, max_new_tokens=2, do_sample=False, **asked)
    shapes = [[tuple(layer.shape) for layer in step] for step in output.attentions]
    assert shapes == [[(1, 4, 11, 11)] * 2, [(1, 4, 1, 12)] * 2]
    torch.testing.assert_close(output.attentions[0][1].sum(-1), torch.ones(1, 4, 11))


@pytest.mark.way("Generate", "`guidance_scale`, against a prompt of text")
def test_guidance(talk):
    negative = talk.processor.tokenizer("what is it?", return_tensors="pt").input_ids
    with torch.no_grad():
        told = talk.model(**talk.one).logits[:, -1].log_softmax(-1)
        untold = talk.model(input_ids=negative).logits[:, -1].log_softmax(-1)
    guided = untold + 1.5 * (told - untold)
    guided[:, talk.model.generation_config.suppress_tokens] = -torch.inf
    said = talk.say(guidance_scale=1.5, negative_prompt_ids=negative)
    assert said[0][0] == guided.argmax().item()


@pytest.mark.way("Generate", "`guidance_scale`, against a prompt with placeholders")
def test_guidance_against_media(talk, refused):
    with pytest.raises(ValueError, match="got negative_prompt_ids with image or audio") as error:
        talk.say(guidance_scale=1.5, negative_prompt_ids=talk.one["input_ids"])
    refused(error.value)


@pytest.mark.way("Generate", "token healing")
def test_token_healing(talk, refused):
    with pytest.raises(ValueError, match="got token_healing") as error:
        talk.say(token_healing=True, tokenizer=talk.processor.tokenizer)
    refused(error.value)


@pytest.mark.way("Generate", "contrastive search, DoLa, beams by groups or with constraints")
def test_ways_that_transformers_gave_up(talk, refused):
    ways = ({"penalty_alpha": 0.5, "top_k": 4}, {"dola_layers": "low"})
    ways += ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},)
    ways += ({"num_beams": 4, "force_words_ids": [[5]]},)
    for options in ways:
        with pytest.raises(ValueError, match="requires `trust_remote_code=True` in your") as error:
            talk.say(**options)
    refused(error.value)


@pytest.mark.way("Generate", "continuous batching of text: `generate_batch`")
def test_continuous_batching(talk, greedy):
    ids = talk.processor.tokenizer("hello").input_ids
    settings = copy.deepcopy(talk.model.generation_config)
    settings.update(max_new_tokens=4, do_sample=False)
    [answer] = talk.model.generate_batch([ids], generation_config=settings).values()
    assert answer.generated_tokens == talk.say({"input_ids": torch.tensor([ids])})[0][:4]
    assert talk.say() == greedy  # and the model is as it was


@pytest.mark.way("Generate", "continuous batching with media")
def test_continuous_batching_of_media(talk, refused):
    with pytest.raises(ValueError, match="got cache_implementation='paged'"):
        talk.say(cache_implementation="paged")
    with pytest.raises(ValueError, match="continuous batching carries no media") as error:
        talk.model.generate_batch([talk.one["input_ids"][0].tolist()])
    refused(error.value)
