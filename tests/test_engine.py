"""Requests with settings of their own join, end and are cancelled in one engine: each text is what it is alone."""

from __future__ import annotations

import itertools
import random

import pytest

import simsd
from replays import PROMPTS, STRATEGIES
from simsd.decode.iteration import Parts, run_plan
from stand_ins import disturbed, random_sdar


@pytest.fixture(scope="module")
def target():
    return random_sdar(0)


@pytest.fixture(scope="module")
def draft():
    return disturbed(random_sdar(0))


def settings(number: int) -> dict:
    chance = random.Random(number)
    verify = chance.choice(["exact", "exact", "exact", "none", "temporal"])
    own = {
        "max_new_tokens": chance.randint(1, 22),
        "temperature": chance.choice([0.0, 0.0, 0.6, 1.1]),
        "top_k": chance.choice([0, 5]),
        "top_p": chance.choice([1.0, 0.8]),
        "seed": chance.randint(-5, 5),
        "steps": chance.choice([None, 2, 4]),
        "end_token_ids": chance.choice([(), (22,), (45, 9)]),
        "verify": verify,
    }
    own |= chance.choice(STRATEGIES)
    if verify == "exact":
        own |= {"drafter": chance.choice(["auto", "model", "self"]), "draft_steps": chance.choice([None, None, 2])}
        own["order_sharpness"] = chance.choice([None, 0.0, 3.0])
    if verify == "temporal":
        own |= {"accept": chance.choice(["match", "mrs"]), "rejected_tail": chance.choice(["truncate", "draft_argmax"])}
    return own


def alone(target, draft, prompt, own) -> simsd.Result:
    """By a call of its own; what is exact, natively."""
    if own["verify"] == "exact":
        own = {name: value for name, value in own.items() if name not in ("drafter", "draft_steps", "order_sharpness")}
        own["verify"] = "none"
    return simsd.generate(target, [prompt], draft, **own)[0]


def same(result: simsd.Result, expected: simsd.Result, exact: bool) -> None:
    assert (result.tokens, result.step_map, result.probs) == (expected.tokens, expected.step_map, expected.probs)
    assert result.finish_reason == expected.finish_reason
    if not exact:
        assert result.origins == expected.origins


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_differ_in_everything_share_a_batch(target, draft, seed):
    chance = random.Random(seed)
    jobs = [(chance.choice(PROMPTS), settings(100 * seed + n)) for n in range(16)]
    engine = simsd.Engine(target, draft, max_batch=5, max_length=64)
    waiting, results, numbers = list(enumerate(jobs)), {}, {}
    while waiting or engine.busy:
        for _ in range(chance.randint(0, 3)):
            if waiting:
                n, (prompt, own) = waiting.pop(0)
                numbers[engine.add(prompt, **own)] = n
        results |= {numbers[u.index]: u.result for u in engine.step() if u.result is not None}
    assert sorted(results) == list(range(len(jobs)))
    for n, (prompt, own) in enumerate(jobs):
        same(results[n], alone(target, draft, prompt, own), own["verify"] != "temporal")


def test_a_cancelled_request_leaves_its_slot_and_the_others_alone(target, draft):
    engine = simsd.Engine(target, draft, max_batch=2, max_length=64)
    numbers = [engine.add(prompt, max_new_tokens=16, end_token_ids=()) for prompt in PROMPTS]
    results = {}
    for step in itertools.count():
        results |= {u.index: u.result for u in engine.step() if u.result is not None}
        if step == 1:
            engine.cancel(numbers[0])  # running
            engine.cancel(numbers[3])  # waiting
        if not engine.busy:
            break
    assert [results[numbers[n]].finish_reason for n in (0, 3)] == ["cancelled"] * 2
    assert results[numbers[3]].tokens == []
    for n in (1, 2, 4):
        native = simsd.generate(target, [PROMPTS[n]], max_new_tokens=16, end_token_ids=(), verify="none")[0]
        assert results[numbers[n]].tokens == native.tokens


def test_an_error_in_an_iteration_leaves_an_engine_that_goes_on(target, draft):
    calls = itertools.count()

    def failing(*call):
        if next(calls) in (2, 5, 6):
            raise RuntimeError("no memory")
        return run_plan(*call)

    engine = simsd.Engine(target, draft, max_batch=3, max_length=64, parts=Parts(forward=failing))
    numbers = [engine.add(prompt, **settings(n) | {"verify": "exact"}) for n, prompt in enumerate(PROMPTS)]
    results, errors = {}, 0
    while engine.busy:
        try:
            results |= {u.index: u.result for u in engine.step() if u.result is not None}
        except RuntimeError:
            errors += 1
    assert errors == 3
    for n, prompt in enumerate(PROMPTS):
        same(results[numbers[n]], alone(target, draft, prompt, settings(n) | {"verify": "exact"}), True)


def test_an_end_gate_is_refused_where_the_engine_would_gate_only_some_of_the_end_tokens(target, draft):
    """What an engine has room for depends on its first requests; the text must not."""
    own = settings(0) | {"verify": "temporal", "end_token_ids": tuple(range(30, 42)), "end_gate": 0.5}
    own = {name: value for name, value in own.items() if name not in ("drafter", "draft_steps", "order_sharpness")}
    engine = simsd.Engine(target, draft, max_batch=2, max_length=64)
    same(engine.generate(PROMPTS[:1], **own)[0], alone(target, draft, PROMPTS[0], own), False)
    engine = simsd.Engine(target, draft, max_batch=2, max_length=64)
    engine.generate(PROMPTS[:1], max_new_tokens=4)
    with pytest.raises(simsd.SimsdError, match="12 end tokens.*room for 8"):
        engine.add(PROMPTS[0], **own)
    assert not engine.busy
    ungated = own | {"end_gate": 0.0}
    same(engine.generate(PROMPTS[:1], **ungated)[0], alone(target, draft, PROMPTS[0], ungated), False)


def test_an_engine_serves_calls_one_after_the_other(target, draft):
    engine = simsd.Engine(target, draft, max_batch=2, max_length=64)
    for verify in ("exact", "none"):
        results = engine.generate(PROMPTS, max_new_tokens=9, verify=verify)
        expected = simsd.generate(target, PROMPTS, max_new_tokens=9, verify="none")
        assert [r.tokens for r in results] == [r.tokens for r in expected]
    with pytest.raises(KeyError):
        engine.result(0)
