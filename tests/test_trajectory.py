"""A result tells enough to compute its trajectory's likelihood: every draw again, from plain forwards of the models.

The state of each draw is made of the tokens and revealed sets alone, the law of it by brute force in float64.
"""

from __future__ import annotations

import math

import pytest
import torch

import simsd
from replays import PROMPTS, STRATEGIES, replay_block, temporal_logits
from simsd import GenerationConfig, Result, SimsdError, Stats
from stand_ins import END, MASK, VOCABULARY, disturbed, random_sdar

LENGTH = 4
FILTERS = [
    {"temperature": 0.9},
    {"temperature": 0.9, "top_k": 6},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.1, "top_k": 12, "top_p": 0.9},
    {"temperature": 0.0, "top_k": 5, "top_p": 0.7},
]
by_filters = pytest.mark.parametrize("settings", FILTERS, ids=str)


@pytest.fixture(scope="module")
def draft():
    return disturbed(random_sdar(0, sharpness=1.5))


@pytest.fixture(scope="module")
def target():
    return random_sdar(0, sharpness=1.5)


def log_law(logits: torch.Tensor, config: GenerationConfig) -> list[float]:
    """The log-probability of each id of one row under what a token is drawn from, by the definition."""
    logits = logits.double()
    logits[MASK] = -math.inf
    x = logits / float(torch.tensor(config.temperature or 1.0))
    ids = sorted(range(VOCABULARY), key=lambda i: (-float(x[i]), i))
    if config.temperature == 0:
        return [0.0 if i == ids[0] else -math.inf for i in range(VOCABULARY)]
    if 0 < config.top_k < VOCABULARY:
        ids = [i for i in ids if x[i] >= x[ids[config.top_k - 1]]]
    if config.top_p < 1:
        reached = x[ids].softmax(0).cumsum(0)
        ids = ids[: int((reached < float(torch.tensor(config.top_p))).sum()) + 1]
    total = float(x[ids].logsumexp(0))
    return [float(x[i]) - total if i in ids else -math.inf for i in range(VOCABULARY)]


def recomputed(model, result: Result, config: GenerationConfig) -> list[float]:
    """The log-probability of every draw of a result, by one plain block-causal forward for each state."""
    prompt = len(result.prompt_tokens)
    text = [*result.prompt_tokens, *result.tokens, *result.cut_tokens]
    made = []
    for place, revealed in enumerate(result.revealed_sets(LENGTH), start=prompt):
        start = place // LENGTH * LENGTH
        block = [token if revealed >> i & 1 else MASK for i, token in enumerate(text[start : start + LENGTH])]
        block += [MASK] * (LENGTH - len(block))
        with torch.no_grad():
            logits = model.model(torch.tensor([text[:start] + block])).logits[0, place]
        made.append(log_law(logits, config)[text[place]])
    return made


def assert_trajectory(model, result: Result, config: GenerationConfig) -> None:
    told = [*result.draw_logprobs, *result.cut_draw_logprobs]
    expected = recomputed(model, result, config)
    assert len(result.draw_logprobs) == len(result.tokens) and len(told) == len(expected)
    assert told == pytest.approx(expected, abs=2e-4)
    assert sum(told) == pytest.approx(sum(expected), abs=1e-3)
    if config.temperature == 0:
        assert told == [0.0] * len(told)
    elif config.top_k == 0 and config.top_p == 1:
        assert result.draw_logprobs == pytest.approx(result.logprobs, abs=1e-5)
    else:
        assert all(a >= b - 1e-6 for a, b in zip(result.draw_logprobs, result.logprobs, strict=True))
        assert sum(result.draw_logprobs) > sum(result.logprobs) + 0.05


@by_filters
@pytest.mark.parametrize("prompt", PROMPTS[:3], ids=lambda prompt: f"prompt-of-{len(prompt)}")
@pytest.mark.parametrize(
    "drafter", [None, {"drafter": "self"}, {"drafter": "model"}, {"drafter": "auto"}], ids=["native", *"sma"]
)
def test_likelihood_of_a_text_follows_from_its_tokens_and_revealed_sets(target, draft, drafter, prompt, settings):
    config = GenerationConfig(max_new_tokens=13, seed=5, lookahead=2, end_token_ids=(), **settings, **(drafter or {}))
    if drafter is None:
        config = GenerationConfig(max_new_tokens=13, seed=5, verify="none", end_token_ids=(), **settings)
    result = simsd.generate(target, [prompt], None if drafter in (None, {"drafter": "self"}) else draft, config)[0]
    assert len(result.tokens) == 13 and (len(prompt) + 13 + len(result.cut_tokens)) % LENGTH == 0
    assert_trajectory(target, result, config)


@pytest.mark.parametrize("rule", STRATEGIES, ids=lambda rule: rule["strategy"])
def test_likelihood_holds_for_every_order_of_revealing(target, draft, rule):
    config = GenerationConfig(max_new_tokens=22, seed=2, temperature=1.0, top_k=8, end_token_ids=(), **rule)
    result = simsd.generate(target, [PROMPTS[0]], draft, config)[0]
    assert_trajectory(target, result, config)


def test_requests_of_one_batch_have_likelihoods_under_their_own_settings(target, draft):
    """Also those without filters, beside others that have some."""
    configs = [GenerationConfig(max_new_tokens=9, seed=7, end_token_ids=(), **settings) for settings in FILTERS]
    engine = simsd.Engine(target, draft, max_batch=5, max_length=64)
    for prompt, config in zip(PROMPTS, configs, strict=True):
        engine.add(prompt, config)
    results = {update.index: update.result for update in engine.stream() if update.result is not None}
    assert len(results) == 5
    for index, config in enumerate(configs):
        assert_trajectory(target, results[index], config)


@pytest.mark.parametrize("seed", range(4))
def test_what_lies_behind_an_end_token_is_told_as_far_as_the_text_was_drawn_under_it(target, seed):
    free = GenerationConfig(max_new_tokens=12, seed=seed, temperature=1.2, top_k=9, verify="none", end_token_ids=())
    whole = simsd.generate(target, [PROMPTS[0]], config=free)[0]
    decided = whole.tokens + whole.cut_tokens
    for at in range(12):
        end = whole.tokens[at]
        if end in whole.tokens[:at]:
            continue
        result = simsd.generate(target, [PROMPTS[0]], config=free, end_token_ids=[end])[0]
        assert result.tokens == whole.tokens[: at + 1] and result.finish_reason == "end"
        assert len(result.cut_tokens) == -(2 + at + 1) % LENGTH
        assert result.tokens + result.cut_tokens == decided[: at + 1 + len(result.cut_tokens)]
        assert_trajectory(target, result, free)


def temporal_draws(target, draft, result: Result, config: GenerationConfig) -> list[float]:
    """The log-probability of each token of a temporal result: its rounds again, by plain forwards of both models."""
    made, text = [], [*result.prompt_tokens, *result.tokens]
    fills = not config.rejected_tail.startswith("truncate")
    place = len(result.prompt_tokens)
    while place < len(text):
        start = place // LENGTH * LENGTH
        known = text[start:place]
        block, taken, under = replay_block(draft, text[:start], known, config, config.draft_steps)
        logits = temporal_logits(target, text[:start], known, block, taken)
        rejected = False
        for i in range(len(known), min(LENGTH, len(text) - start)):
            token, origin = text[start + i], result.origins[start + i - len(result.prompt_tokens)]
            # Beside drafted positions mrs takes the argmax.
            argmax = config.accept == "mrs" and config.temperature > 0 and origin in ("undrafted", "tail")
            if origin == "tail" and config.rejected_tail == "draft_argmax" and taken[i]:
                assert token == block[i]
                made.append(draft_law(draft, text[:start], block, under[i], i, config)[token])
            elif argmax:
                assert token == int(logits[i].argmax())
                made.append(0.0)
            else:
                made.append(log_law(logits[i], config)[token])
            place, rejected = place + 1, rejected or origin == "bonus"
            if rejected and not fills:
                break
    return made


def draft_law(draft, prefix, block, revealed, i, config) -> list[float]:
    state = [token if revealed >> n & 1 else MASK for n, token in enumerate(block)]
    with torch.no_grad():
        return log_law(draft.model(torch.tensor([prefix + state])).logits[0, len(prefix) + i], config)


@by_filters
@pytest.mark.parametrize("accept", ["match", "mrs"])
@pytest.mark.parametrize("draft_steps", [None, 2])
@pytest.mark.parametrize("tail", ["truncate", "target_argmax", "draft_argmax"])
def test_temporal_draws_are_of_what_the_rule_drew_from_in_the_end(target, draft, tail, draft_steps, accept, settings):
    config = GenerationConfig(
        verify="temporal", max_new_tokens=18, seed=9, accept=accept, draft_steps=draft_steps, rejected_tail=tail,
        end_token_ids=(), **settings,
    )  # fmt: skip
    result = simsd.generate(target, [PROMPTS[0]], draft, config)[0]
    expected = temporal_draws(target, draft, result, config)
    assert result.draw_logprobs == pytest.approx(expected, abs=2e-4)
    assert draft_steps is None or "undrafted" in result.origins
    early = [n for n, origin in enumerate(result.origins[:-1]) if origin == "bonus" and (n + 2) % LENGTH < 3]
    assert tail == "truncate" or all(result.origins[n + 1] == "tail" for n in early)


def test_a_token_in_a_gated_end_token_s_place_is_certain(target):
    ends = [i for i in range(VOCABULARY) if i != MASK][:60]
    config = GenerationConfig(
        verify="temporal", max_new_tokens=12, temperature=0.9, end_token_ids=ends, end_gate=1.0, seed=3
    )
    decoder = simsd.Decoder(target, [PROMPTS[3]], random_sdar(1), config)
    next(iter(decoder))
    result = decoder.result()
    assert result.origins == ["bonus"] and result.tokens[0] not in ends
    assert result.draw_logprobs == [0.0] and result.logprobs[0] < 0


def made(prompt: int, steps: list[int], cut: list[int] = (), origin: str = "denoised") -> Result:
    count, length = len(steps), len(cut)
    return Result(
        *([END] * count, None, steps, [1.0] * count, [origin] * count, "length", [1] * prompt, Stats()),
        cut_tokens=[2] * length, cut_step_map=list(cut), cut_draw_logprobs=[0.0] * length,
    )  # fmt: skip


def test_revealed_sets_hold_the_prompt_and_earlier_steps_of_the_block():
    assert made(2, [2, 1, 1, 2, 2, 3]).revealed_sets(4) == [0b1011, 0b0011, 0, 0b0001, 0b0001, 0b0111]
    assert made(2, [2, 1, 3], cut=[1, 2, 4]).revealed_sets(4) == [0b1011, 0b0011, 0b0110, 0, 0b0010, 0b0111]
    assert made(0, [1, 1, 1]).revealed_sets(1) == [0, 0, 0]
    assert made(63, [1]).revealed_sets(64) == [2**63 - 1]
    assert made(5, []).revealed_sets(4) == []


@pytest.mark.parametrize("length", [0, -4, 65, 4.0, True, None, "4"])
def test_revealed_sets_need_a_block_length_that_can_be(length):
    with pytest.raises(SimsdError, match=r"block_length must be an integer in \[1, 64\], got"):
        made(2, [1]).revealed_sets(length)


@pytest.mark.parametrize("origin", ["bonus", "undrafted", "tail"])
def test_revealed_sets_of_a_temporal_result_are_refused(origin):
    with pytest.raises(SimsdError, match=f"a token that came as '{origin}' was not drawn under a set"):
        made(2, [1], origin=origin).revealed_sets(4)
