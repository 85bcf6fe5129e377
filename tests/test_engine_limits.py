"""Who is served first, how many may wait, and how long a request may take."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pytest

import simsd
from replays import PROMPTS
from simsd import QueueFull, SimsdError
from simsd.engine import engine as engine_module
from simsd.engine import loop
from stand_ins import random_sdar


def begun_in_turn(engine: simsd.Engine) -> list[int]:
    """The numbers of requests as they first move."""
    return list(dict.fromkeys(update.index for update in engine.stream()))


@pytest.mark.parametrize("slots", [1, 2])
def test_who_waits_is_served_by_priority_and_equals_as_they_came(slots):
    engine = simsd.Engine(random_sdar(0), max_batch=slots, max_length=64)
    priorities = [0, 5, -1, 5, np.int64(0), -1, 2]
    for priority, prompt in zip(priorities, itertools.cycle(PROMPTS)):
        engine.add(prompt, priority=priority, max_new_tokens=4, end_token_ids=(), verify="none")
    assert begun_in_turn(engine) == [2, 5, 0, 4, 6, 1, 3]


def test_who_runs_is_not_displaced_by_a_higher_priority():
    engine = simsd.Engine(random_sdar(0), max_batch=1, max_length=64)
    numbers = [engine.add(prompt, max_new_tokens=8, end_token_ids=()) for prompt in PROMPTS[:2]]
    first = engine.step()
    urgent = engine.add(PROMPTS[2], priority=-1, max_new_tokens=8, end_token_ids=())
    assert [first[0].index, *begun_in_turn(engine)] == [numbers[0], numbers[0], urgent, numbers[1]]


@pytest.mark.parametrize("priority", [1.5, "high", None, True, 2**63])
def test_a_priority_is_an_integer(priority):
    engine = simsd.Engine(random_sdar(0), max_length=64)
    with pytest.raises(SimsdError, match="priority must be an integer"):
        engine.add([1], priority=priority)
    assert not engine.busy


def test_a_full_queue_refuses_with_the_figures_and_takes_more_once_there_is_room():
    engine = simsd.Engine(random_sdar(0), max_batch=2, max_queue=1, max_length=64)
    own = {"max_new_tokens": 4, "end_token_ids": (), "verify": "none"}
    numbers = [engine.add(prompt, **own) for prompt in PROMPTS[:3]]  # two will run, one waits
    message = "3 requests wait, 2 of 2 slots are free and max_queue is 1"
    with pytest.raises(QueueFull, match=message):
        engine.add(PROMPTS[3], **own)
    engine.step()
    with pytest.raises(SimsdError, match="1 requests wait, 0 of 2 slots are free"):
        engine.add(PROMPTS[3], **own)
    engine.cancel(numbers[2])
    numbers.append(engine.add(PROMPTS[3], **own))
    results = {u.index: u.result for u in engine.stream() if u.result is not None}
    assert results[numbers[2]].finish_reason == "cancelled"
    native = simsd.generate(random_sdar(0), PROMPTS[:4], **own)
    assert [results[numbers[n]].tokens for n in (0, 1, 3)] == [native[n].tokens for n in (0, 1, 3)]


def test_with_no_queue_a_request_is_taken_where_a_slot_is_free():
    engine = simsd.Engine(random_sdar(0), max_batch=1, max_queue=0, max_length=64)
    engine.add(PROMPTS[0], max_new_tokens=4)
    with pytest.raises(QueueFull):
        engine.add(PROMPTS[1], max_new_tokens=4)
    while not any(update.result for update in engine.step()):
        with pytest.raises(QueueFull):
            engine.add(PROMPTS[1], max_new_tokens=4)
    assert engine.generate([PROMPTS[1]], max_new_tokens=4, end_token_ids=())[0].finish_reason == "length"


def test_of_prompts_that_do_not_all_fit_the_queue_none_is_decoded():
    engine = simsd.Engine(random_sdar(0), max_batch=1, max_queue=1, max_length=64)
    with pytest.raises(QueueFull):
        engine.generate(PROMPTS, max_new_tokens=4)
    assert [update.result.finish_reason for update in engine.step()] == ["cancelled"] * 2
    assert not engine.busy


def test_a_waiting_request_that_ends_is_told_of_at_once_wherever_it_stands():
    engine = simsd.Engine(random_sdar(0), max_batch=1, max_length=64)
    numbers = [engine.add(prompt, max_new_tokens=40, end_token_ids=(), verify="none") for prompt in PROMPTS]
    engine.step()
    engine.cancel(numbers[3])
    nothing = engine.add([1], max_new_tokens=0)
    done = {update.index: update.result.finish_reason for update in engine.step() if update.result is not None}
    assert done == {numbers[3]: "cancelled", nothing: "length"}
    assert engine.metrics().waiting == 3


def test_past_its_deadline_a_request_ends_with_what_it_has(monkeypatch, target, draft):
    now = 100.0
    for module in (engine_module, loop):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: now))
    engine = simsd.Engine(target, draft, max_batch=2, max_length=64)
    own = {"max_new_tokens": 24, "end_token_ids": ()}
    deadlines = [None, 5.0, 3, None, np.float32(50.0)]
    numbers = [engine.add(prompt, deadline=d, **own) for prompt, d in zip(PROMPTS, deadlines, strict=True)]
    results = {}

    def step() -> list[int]:
        done = {update.index: update.result for update in engine.step() if update.result is not None}
        results.update(done)
        return list(done)

    now = 102.9
    for _ in range(4):
        assert step() == []
    now = 103.0
    assert step() == [numbers[2]]  # it waits
    now = 106.0
    assert step() == [numbers[1]]  # it runs
    now = 107.0
    while engine.busy:
        step()
    native = simsd.generate(target, PROMPTS, verify="none", **own)
    reasons = {number: result.finish_reason for number, result in results.items()}
    assert [reasons[number] for number in numbers] == ["length", "deadline", "deadline", "length", "length"]
    assert results[numbers[2]].tokens == []
    kept = results[numbers[1]].tokens
    assert 0 < len(kept) < 24 and kept == native[1].tokens[: len(kept)]
    for n in (0, 3, 4):
        assert results[numbers[n]].tokens == native[n].tokens
    now = 1000.0  # the last deadline is of one that is done
    assert engine.step() == [] and engine.metrics().finished == {"length": 3, "deadline": 2}


@pytest.mark.parametrize("deadline", [0, -1.0, float("nan"), "soon", True, [3]])
def test_a_deadline_is_a_number_of_seconds(deadline):
    engine = simsd.Engine(random_sdar(0), max_length=64)
    with pytest.raises(SimsdError, match="deadline must be a number of seconds above 0, or None, got"):
        engine.add([1], deadline=deadline)
    assert not engine.busy
    engine.add([1], deadline=float("inf"), max_new_tokens=2)
    assert len(list(engine.stream())) > 0


def test_a_misspelt_option_is_told_of():
    with pytest.raises(SimsdError, match="unknown setting 'deadlines': did you mean deadline"):
        simsd.Engine(random_sdar(0), max_length=64).add([1], deadlines=3)


def test_a_request_of_nothing_waits_for_no_slot():
    engine = simsd.Engine(random_sdar(0), max_batch=1, max_length=64)
    engine.add([1], max_new_tokens=0)
    engine.add([2], max_new_tokens=8, end_token_ids=())
    done = {update.index: update.result.tokens for update in engine.step() if update.result}
    assert done == {0: []} and engine.busy
