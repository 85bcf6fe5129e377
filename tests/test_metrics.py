"""Figures of an engine: they are those of the results, and a server can export them."""

from __future__ import annotations

import json
import math
import types

import pytest

import pretended_cuda
import simsd
from replays import PROMPTS
from simsd.decode.iteration import Parts
from simsd.engine.metrics import BOUNDS, Meter
from simsd.engine.request import Request
from stand_ins import random_sdar


def test_a_new_engine_has_done_nothing():
    metrics = simsd.Engine(random_sdar(0), max_batch=3).metrics()
    assert (metrics.waiting, metrics.running, metrics.slots) == (0, 0, 3)
    assert metrics.finished == metrics.captured == {} and metrics.last_error is None
    counts = (metrics.iterations, metrics.target_forwards, metrics.generated_tokens, metrics.prompt_tokens)
    assert counts == (0, 0, 0, 0) and metrics.queue.count == 0


@pytest.mark.parametrize("drafter", ["model", "self"])
def test_figures_are_those_of_the_requests(target, draft, drafter):
    engine = simsd.Engine(target, draft, max_batch=1, max_length=64, max_rows=32)
    for prompt in PROMPTS[:4]:
        last = engine.add(prompt, max_new_tokens=13, end_token_ids=(), drafter=drafter)
    engine.add([], max_new_tokens=0)
    assert engine.metrics().waiting == 5
    engine.cancel(last)
    updates = engine.step()
    assert (engine.metrics().waiting, engine.metrics().running) == (2, 1)
    updates += engine.stream()
    results = [update.result for update in updates if update.result is not None]
    stats = sum((result.stats for result in results), simsd.Stats())
    metrics = engine.metrics()
    assert (metrics.waiting, metrics.running) == (0, 0)
    assert metrics.finished == {"length": 4, "cancelled": 1}
    assert metrics.generated_tokens == sum(len(result.tokens) for result in results) == 39
    assert metrics.prompt_tokens == sum(map(len, PROMPTS[:3]))  # the cancelled one and the one for nothing never ran
    assert metrics.target_forwards == stats.target_forwards  # one at a time
    assert metrics.draft_forwards == stats.draft_forwards
    assert (metrics.drafted, metrics.accepted) == (stats.drafted, stats.accepted) and metrics.accepted > 0
    assert metrics.iterations >= metrics.target_forwards and metrics.iteration_seconds > 0
    assert metrics.failed_iterations == 0
    assert metrics.queue.count == metrics.first_token.count == 3
    bringing = sum(bool(update.tokens) for update in updates)
    assert metrics.between_tokens.count == bringing - 3
    assert metrics.first_token.sum >= metrics.queue.sum > 0


def test_a_batch_shares_its_forwards(target):
    engine = simsd.Engine(target, max_batch=5, max_length=64)
    results = engine.generate(PROMPTS, max_new_tokens=8, end_token_ids=(), verify="none")
    most = max(result.stats.target_forwards for result in results)
    assert engine.metrics().target_forwards == most < sum(result.stats.target_forwards for result in results)


def test_chunks_of_long_prompts_are_counted_apart(target, draft):
    engine = simsd.Engine(target, draft, max_length=256, prefill_rows=64)
    [result] = engine.generate([[7] * 200], max_new_tokens=4, drafter="model", end_token_ids=())
    metrics = engine.metrics()
    assert metrics.target_prefill_forwards == result.stats.target_prefill_forwards == 3
    assert metrics.draft_prefill_forwards == result.stats.draft_prefill_forwards == 3
    assert metrics.target_forwards == result.stats.target_forwards


def test_seconds_fall_into_the_bucket_whose_bound_they_do_not_exceed(monkeypatch):
    meter, seconds = Meter(), [0.0005, BOUNDS[0], 0.3, BOUNDS[-1], 1000.0]
    for waited in seconds:
        request = Request(0, [1], simsd.SamplingParams(), 0, (), None)
        request.arrived = 0.0
        with monkeypatch.context() as clock:
            clock.setattr("simsd.engine.metrics.time", types.SimpleNamespace(perf_counter=iter([waited]).__next__))
            meter.admitted(request)
    queue = meter.queue.histogram()
    assert (queue.count, queue.sum) == (5, pytest.approx(sum(seconds)))
    assert tuple(queue.buckets) == (*BOUNDS, math.inf)
    assert [queue.buckets[bound] for bound in (BOUNDS[0], 0.25, 0.5, BOUNDS[-1], math.inf)] == [2, 2, 3, 4, 5]


def test_figures_are_plain_values_with_the_captured_shapes_among_them(target, draft, monkeypatch):
    pretended_cuda.pretend(monkeypatch)
    engine = simsd.Engine(target, draft, max_batch=2, max_length=64, max_rows=32, parts=Parts(packed=False))
    engine.generate(PROMPTS[:2], max_new_tokens=8, drafter="model")
    engine.generate(PROMPTS[:2], max_new_tokens=8, verify="temporal")
    metrics = engine.metrics()
    values = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert values["finished"] == metrics.finished and values["generated_tokens"] == metrics.generated_tokens
    assert values["queue"]["buckets"]["inf"] == values["queue"]["count"] == 4
    assert len(values["captured"]) == len(metrics.captured) >= 2
    first = values["captured"][0]
    assert first["shape"]["draft_blocks"] >= 0 and first["seconds"] > 0 and first["mebibytes"] == 0
    assert any(one["shape"]["temporal"] for one in values["captured"])


def test_metrics_do_not_change_behind_the_caller_s_back(target):
    engine = simsd.Engine(target, max_length=64)
    before = engine.metrics()
    engine.generate(PROMPTS[:1], max_new_tokens=4)
    assert before.finished == {} and before.target_forwards == 0
    with pytest.raises(AttributeError):
        before.waiting = 3
