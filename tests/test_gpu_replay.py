"""benchmarks/gpu/replay.py: drafts of a chosen acceptance, and a target that writes a given text."""

from __future__ import annotations

import pytest
import torch

import simsd
from benchmarks.gpu import end_to_end
from benchmarks.gpu.replay import Replay, Script, scripted
from simsd.decode.iteration import Parts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair():
    return simsd.load("tiny-target"), simsd.load("tiny-draft")


PROMPT = "Tom has 23 apples. Tom buys 45 more. How many apples does Tom have now?"
RATES = (0.0, 0.15, 0.35, 0.7)


@pytest.mark.parametrize("verify", ["exact", "temporal"])
def test_replay_leaves_the_text_and_sets_the_acceptance(pair, verify):
    target, draft = pair
    settings = {"max_new_tokens": 48, "drafter": "model"}
    native = simsd.generate(target, PROMPT, None, simsd.GenerationConfig(verify="none", max_new_tokens=48))[0]
    script = Script.recorded(native, target.block_length, CPU)
    shares, forwards = [], []
    for rate in RATES:
        replay = Replay(script, rate, target.vocab_size, target.mask_token_id)
        config = simsd.GenerationConfig(verify=verify, **settings)
        result = decode(simsd.Decoder(target, PROMPT, draft, config, parts=replay.parts()))[0]
        assert result.tokens == native.tokens
        assert result.stats.draft_forwards > 0
        shares.append(result.stats.acceptance)
        forwards.append(result.stats.target_forwards)
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.95 and shares[-1] < 0.8
    assert forwards == sorted(forwards) and forwards[0] < native.stats.target_forwards / 2


def decode(decoder: simsd.Decoder) -> list[simsd.Result]:
    for _ in decoder:
        pass
    return decoder.results()


def test_replay_refuses_to_draw(pair):
    config = simsd.GenerationConfig(temperature=0.5, drafter="model", max_new_tokens=8)
    parts = Replay(Script.random(64, 4, 50, CPU), 0.1, 50, 49).parts()
    with pytest.raises(ValueError, match="a replay is greedy"):
        decode(simsd.Decoder(pair[0], PROMPT, pair[1], config, parts=parts))


def test_what_is_wrong_at_a_rate_is_wrong_at_larger_ones():
    script = Script.random(4000, 8, 299, CPU)
    wrong = [script.corrupted(rate, 299, 7) != script.tokens for rate in (0.0, 0.1, 0.3)]
    assert not wrong[0].any() and not (wrong[1] & ~wrong[2]).any()
    assert 0.08 < wrong[1].float().mean() < 0.12 and 0.27 < wrong[2].float().mean() < 0.33
    assert not (script.corrupted(1.0, 299, 7) == 7).any()


@pytest.mark.parametrize("batch", [1, 3])
def test_scripted_target_writes_the_script_in_its_order(pair, batch):
    target = pair[0]
    allowed = len(target.tokenizer.ids)
    script = Script.random(200, 4, allowed, CPU)
    script.tokens[script.tokens == target.mask_token_id] = 5
    prompts = [[5, 6, 7, 8], [9] * 8, [4] * 4][:batch]
    config = simsd.GenerationConfig(verify="none", max_new_tokens=16, end_token_ids=())
    results = decode(simsd.Decoder(target, prompts, None, config, parts=Parts(forward=scripted(script))))
    for prompt, result in zip(prompts, results, strict=True):
        span = slice(len(prompt), len(prompt) + 16)
        assert result.tokens == script.tokens[span].tolist()
        assert result.step_map == (script.rank[span] + 1).tolist()


def test_published_path_gives_the_same_text(pair):
    config = simsd.GenerationConfig(verify="none", max_new_tokens=24)
    prompts = [PROMPT, "What is the capital of France?"]
    expected = simsd.generate(pair[0], prompts, None, config)
    with end_to_end.DenseAttention():
        found = simsd.generate(pair[0], prompts, None, config)
    assert [result.tokens for result in found] == [result.tokens for result in expected]
