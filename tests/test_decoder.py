"""`generate`, `stream` and `Decoder` as people call them: settings by name, models by name, samples, deltas of text."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

import byte_pair
import simsd
from replays import PROMPTS
from simsd import GenerationConfig, SimsdError
from simsd.decode.iteration import Parts, run_plan
from simsd.seeds import sample_seed
from small_tokenizers import for_stand_ins
from stand_ins import MASK, disturbed, random_sdar

MODES = {
    "native": {"verify": "none"},
    "model": {"drafter": "model"},
    "self": {"drafter": "self"},
    "temporal": {"verify": "temporal"},
    "mrs": {"verify": "temporal", "accept": "mrs", "rejected_tail": "draft_argmax"},
}


@pytest.fixture(scope="module")
def target():
    return simsd.load(random_sdar(0).model, tokenizer=for_stand_ins())


def test_settings_by_name_are_those_of_a_config(target, draft):
    config = GenerationConfig(max_new_tokens=8, temperature=0.7, seed=3, drafter="model")
    expected = [r.tokens for r in simsd.generate(target, PROMPTS, draft, config)]
    other = dataclasses.replace(config, max_new_tokens=5, seed=9)
    named = {"max_new_tokens": 8, "seed": 3}
    for settings in (dataclasses.asdict(config), {"config": dataclasses.asdict(config)}, {"config": other} | named):
        assert [r.tokens for r in simsd.generate(target, PROMPTS, draft, **settings)] == expected
        updates = simsd.stream(target, PROMPTS, draft, **settings)
        done = {update.index: update.result.tokens for update in updates if update.result}
        assert [done[i] for i in range(len(PROMPTS))] == expected
        decoder = simsd.Decoder(target, PROMPTS, draft, **settings)
        list(decoder)
        assert [r.tokens for r in decoder.results()] == expected


@pytest.mark.parametrize("call", [simsd.generate, simsd.stream, simsd.Decoder])
def test_an_unknown_setting_is_refused_at_once(target, call):
    with pytest.raises(SimsdError, match="unknown setting 'max_tokens': did you mean max_new_tokens"):
        call(target, PROMPTS, max_tokens=8)
    with pytest.raises(SimsdError, match="unknown setting 'max_batch_size': did you mean max_batch"):
        call(target, PROMPTS, max_batch_size=8)


def test_models_may_be_given_by_folder_and_by_name(tmp_path):
    folders = [byte_pair.write_model(tmp_path / name, seed) for name, seed in (("target", 0), ("draft", 1))]
    loaded = [simsd.load(folder) for folder in folders]
    settings = {"max_new_tokens": 6, "drafter": "model"}
    [expected] = simsd.generate(loaded[0], [64, 65, 66], loaded[1], **settings)
    for form in (str, Path, lambda folder: simsd.load(folder).model):
        [result] = simsd.generate(form(folders[0]), [64, 65, 66], form(folders[1]), **settings)
        assert result.tokens == expected.tokens and result.stats.draft_forwards > 0
        assert result.text in (expected.text, None)  # a module in memory comes without a tokenizer
    [text] = simsd.generate(folders[0], "abc", str(folders[1]), **settings)
    assert text.text == expected.text and text.prompt_tokens == [64, 65, 66]
    [built_in] = simsd.generate("tiny-target", "What is the capital of France?", "tiny-draft", max_new_tokens=12)
    assert "Paris" in built_in.text


def test_a_draft_without_use_is_not_loaded_and_nonsense_is_refused(target):
    for settings in ({"verify": "none"}, {"drafter": "self"}):
        assert simsd.generate(target, [[1]], "no/such-draft", max_new_tokens=2, **settings)
    for models in ((target, Path("no-such-folder")), ("no-such-folder",), (3,), (None,), (target, 3)):
        with pytest.raises(SimsdError):
            simsd.generate(models[0], [[1]], *models[1:], max_new_tokens=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [[], ["word57", " ba"]], ids=["whole", "stop"])
def test_deltas_of_text_are_together_the_result_s_text(target, draft, mode, stop):
    """Random models write broken characters, too; none is cut that is whole in the text."""
    settings = {"max_new_tokens": 30, "temperature": 0.8, "stop": stop} | MODES[mode]
    deltas, results = [""] * 10, {}
    for update in simsd.stream(target, PROMPTS, draft, max_batch=3, seed=3, n=2, **settings):
        assert update.index not in results
        deltas[update.index] += update.text
        if update.result is not None:
            results[update.index] = update.result
        else:
            assert not update.text.endswith("\ufffd")
    assert deltas == [results[i].text for i in range(10)]
    for result in results.values():
        if result.finish_reason != "stop":
            assert result.text == target.tokenizer.decode(result.tokens)
    assert any(result.text.strip("\ufffd").isascii() is False for result in results.values())


def test_deltas_go_on_after_an_interrupt_and_end_with_a_cancelled_text(target, draft):
    calls = itertools.count()

    def failing(*call):
        if next(calls) in (3, 7):
            raise KeyboardInterrupt
        return run_plan(*call)

    config = simsd.GenerationConfig(max_new_tokens=40, drafter="self", end_token_ids=())
    decoder = simsd.Decoder(target, PROMPTS[2:4], draft, config, parts=Parts(forward=failing))
    deltas, tokens = ["", ""], [[], []]
    for _ in range(3):
        try:
            for update in decoder:
                deltas[update.index] += update.text
                tokens[update.index] += update.tokens
                if len(tokens[1]) > 20:
                    decoder.cancel(1)
        except KeyboardInterrupt:
            assert decoder.result(0).finish_reason == "interrupted"
            assert decoder.result(0).text == target.tokenizer.decode(decoder.result(0).tokens)
    results = decoder.results()
    assert [r.finish_reason for r in results] == ["length", "cancelled"]
    assert [r.text for r in results] == deltas and [r.tokens for r in results] == tokens


def test_without_a_tokenizer_there_is_no_text(draft):
    updates = list(simsd.stream(draft, [[5]], max_new_tokens=6))
    assert {update.text for update in updates} == {None} and updates[-1].result.text is None


def test_a_text_that_its_user_ends_is_the_text_of_what_is_left(target):
    decoder = simsd.Decoder(target, [PROMPTS[4]], max_new_tokens=20)
    updates = []
    for update in decoder:
        updates.append(update)
        if len(decoder.result().tokens) >= 8:
            decoder.stop(0, 3)
    result = decoder.result()
    assert (len(result.tokens), result.finish_reason) == (3, "stop") and updates[-1].result == result
    assert result.text == target.tokenizer.decode(result.tokens)
    assert len(result.probs) == len(result.logprobs) == len(result.step_map) == 3


@pytest.mark.parametrize("mode", MODES)
def test_samples_come_prompt_by_prompt_and_each_from_its_own_seed(target, draft, mode):
    settings = {"max_new_tokens": 10, "temperature": 1.0} | MODES[mode]
    results = simsd.generate(target, PROMPTS[2:4], draft, seed=[7, 8], n=3, max_batch=4, **settings)
    assert [r.prompt_tokens for r in results] == [PROMPTS[2]] * 3 + [PROMPTS[3]] * 3
    assert [r.seed for r in results] == [sample_seed(seed, i) for seed in (7, 8) for i in range(3)]
    assert results[0].seed == 7 and len({tuple(r.tokens) for r in results[:3]}) > 1
    for result in results:
        [alone] = simsd.generate(target, [result.prompt_tokens], draft, seed=result.seed, **settings)
        assert (alone.tokens, alone.probs, alone.seed) == (result.tokens, result.probs, result.seed)


def test_samples_are_native_decoding_s_and_updates_count_them_prompt_by_prompt(target, draft):
    settings = {"max_new_tokens": 10, "temperature": 1.0, "n": 2, "seed": 4}
    native = simsd.generate(target, PROMPTS, verify="none", **settings)
    done = {u.index: u.result for u in simsd.stream(target, PROMPTS, draft, max_batch=3, **settings) if u.result}
    assert sorted(done) == list(range(10))
    assert [done[i].tokens for i in range(10)] == [result.tokens for result in native]


def test_without_a_seed_texts_differ_and_their_seeds_bring_them_back(target):
    settings = {"max_new_tokens": 12, "temperature": 1.0}
    torch.manual_seed(0)
    first = simsd.generate(target, [PROMPTS[2]] * 3, seed=None, **settings)
    torch.manual_seed(0)
    second = simsd.generate(target, [PROMPTS[2]] * 3, seed=None, **settings)
    assert len({tuple(r.tokens) for r in first + second}) > 3
    again = simsd.generate(target, [PROMPTS[2]] * 3, seed=[r.seed for r in first], **settings)
    assert [r.tokens for r in again] == [r.tokens for r in first]


@pytest.mark.parametrize("mode", MODES)
def test_limits_beyond_what_there_can_be_are_none(target, draft, mode):
    settings = {"max_new_tokens": 6, "temperature": 1.0} | MODES[mode]
    [plain] = simsd.generate(target, [PROMPTS[3]], draft, **settings)
    [result] = simsd.generate(target, [PROMPTS[3]], draft, top_k=2**40, max_rows=2**70, max_batch=2**70, **settings)
    assert result.tokens == plain.tokens
    with pytest.raises(SimsdError, match="exceed the 512 positions"):
        simsd.generate(target, [PROMPTS[3]], draft, **settings | {"max_new_tokens": 2**70})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 3.4e38])
def test_extreme_temperatures_give_the_texts_of_their_limits(target, draft, mode, temperature):
    """Next to 0 the text is the greedy one (the leftmost position goes first: no confidence has a say), far up every
    token is as likely as any other."""
    settings = {"max_new_tokens": 8, "strategy": "sequential", "end_token_ids": ()} | MODES[mode]
    if mode == "mrs":
        settings["rejected_tail"] = "truncate"  # tail tokens are of the draft's choice, not of the temperature's
    [result] = simsd.generate(target, [PROMPTS[3]], draft, temperature=temperature, **settings)
    if temperature < 1:
        [greedy] = simsd.generate(target, [PROMPTS[3]], draft, temperature=0.0, **settings)
        assert result.tokens == greedy.tokens
        assert result.probs == pytest.approx([1.0] * 8) and result.logprobs == pytest.approx([0.0] * 8)
    else:
        assert result.probs == pytest.approx([1 / 61] * 8) and len(set(result.tokens)) > 4
        assert result.logprobs == pytest.approx([-math.log(61)] * 8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7}, {"temperature": 1.6, "top_k": 3, "top_p": 0.6}], ids=["0", "0.7", "filters"]
)
def test_probabilities_are_of_the_tempered_logits_before_filters_in_every_mode(target, draft, mode, sampling):
    """One step per block: whoever judges, it is by the logits of the block that is masked throughout."""
    tail = {"rejected_tail": "draft_argmax"} if "verify" in MODES[mode] and mode != "native" else {}
    settings = {"max_new_tokens": 4, "steps": 1, "seed": 11, "end_token_ids": ()} | sampling | MODES[mode] | tail
    [result] = simsd.generate(target, [PROMPTS[3]], disturbed(random_sdar(0), 0.1), **settings)
    with torch.no_grad():
        logits = target.model(torch.tensor([PROMPTS[3] + [MASK] * 4])).logits[0, 4:]
    logits[:, target.banned_ids] = -math.inf
    logs = (logits / (sampling.get("temperature") or 1.0)).log_softmax(-1)[torch.arange(4), result.tokens]
    torch.testing.assert_close(torch.tensor(result.logprobs), logs, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.tensor(result.probs), logs.exp(), rtol=1e-3, atol=1e-6)
    assert [math.exp(log) for log in result.logprobs] == pytest.approx(result.probs, rel=1e-5)


def test_updates_bring_each_token_once_and_each_result_as_it_is_done(target, draft):
    config = GenerationConfig(drafter="model", max_new_tokens=14, end_token_ids=())
    whole = simsd.generate(target, PROMPTS, draft, config)
    texts, done = [[] for _ in PROMPTS], []
    for update in simsd.stream(target, PROMPTS, draft, config, max_batch=2):
        texts[update.index] += update.tokens
        shown = [t for t in update.provisional if t is not None]
        place = len(texts[update.index])
        coming = whole[update.index].tokens[place:]
        revealed = [t for t, p in zip(coming, update.provisional, strict=False) if p is not None]
        assert shown[: len(revealed)] == revealed  # what is revealed stays
        if update.result is not None:
            done.append(update.index)
            assert update.result.tokens == texts[update.index]
    assert texts == [r.tokens for r in whole]
    assert sorted(done) == list(range(len(PROMPTS)))


def test_interrupting_keeps_what_was_committed_and_can_go_on(target, draft):
    config = GenerationConfig(drafter="self", max_new_tokens=40, end_token_ids=())
    decoder = simsd.Decoder(target, PROMPTS[:3], draft, config)
    for _ in itertools.islice(decoder, 20):
        pass
    results = decoder.results()
    whole = simsd.generate(target, PROMPTS[:3], draft, config)
    for result, full in zip(results, whole, strict=True):
        assert result.finish_reason == "interrupted"
        assert 0 < len(result.tokens) < 40 and full.tokens[: len(result.tokens)] == result.tokens
    for _ in decoder:
        pass
    assert [r.tokens for r in decoder.results()] == [r.tokens for r in whole]


def test_the_model_drafter_needs_a_model(target):
    with pytest.raises(SimsdError, match="drafter='model' needs a draft model, got None"):
        simsd.generate(target, [[1]], drafter="model")


def test_verify_none_ignores_the_draft(target, draft):
    config = GenerationConfig(max_new_tokens=8, verify="none")
    plain = simsd.generate(target, [[1, 2, 3]], config=GenerationConfig(max_new_tokens=8))[0]
    result = simsd.generate(target, [[1, 2, 3]], draft, config)[0]
    assert result.tokens == plain.tokens and result.stats.draft_forwards == 0


def test_as_many_seeds_as_prompts_are_asked_for_before_anything_is_decoded(target):
    with pytest.raises(SimsdError, match="2 seeds for 1 prompts"):
        simsd.stream(target, [[1]], seed=[1, 2])
    with pytest.raises(SimsdError, match="3 seeds for 4 prompts"):
        simsd.Decoder(target, [[1]] * 2, n=2, seeds=[1, 2, 3])


def test_an_engine_is_as_long_as_its_longest_request_in_whole_blocks(target):
    decoder = simsd.Decoder(target, [[1, 2, 3], [1] * 9], max_new_tokens=4, n=2)
    assert (decoder.capacity, decoder.block_length, len(decoder)) == (16, 4, 4)
    assert simsd.Decoder(target, [], max_new_tokens=4).results() == []
