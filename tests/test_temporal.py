"""SimSD as published against a slow replay of it, and what its settings do."""

from __future__ import annotations

import math

import pytest
import torch

import simsd
from replays import PROMPTS, STRATEGIES, replay_simsd
from simsd import GenerationConfig
from simsd.decode.iteration import Parts, run_plan
from stand_ins import MASK, VOCABULARY, disturbed, random_sdar


def settings_for(**changes) -> GenerationConfig:
    return GenerationConfig(verify="temporal", **changes)


@pytest.fixture(scope="module")
def draft():
    return random_sdar(1)


@pytest.fixture(scope="module")
def close_draft():
    return disturbed(random_sdar(0))


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: f"prompt-of-{len(p)}")
@pytest.mark.parametrize("draft_steps", [None, 2])
@pytest.mark.parametrize(
    "settings",
    [*STRATEGIES, {"temperature": 0.8, "seed": 5}, {"temperature": 0.8, "top_k": 5, "top_p": 0.8}],
    ids=lambda s: s.get("strategy", "sampled"),
)
def test_simsd_equals_a_replay_without_cache(target, close_draft, prompt, draft_steps, settings):
    config = settings_for(max_new_tokens=14, draft_steps=draft_steps, **settings)
    result = simsd.generate(target, [prompt], close_draft, config)[0]
    tokens, origins, rounds = replay_simsd(target, close_draft, prompt, config)
    assert (result.tokens, result.origins) == (tokens, origins)
    assert result.stats.target_forwards == rounds  # commits ride along: no forward of their own


# Without a prompt the masks of the first block are as sure as each other, so that only one order is fixed.
@pytest.mark.parametrize("packed", [None, False], ids=["packed", "static shapes"])
@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ([], {"strategy": "sequential"}),
        ([5], {"temperature": 0.8, "seed": 5}),
        ([9, 8, 7, 6], {}),
        (list(range(1, 20)), {"draft_steps": 2}),
        (list(range(1, 20)), {"strategy": "sequential", "temperature": 0.8}),
    ],
    ids=["no prompt", "one token", "a block", "half drafted", "sequential"],
)
@pytest.mark.parametrize("shifts", [(True, True), (True, False), (False, True)], ids=["both", "target", "draft"])
def test_models_whose_row_predicts_the_next_position_equal_a_replay(shifts, prompt, settings, packed):
    target, draft = random_sdar(0, shift=shifts[0]), disturbed(random_sdar(0, shift=shifts[1]))
    config = settings_for(max_new_tokens=14, **settings)
    result = simsd.generate(target, [prompt], draft, config, parts=Parts(packed=packed))[0]
    tokens, origins, rounds = replay_simsd(target, draft, prompt, config)
    assert (result.tokens, result.origins, result.stats.target_forwards) == (tokens, origins, rounds)


def test_a_fully_accepted_draft_costs_one_target_forward_per_block(target):
    # One revealed token per block leaves nothing for the temporal mask to approximate.
    tiny = random_sdar(0, block_length=1)
    config = settings_for(max_new_tokens=9, end_token_ids=())
    result = simsd.generate(tiny, [[1, 2, 3]], tiny, config)[0]
    assert result.stats.acceptance == 1.0
    assert result.stats.target_forwards == result.stats.draft_forwards == 9
    assert result.tokens == simsd.generate(tiny, [[1, 2, 3]], config=config)[0].tokens


@pytest.mark.parametrize("tail", ["target_argmax", "target_argmax_all", "draft_argmax"])
@pytest.mark.parametrize("accept", ["match", "mrs"])
def test_tail_policies_that_fill_a_block_take_one_verification_per_block(target, draft, tail, accept):
    config = settings_for(max_new_tokens=16, rejected_tail=tail, accept=accept, end_token_ids=())
    result = simsd.generate(target, [PROMPTS[3]], draft, config)[0]
    assert result.stats.target_forwards == 4 and len(result.tokens) == 16
    assert "tail" in result.origins


@pytest.mark.parametrize("accept", ["match", "mrs"])
def test_what_is_emitted_is_what_later_blocks_see(target, draft, accept):
    """The release's tail policies emit one text and commit another; here a block follows from the emitted one."""
    for tail in ("target_argmax", "draft_argmax"):
        config = settings_for(max_new_tokens=8, rejected_tail=tail, accept=accept)
        whole = simsd.generate(target, [PROMPTS[3]], draft, config)[0].tokens
        rest = simsd.generate(target, [PROMPTS[3] + whole[:4]], draft, config)[0].tokens
        assert rest[:4] == whole[4:]


def test_truncate_no_bonus_keeps_a_bonus_only_where_it_is_the_only_token(target, close_draft):
    config = settings_for(max_new_tokens=40, rejected_tail="truncate_no_bonus")
    decoder = simsd.Decoder(target, [PROMPTS[4]], close_draft, config)
    start = 0
    for update in decoder:
        end = start + len(update.tokens)
        origins = decoder.result().origins[start:end]
        assert origins == ["bonus"] or "bonus" not in origins
        start = end
    assert {"bonus", "drafted"} <= set(decoder.result().origins)


def test_mrs_with_sampling_is_reproducible_and_seeded(target, close_draft):
    def run(seed):
        config = settings_for(max_new_tokens=24, temperature=1.0, accept="mrs", seed=seed)
        return simsd.generate(target, [PROMPTS[2]], close_draft, config)[0].tokens

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_an_end_token_that_arrives_as_an_unlikely_bonus_is_gated(target, close_draft):
    free = simsd.generate(target, [PROMPTS[4]], close_draft, settings_for(max_new_tokens=40))[0]
    at = free.origins.index("bonus")
    end = free.tokens[at]
    assert end not in free.tokens[:at]
    plain = settings_for(max_new_tokens=40, end_token_ids=[end])
    assert simsd.generate(target, [PROMPTS[4]], close_draft, plain)[0].finish_reason == "end"
    gated = settings_for(max_new_tokens=40, end_token_ids=[end], end_gate=1.0)
    result = simsd.generate(target, [PROMPTS[4]], close_draft, gated)[0]
    assert result.tokens[:at] == free.tokens[:at]
    assert len(result.tokens) > at  # it went on, with progress


@pytest.mark.parametrize("tail", ["truncate", "truncate_no_bonus", "target_argmax", "draft_argmax"])
def test_a_gated_end_token_still_makes_progress(target, draft, tail):
    everything = [i for i in range(VOCABULARY) if i != MASK][:60]  # nearly every bonus is an "end" and gated away
    config = settings_for(max_new_tokens=12, end_token_ids=everything, end_gate=1.0, rejected_tail=tail)
    result = simsd.generate(target, [PROMPTS[3]], draft, config)[0]
    assert result.tokens


@pytest.mark.parametrize("tail", ["target_argmax_all", "draft_argmax"])
def test_a_tail_token_carries_its_own_probability(target, draft, tail):
    config = settings_for(max_new_tokens=4, rejected_tail=tail, accept="mrs", temperature=0.9, end_token_ids=())
    seen = []
    watch = Parts(forward=lambda *call: seen.append(run_plan(*call)) or seen[-1])
    decoder = simsd.Decoder(target, [PROMPTS[3]], draft, config, parts=watch)
    list(decoder)
    logits = seen[-1] / 0.9
    logits[:, MASK] = -math.inf
    result = decoder.result()
    expected = logits.softmax(-1)[torch.arange(4), result.tokens]
    assert "tail" in result.origins
    torch.testing.assert_close(torch.tensor(result.probs), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_token_in_a_gated_end_token_s_place_carries_its_probability_among_all_ids(target, draft, temperature):
    """End tokens, which it was chosen without, and the temperature count in it as they do elsewhere."""
    ends = [i for i in range(VOCABULARY) if i != MASK][:60]
    config = settings_for(temperature=temperature, end_token_ids=ends, end_gate=1.0)
    seen = []
    watch = Parts(forward=lambda *call: seen.append(run_plan(*call)) or seen[-1])
    decoder = simsd.Decoder(target, [PROMPTS[3]], draft, config, parts=watch)
    next(iter(decoder))
    result = decoder.result()
    assert result.origins == ["bonus"] and result.tokens[0] not in ends
    logits = seen[-1][0] / (temperature or 1.0)
    logits[MASK] = -math.inf
    expected = logits.softmax(-1)[result.tokens[0]].item()
    assert result.probs == pytest.approx([expected], rel=1e-4) and expected < 0.2
    assert result.logprobs == pytest.approx([math.log(expected)], rel=1e-4)


def test_a_tail_token_of_vanishing_probability_has_a_logarithm_all_the_same(target, draft):
    config = settings_for(max_new_tokens=4, rejected_tail="draft_argmax", temperature=0.01, end_token_ids=())
    result = simsd.generate(target, [PROMPTS[3]], draft, config)[0]
    vanishing = [(p, log) for p, log in zip(result.probs, result.logprobs, strict=True) if p < 1e-30]
    assert vanishing and all(-math.inf < log < -69 for _, log in vanishing)


@pytest.mark.parametrize("changes", [{}, {"accept": "mrs", "temperature": 0.9}, {"draft_steps": 2}], ids=str)
def test_a_prompt_s_text_does_not_depend_on_its_batch(target, close_draft, changes):
    config = settings_for(max_new_tokens=14, end_token_ids=(), **changes)
    alone = [simsd.generate(target, [prompt], close_draft, config)[0] for prompt in PROMPTS]
    for size in (2, 5):
        together = simsd.generate(target, PROMPTS, close_draft, config, max_batch=size)
        assert [r.tokens for r in together] == [r.tokens for r in alone]
        assert [r.origins for r in together] == [r.origins for r in alone]


def test_without_a_draft_it_decodes_natively(target):
    plain = simsd.generate(target, [PROMPTS[3]], config=GenerationConfig(max_new_tokens=9, verify="none"))[0]
    result = simsd.generate(target, [PROMPTS[3]], config=settings_for(max_new_tokens=9))[0]
    assert (result.tokens, result.origins) == (plain.tokens, ["denoised"] * 9)
