"""Native and exact decoding against slow replays, in batches, and how sequences begin and end."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import simsd
from replays import PROMPTS, STRATEGIES, replay_native
from simsd import GenerationConfig, SimsdError
from simsd.decode.exchange import Report
from simsd.decode.iteration import Parts, run_plan
from simsd.decode.slots import Slots
from simsd.engine.request import Request
from simsd.engine.runner import Runner
from stand_ins import MASK, VOCABULARY, disturbed, random_sdar

DRAFTERS = ["none", "self", "model", "auto"]


@pytest.fixture(scope="module")
def target():
    return random_sdar(0)


@pytest.fixture(scope="module")
def draft():
    return random_sdar(1)


@pytest.fixture(scope="module")
def close_draft():
    return disturbed(random_sdar(0))


def settings_for(drafter: str, **changes) -> GenerationConfig:
    mode = {"verify": "none"} if drafter == "none" else {"drafter": drafter}
    return GenerationConfig(**{"max_new_tokens": 11} | mode | changes)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", STRATEGIES, ids=lambda s: s["strategy"])
def test_the_text_equals_a_replay_without_cache(target, close_draft, drafter, steps, rule):
    config = settings_for(drafter, steps=steps, **rule)
    results = simsd.generate(target, PROMPTS, close_draft, config, max_batch=3)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert (result.tokens, result.step_map) == replay_native(target, prompt, config)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rule", STRATEGIES, ids=lambda s: s["strategy"])
@pytest.mark.parametrize("sampling", [{"top_k": 5}, {"top_p": 0.7}, {}], ids=["top_k", "top_p", "plain"])
def test_sampled_text_equals_a_replay_without_cache(target, close_draft, drafter, rule, sampling):
    config = settings_for(drafter, max_new_tokens=13, temperature=0.9, seed=17, **rule, **sampling)
    result = simsd.generate(target, [PROMPTS[2]], close_draft, config)[0]
    assert (result.tokens, result.step_map) == replay_native(target, PROMPTS[2], config)


@pytest.mark.parametrize("drafter", ["self", "model", "auto"])
def test_drafts_are_accepted_and_save_forwards(target, close_draft, drafter):
    config = settings_for(drafter, max_new_tokens=40, end_token_ids=())
    native = simsd.generate(target, PROMPTS, config=settings_for("none", max_new_tokens=40, end_token_ids=()))
    exact = simsd.generate(target, PROMPTS, close_draft, config)
    assert [r.tokens for r in exact] == [r.tokens for r in native]
    assert [r.probs for r in exact] == [r.probs for r in native]
    forwards = [sum(r.stats.target_forwards for r in results) for results in (exact, native)]
    if drafter == "auto":  # by measured times it may find that a draft does not pay for such a small model
        assert forwards[0] <= forwards[1]
        return
    assert forwards[0] < 0.9 * forwards[1]
    assert sum(r.stats.accepted for r in exact) > 0
    assert {"denoised", "drafted"} == {origin for r in exact for origin in r.origins}


def test_a_draft_that_is_the_target_takes_all_steps_of_its_lookahead_at_once(target):
    changes = {"draft_steps": 4, "lookahead": 3, "max_rows": 200, "order_sharpness": 1e3}
    config = settings_for("model", max_new_tokens=24, end_token_ids=(), **changes)
    result = simsd.generate(target, [PROMPTS[3]], random_sdar(0), config)[0]
    assert result.stats.acceptance == 1.0
    assert result.stats.target_forwards == 2  # six blocks


def test_a_useless_draft_is_given_up(target, draft):
    config = settings_for("auto", max_new_tokens=400, end_token_ids=())
    result = simsd.generate(target, [PROMPTS[0]], draft, config)[0]
    assert result.stats.draft_forwards < 0.2 * result.stats.target_forwards


def test_rows_are_budgeted_over_the_batch(target, close_draft):
    seen = []

    def counting(*call):
        runner, plan, *_ = call
        current = 4 * int((plan.block[:, 0] >= 0).sum())
        drafted = int(plan.draft_blocks_in_rows.sum()) * 4
        seen.append(int((plan.slots >= runner.scratch).sum()) + drafted - current)
        return run_plan(*call)

    config = settings_for("model", max_new_tokens=20, max_rows=24)
    for _ in simsd.Decoder(target, PROMPTS, close_draft, config, parts=Parts(forward=counting)):
        pass
    assert max(seen) <= 24 and max(seen) > 8


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_prompt_s_text_does_not_depend_on_its_batch(target, close_draft, drafter, size):
    config = settings_for(drafter, max_new_tokens=13, temperature=0.7, seed=[1, 2, 3, 4, 5])
    together = simsd.generate(target, PROMPTS, close_draft, config, max_batch=size)
    for prompt, seed, result in zip(PROMPTS, config.seed, together, strict=True):
        alone_config = settings_for("none", max_new_tokens=13, temperature=0.7, seed=seed)
        alone = simsd.generate(target, [prompt], config=alone_config)[0]
        assert (result.tokens, result.step_map, result.probs) == (alone.tokens, alone.step_map, alone.probs)


@pytest.mark.parametrize("verify", ["none", "exact", "temporal"])
def test_a_device_that_runs_every_row_gives_the_same_text(target, close_draft, verify):
    config = GenerationConfig(verify=verify, max_new_tokens=13, temperature=0.7, max_rows=40, max_batch=3)
    packed = simsd.generate(target, PROMPTS, close_draft, config)
    whole = simsd.Decoder(target, PROMPTS, close_draft, config, parts=Parts(packed=False), prefill_rows=64)
    for _ in whole:
        pass
    assert [r.tokens for r in whole.results()] == [r.tokens for r in packed]
    assert [r.probs for r in whole.results()] == [r.probs for r in packed]


def test_updates_bring_each_token_once_and_each_result_as_it_is_done(target, close_draft):
    config = settings_for("model", max_new_tokens=14, end_token_ids=())
    whole = simsd.generate(target, PROMPTS, close_draft, config)
    texts, done = [[] for _ in PROMPTS], []
    for update in simsd.stream(target, PROMPTS, close_draft, config, max_batch=2):
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


def test_a_cancelled_sequence_leaves_the_others_alone(target, close_draft):
    config = settings_for("model", max_new_tokens=20, end_token_ids=())
    whole = simsd.generate(target, PROMPTS, close_draft, config)
    decoder = simsd.Decoder(target, PROMPTS, close_draft, config, max_batch=3)
    done = []
    for n, update in enumerate(decoder):
        if n == 2:
            decoder.cancel(1)  # running
            decoder.cancel(4)  # waiting
        if update.result is not None:
            done.append(update.index)
    assert sorted(done) == list(range(len(PROMPTS)))  # each reports its end, once
    results = decoder.results()
    assert [results[i].finish_reason for i in (1, 4)] == ["cancelled"] * 2
    assert results[1].tokens == whole[1].tokens[: len(results[1].tokens)] and len(results[1].tokens) < 20
    assert results[4].tokens == []
    for i in (0, 2, 3):
        assert results[i].tokens == whole[i].tokens


def test_a_sequence_whose_logits_are_not_finite_fails_alone(close_draft):
    target = random_sdar(0)
    poison = 50
    config = settings_for("model", max_new_tokens=12, end_token_ids=())
    whole = simsd.generate(target, PROMPTS, close_draft, config)
    with torch.no_grad():
        target.model.model.embed_tokens.weight[poison] = math.nan
    assert not any(poison in prompt + r.tokens for prompt, r in zip(PROMPTS, whole, strict=True))
    results = simsd.generate(target, [*PROMPTS[:2], [1, poison, 2], *PROMPTS[2:]], close_draft, config)
    failed = results.pop(2)
    assert failed.finish_reason == "failed"
    assert [r.tokens for r in results] == [r.tokens for r in whole]


def test_interrupting_keeps_what_was_committed_and_can_go_on(target, close_draft):
    config = settings_for("self", max_new_tokens=40, end_token_ids=())
    decoder = simsd.Decoder(target, PROMPTS[:3], close_draft, config)
    for _ in itertools.islice(decoder, 20):
        pass
    results = decoder.results()
    whole = simsd.generate(target, PROMPTS[:3], close_draft, config)
    for result, full in zip(results, whole, strict=True):
        assert result.finish_reason == "interrupted"
        assert 0 < len(result.tokens) < 40 and full.tokens[: len(result.tokens)] == result.tokens
    for _ in decoder:
        pass
    assert [r.tokens for r in decoder.results()] == [r.tokens for r in whole]


def test_an_error_in_the_middle_leaves_a_decoder_that_goes_on(target, close_draft):
    config = settings_for("model", max_new_tokens=24, end_token_ids=())
    whole = simsd.generate(target, PROMPTS, close_draft, config)
    calls = itertools.count()

    def failing(*call):
        if next(calls) in (3, 7, 8):
            raise KeyboardInterrupt
        return run_plan(*call)

    decoder = simsd.Decoder(target, PROMPTS, close_draft, config, max_batch=2, parts=Parts(forward=failing))
    for _ in range(4):
        try:
            for _ in decoder:
                pass
        except KeyboardInterrupt:
            continue
    assert [r.tokens for r in decoder.results()] == [r.tokens for r in whole]


@pytest.mark.parametrize(
    "place",
    [
        (Slots, "open"),
        (Report, "read"),
        (Runner, "run"),
        (Request, "commit"),
        (Request, "take"),
    ],
    ids=lambda place: place[1],
)
def test_an_interrupt_between_decision_and_commit_loses_and_doubles_nothing(target, close_draft, monkeypatch, place):
    config = settings_for("model", max_new_tokens=24, end_token_ids=())
    whole = simsd.generate(target, PROMPTS, close_draft, config)
    decoder = simsd.Decoder(target, PROMPTS, close_draft, config, max_batch=2)
    original, calls = getattr(*place), itertools.count()

    def interrupted(*arguments, **named):
        result = original(*arguments, **named)
        if next(calls) % 7 == 6:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(*place, interrupted)
    for _ in range(100):
        try:
            for _ in decoder:
                pass
            break
        except KeyboardInterrupt:
            continue
    assert [r.tokens for r in decoder.results()] == [r.tokens for r in whole]
    assert [r.step_map for r in decoder.results()] == [r.step_map for r in whole]


@pytest.mark.parametrize("size", [0, -1, True, 2.0])
def test_a_bad_batch_size_is_refused(target, size):
    with pytest.raises(SimsdError, match="max_batch must be an integer >= 1"):
        simsd.generate(target, [[1]], max_batch=size)


def test_no_prompts_give_no_results(target):
    assert simsd.generate(target, []) == []


def test_the_model_drafter_needs_a_model(target):
    with pytest.raises(SimsdError, match="drafter='model' needs a draft model"):
        simsd.generate(target, [[1]], config=settings_for("model"))


def test_verify_none_ignores_the_draft(target, draft):
    config = GenerationConfig(max_new_tokens=8, verify="none")
    plain = simsd.generate(target, [[1, 2, 3]], config=GenerationConfig(max_new_tokens=8))[0]
    result = simsd.generate(target, [[1, 2, 3]], draft, config)[0]
    assert result.tokens == plain.tokens and result.stats.draft_forwards == 0


def test_an_empty_prompt_generates_from_nothing(target, close_draft):
    for model in (None, close_draft):
        result = simsd.generate(target, [[]], model, GenerationConfig(max_new_tokens=6))[0]
        assert len(result.tokens) == 6 and result.prompt_tokens == []


def test_a_seed_list_gives_each_prompt_its_own_noise(target):
    config = GenerationConfig(max_new_tokens=12, temperature=1.0, seed=[3, 4])
    first, second = simsd.generate(target, [PROMPTS[2], PROMPTS[2]], config=config)
    alone = simsd.generate(target, [PROMPTS[2]], config=GenerationConfig(max_new_tokens=12, temperature=1.0, seed=4))[0]
    assert first.tokens != second.tokens and second.tokens == alone.tokens


def end_after(model, prompt, config) -> tuple[int, int]:
    """A token that the model emits in the middle of a block, and where."""
    tokens = simsd.generate(model, [prompt], config=config)[0].tokens
    return next((token, i) for i, token in enumerate(tokens) if i % 4 == 1 and token not in tokens[:i])


def test_text_ends_with_the_first_end_token_included(target):
    config = GenerationConfig(max_new_tokens=16)
    token, at = end_after(target, PROMPTS[3], config)
    full = simsd.generate(target, [PROMPTS[3]], config=config)[0].tokens
    ended = simsd.generate(target, [PROMPTS[3]], config=GenerationConfig(max_new_tokens=16, end_token_ids=[token]))[0]
    assert ended.tokens == full[: at + 1] and ended.finish_reason == "end"
    assert len(ended.step_map) == len(ended.probs) == len(ended.origins) == at + 1


def test_an_end_token_in_the_prompt_does_not_end_the_text(target):
    config = GenerationConfig(max_new_tokens=3, end_token_ids=[5])
    result = simsd.generate(target, [[1, 5]], config=config)[0]
    assert len(result.tokens) == 3 or result.tokens[-1] == 5


def test_max_new_tokens_cuts_inside_a_block_and_may_be_zero(target, close_draft):
    full = simsd.generate(target, [PROMPTS[1]], close_draft, GenerationConfig(max_new_tokens=12))[0].tokens
    for count in (0, 1, 5):
        result = simsd.generate(target, [PROMPTS[1]], close_draft, GenerationConfig(max_new_tokens=count))[0]
        assert result.tokens == full[:count] and result.finish_reason == "length"


def test_probabilities_are_the_targets(target):
    result = simsd.generate(target, [PROMPTS[3]], config=GenerationConfig(max_new_tokens=4, steps=1))[0]
    with torch.no_grad():
        logits = target.model(torch.tensor([PROMPTS[3] + [MASK] * 4])).logits[0, 4:]
    logits[:, MASK] = -math.inf
    expected = logits.softmax(-1).max(-1).values
    torch.testing.assert_close(torch.tensor(result.probs), expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_longer_than_one_prefill_chunk(target, close_draft):
    prompt = [i % 50 + 1 for i in range(50)]
    whole = simsd.generate(target, [prompt], close_draft, GenerationConfig(max_new_tokens=8))[0]
    config = GenerationConfig(max_new_tokens=8, block_length=4, prefill_rows=16)
    chunked = simsd.generate(target, [prompt], close_draft, config)[0]
    assert chunked.tokens == whole.tokens and chunked.probs == whole.probs
    assert chunked.stats.target_prefill_forwards == 2  # 16 + 16; the other 16 rode along
    assert whole.stats.target_prefill_forwards == 0


BAD_REQUESTS = [
    (dict(prompts=[[1, MASK]]), "mask token"),
    (dict(prompts=[[1, VOCABULARY]]), str(VOCABULARY)),
    (dict(prompts="text"), "no tokenizer"),
    (dict(prompts=3), "int"),
    (dict(prompts=[[1] * 500], config=GenerationConfig(max_new_tokens=20)), "512 positions"),
    (dict(prompts=[[1]], config=GenerationConfig(steps=5)), "at most the block length 4, got 5"),
    (dict(prompts=[[1]], config=GenerationConfig(seed=[1, 2])), "2 seeds for 1 prompts"),
]


@pytest.mark.parametrize("request_, message", BAD_REQUESTS, ids=[message for _, message in BAD_REQUESTS])
def test_a_bad_request_is_refused_before_anything_is_decoded(target, request_, message):
    with pytest.raises(SimsdError, match=message):
        simsd.generate(target, **request_)


def test_models_that_do_not_fit_together_are_refused(target):
    with pytest.raises(SimsdError, match="block length 4.* 8"):
        simsd.generate(target, [[1]], random_sdar(1, block_length=8))
    with pytest.raises(SimsdError, match="vocab size 80 against 64"):
        simsd.generate(target, [[1]], random_sdar(1, vocab_size=80))


def test_an_explicit_block_length_overrides_both_models(target):
    config = GenerationConfig(max_new_tokens=16, block_length=8, end_token_ids=())
    result = simsd.generate(target, [[1]], random_sdar(0, block_length=16), config)[0]
    assert len(result.tokens) == 16 and max(result.step_map) > 4
