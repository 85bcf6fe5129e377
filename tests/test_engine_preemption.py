"""Requests that make room for others where memory is short, and what may become of them meanwhile."""

from __future__ import annotations

import itertools
import types

import pytest

import simsd
from simsd.engine import engine as engine_module
from simsd.engine import loop
from simsd.engine.pages import page_bytes

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [18, 19], [20] * 6]
OWN = {"max_new_tokens": 50, "end_token_ids": (), "verify": "none"}
PAGES = 6


@pytest.fixture(scope="module")
def alone(target):
    return [simsd.generate(target, [prompt], **OWN)[0] for prompt in PROMPTS]


def crowded(target, **settings) -> simsd.Engine:
    """Each request needs four pages in the end, and there are six."""
    config = {"max_batch": 3, "max_length": 96, "page_size": 16, "kv_memory": PAGES * page_bytes(target, 16)}
    return simsd.Engine(target, **config | settings)


def running(engine: simsd.Engine) -> set[int]:
    return {occupant.request.index for _, occupant in engine.loop.scheduler.occupied}


def until_preempted(engine: simsd.Engine) -> int:
    """Goes on until one that ran waits again; returns its number."""
    while engine.busy:
        before = running(engine)
        updates = engine.step()
        if gone := before - running(engine) - {update.index for update in updates if update.result is not None}:
            return gone.pop()
    raise AssertionError("nobody made room")


def finished(engine: simsd.Engine) -> dict[int, simsd.Result]:
    results = {update.index: update.result for update in engine.stream() if update.result is not None}
    engine.step()
    assert engine.metrics().free_pages == engine.metrics().pages == PAGES
    return results


def test_pages_and_preemptions_are_counted(target):
    engine = crowded(target)
    for prompt in PROMPTS:
        engine.add(prompt, **OWN)
    assert (engine.metrics().free_pages, engine.metrics().preemptions) == (PAGES, 0)
    until_preempted(engine)
    metrics = engine.metrics()
    held = [page for _, occupant in engine.loop.scheduler.occupied for page in occupant.pages]
    assert metrics.free_pages == PAGES - len(held) < PAGES and metrics.preemptions == 1
    assert len(finished(engine)) == len(PROMPTS)


@pytest.mark.parametrize("number", range(3))
def test_memory_for_all_lets_all_run_at_once(target, number):
    """Also where each has its only page, or its last one, from the beginning."""
    length = (16, 32, 96)[number]
    engine = crowded(target, max_length=length, kv_memory=None)
    for _ in range(3):
        engine.add([1, 2], max_new_tokens=length - 4)
    engine.step()
    assert engine.metrics().running == 3 and engine.metrics().waiting == 0


@pytest.mark.parametrize("end", ["cancel", "stop", "deadline"])
def test_a_preempted_request_ends_with_what_it_has(target, alone, monkeypatch, end):
    now = 0.0
    for module in (engine_module, loop):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: now))
    engine = crowded(target)
    for prompt in PROMPTS:
        engine.add(prompt, deadline=1000.0 if end == "deadline" else None, **OWN)
    number = until_preempted(engine)
    had = len(engine.result(number).tokens)
    assert 0 < had < 50
    if end == "cancel":
        engine.cancel(number)
    if end == "stop":
        engine.stop(number, 2)
    if end == "deadline":
        now = 1001.0
    updates = {update.index: update.result for update in engine.step() if update.result is not None}
    reason = {"cancel": "cancelled"}.get(end, end)
    assert updates[number].finish_reason == reason
    assert updates[number].tokens == alone[number].tokens[: 2 if end == "stop" else had]
    results = updates | finished(engine)
    assert sorted(results) == list(range(len(PROMPTS)))
    if end != "deadline":
        for other in set(results) - {number}:
            assert results[other].tokens == alone[other].tokens


def test_a_request_that_is_cancelled_while_it_waits_for_pages_lets_those_behind_it_in(target, alone):
    engine = crowded(target)
    first = engine.add(PROMPTS[0], **OWN)
    engine.step()
    large = engine.add([1] * 70, max_new_tokens=20, end_token_ids=())
    small = engine.add(PROMPTS[2], **OWN)
    engine.step()
    assert running(engine) == {first}  # none overtakes one that waits for pages
    engine.cancel(large)
    engine.step()
    assert running(engine) == {first, small}
    results = finished(engine)
    assert [results[first].tokens, results[small].tokens] == [alone[0].tokens, alone[2].tokens]


@pytest.mark.parametrize("priorities", list(itertools.permutations([0, 1, 2])) + [(0, 0, 0), (1, 0, 0)], ids=str)
def test_the_last_of_the_least_urgent_makes_room_and_all_finish(target, alone, priorities):
    engine = crowded(target)
    for prompt, priority in zip(PROMPTS[:3], priorities, strict=True):
        engine.add(prompt, priority=priority, **OWN)
    by_rank = sorted(range(3), key=lambda number: (priorities[number], number))
    done, results, preempted = [], {}, []
    while engine.busy:
        before = running(engine)
        for update in engine.step():
            if update.result is not None:
                done.append(update.index)
                results[update.index] = update.result
        gone = sorted(before - running(engine) - results.keys(), key=by_rank.index)
        preempted += gone
        if gone:
            assert running(engine) and all(by_rank.index(one) < by_rank.index(gone[0]) for one in running(engine))
    assert by_rank[0] not in preempted and by_rank[2] in preempted
    assert done == by_rank
    assert [results[n].tokens for n in range(3)] == [alone[n].tokens for n in range(3)]


def test_a_request_that_urgent_ones_drive_out_again_and_again_finishes(target, alone):
    engine = crowded(target)
    patient = engine.add(PROMPTS[1], priority=1, **OWN)
    results, urgent, preemptions = {}, [], 0
    for step in itertools.count():
        if step % 9 == 4 and len(urgent) < 6:
            urgent.append(engine.add(PROMPTS[0], **OWN))
        results |= {update.index: update.result for update in engine.step() if update.result is not None}
        preemptions = engine.metrics().preemptions
        if not engine.busy and len(urgent) == 6:
            break
        assert step < 2000
    assert preemptions >= 2
    assert results[patient].tokens == alone[1].tokens
    assert all(results[number].tokens == alone[0].tokens for number in urgent)
    assert results[patient].stats.new_tokens == 50 and engine.step() == []
    assert engine.metrics().free_pages == PAGES
