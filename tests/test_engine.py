"""Requests with settings of their own join, end and are cancelled in one engine: each text is what it is alone."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

import simsd
from replays import PROMPTS, STRATEGIES
from simsd import SimsdError
from simsd.decode.exchange import Report
from simsd.decode.iteration import Parts, run_plan
from simsd.decode.slots import Slots
from simsd.engine.loop import Loop
from simsd.engine.pages import PagePool, page_bytes
from simsd.engine.prefixes import PrefixCache
from simsd.engine.request import Request
from simsd.engine.runner import Runner
from simsd.engine.scheduler import Scheduler
from stand_ins import random_sdar


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
        own |= {
            "drafter": chance.choice(["auto", "model", "self", "lookup"]),
            "draft_steps": chance.choice([None, None, 2]),
        }
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
    native = simsd.generate(target, PROMPTS, max_new_tokens=16, end_token_ids=(), verify="none")
    for n in (1, 2, 4):
        assert results[numbers[n]].tokens == native[n].tokens
    kept = results[numbers[0]].tokens
    assert 0 < len(kept) < 16 and kept == native[0].tokens[: len(kept)]


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


def test_a_useless_draft_is_given_up(target):
    config = dict(drafter="auto", max_new_tokens=400, end_token_ids=())
    result = simsd.generate(target, [PROMPTS[0]], random_sdar(1), config)[0]
    assert result.stats.draft_forwards < 0.2 * result.stats.target_forwards


def test_a_sequence_whose_logits_are_not_finite_fails_alone(draft):
    target = random_sdar(0)
    poison = 50
    config = dict(drafter="model", max_new_tokens=12, end_token_ids=())
    whole = simsd.generate(target, PROMPTS, draft, config)
    with torch.no_grad():
        target.model.model.embed_tokens.weight[poison] = math.nan
    assert not any(poison in prompt + r.tokens for prompt, r in zip(PROMPTS, whole, strict=True))
    results = simsd.generate(target, [*PROMPTS[:2], [1, poison, 2], *PROMPTS[2:]], draft, config)
    failed = results.pop(2)
    assert failed.finish_reason == "failed"
    assert [r.tokens for r in results] == [r.tokens for r in whole]


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
def test_an_interrupt_between_decision_and_commit_loses_and_doubles_nothing(target, draft, monkeypatch, place):
    config = dict(drafter="model", max_new_tokens=24, end_token_ids=())
    whole = simsd.generate(target, PROMPTS, draft, config)
    decoder = simsd.Decoder(target, PROMPTS, draft, config, max_batch=2)
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


def test_an_empty_prompt_generates_from_nothing(target, draft):
    for model in (None, draft):
        result = simsd.generate(target, [[]], model, max_new_tokens=6)[0]
        assert len(result.tokens) == 6 and result.prompt_tokens == []


def test_a_request_longer_than_the_engine_is_refused_with_the_figures():
    engine = simsd.Engine(random_sdar(0), max_length=16)
    with pytest.raises(
        SimsdError, match="5 prompt tokens .* 12, in whole blocks 20, exceed the engine's max_length 16"
    ):
        engine.add([1, 2, 3, 4, 5], max_new_tokens=12)
    assert not engine.busy
    assert len(engine.generate([[1, 2, 3, 4, 5]], max_new_tokens=8)[0].tokens) <= 8


def test_settings_are_the_request_s_or_the_engine_s():
    engine = simsd.Engine(random_sdar(0))
    with pytest.raises(SimsdError, match="unknown setting 'lookahead'"):
        engine.add([1], lookahead=2)
    with pytest.raises(SimsdError, match="unknown setting 'temperature'"):
        simsd.Engine(random_sdar(0), temperature=1.0)


CODE = [
    *(Loop.iterate.__wrapped__, Loop._restore, Loop._release, Loop._update, Loop._deliver),
    *(Loop._admit, Loop._let_in, Loop._grow, Loop._make_room, Loop.flush, Loop._open),
    *(Scheduler.let_go, Scheduler.free, Scheduler.put_back_last, Scheduler.queue, Scheduler.mend),
    *(PagePool.take, PagePool.retire, PagePool.reclaim, PagePool.recount),
    *(PrefixCache.take, PrefixCache.enter, PrefixCache.extend, PrefixCache.computed, PrefixCache.leave),
]
LINES = [
    pytest.param(function, line, id=f"{function.__name__}-{line}")
    for function in CODE
    for line in sorted({at - function.__code__.co_firstlineno for *_, at in function.__code__.co_lines() if at})
    if line > 0
]


@pytest.mark.parametrize(("function", "line"), LINES)
def test_an_interrupt_loses_no_request_and_no_page(target, interrupted_at, function, line):
    """Also where slots are freed, results are let go of, and a request makes room for another."""
    three_pages = 3 * page_bytes(target, 16)
    engine = simsd.Engine(target, max_batch=2, max_length=48, page_size=16, kv_memory=three_pages)
    numbers = [engine.add(prompt, max_new_tokens=20, end_token_ids=(), verify="none") for prompt in PROMPTS[:4]]
    results = {}

    def serve():
        for update in engine.stream():
            if update.result is not None:
                results[update.index] = update.result

    for _ in range(3):
        engine.step()
    engine.cancel(numbers.pop())  # it waits
    engine.loop._unsettled = True
    interrupted_at(function, line, serve)
    serve()
    assert engine.metrics().preemptions > 0
    native = simsd.generate(target, PROMPTS[:3], max_new_tokens=20, end_token_ids=(), verify="none")
    assert [results[number].tokens for number in numbers] == [result.tokens for result in native]
    assert engine.step() == [] and engine.metrics().free_pages == 3
