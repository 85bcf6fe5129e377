"""Threads that share an engine: one drives, the others add, cancel, stop and ask."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading

import pytest

import simsd
from replays import PROMPTS
from simsd import SimsdError
from simsd.decode.iteration import Parts, run_plan
from simsd.engine.pages import page_bytes
from simsd.engine.request import Request
from small_tokenizers import for_stand_ins
from stand_ins import random_sdar

SETTINGS = [
    {"max_new_tokens": 14, "end_token_ids": ()},
    {"max_new_tokens": 9, "temperature": 0.8, "seed": 3},
    {"max_new_tokens": 17, "strategy": "low_confidence_dynamic", "threshold": 0.4},
]
JOBS = list(itertools.product(range(len(PROMPTS)), range(len(SETTINGS))))


@pytest.fixture(scope="module")
def target():
    return simsd.load(random_sdar(0).model, tokenizer=for_stand_ins())


def joined(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_texts_are_those_of_lone_requests_while_other_threads_add_and_cancel(target, draft):
    alone = {job: simsd.generate(target, [PROMPTS[job[0]]], verify="none", **SETTINGS[job[1]])[0] for job in JOBS}
    memory = 5 * (page_bytes(target, 16) + page_bytes(draft, 16))  # too little for three
    engine = simsd.Engine(target, draft, max_batch=3, max_length=64, page_size=16, kv_memory=memory)
    jobs: dict[int, tuple[int, int]] = {}
    stopped: set[int] = set()
    errors: list[BaseException] = []
    finished = threading.Event()

    steps = threading.Semaphore(0)

    def customer(seed: int) -> None:
        chance, own = random.Random(seed), []
        try:
            for job in chance.sample(JOBS, len(JOBS)):
                assert steps.acquire(timeout=60)
                own.append(engine.add(PROMPTS[job[0]], priority=chance.randint(0, 2), **SETTINGS[job[1]]))
                jobs[own[-1]] = job
                number = chance.choice(own[-4:])  # waiting, running or done
                if chance.random() < 0.4:
                    stopped.add(number)
                    chance.choice([engine.cancel, lambda number: engine.stop(number, 5)])(number)
                assert engine.metrics().running <= 3
        except BaseException as error:
            errors.append(error)

    customers = [threading.Thread(target=customer, args=(seed,)) for seed in range(3)]
    results: dict[int, simsd.Result] = {}
    brought: dict[int, list[int]] = {}

    def drive() -> None:
        try:
            while engine.busy or not finished.is_set():
                steps.release(3)
                for update in engine.step():
                    brought.setdefault(update.index, []).extend(update.tokens)
                    if update.result is not None:
                        assert update.index not in results
                        results[update.index] = update.result
        except BaseException as error:
            errors.append(error)

    driver = threading.Thread(target=drive)
    for thread in (driver, *customers):
        thread.start()
    joined(customers)
    finished.set()
    joined([driver])
    assert errors == [] and sorted(results) == sorted(jobs) == list(range(3 * len(JOBS)))
    for number, result in results.items():
        expected = alone[jobs[number]]
        count = len(result.tokens)
        if number not in stopped:
            assert (count, result.finish_reason) == (len(expected.tokens), expected.finish_reason)
            assert result.text == expected.text
        columns = (result.tokens, result.step_map, result.probs)
        assert columns == (expected.tokens[:count], expected.step_map[:count], expected.probs[:count])
        assert brought[number][:count] == result.tokens
    assert engine.step() == []
    metrics = engine.metrics()
    assert (metrics.waiting, metrics.running) == (0, 0) and sum(metrics.finished.values()) == len(jobs)
    assert metrics.free_pages == metrics.pages == 5


@pytest.mark.parametrize("call", ["cancel", "stop", "result", "metrics", "add"])
def test_no_call_of_another_thread_comes_between_what_is_committed_together(target, monkeypatch, call):
    engine = simsd.Engine(target, max_batch=1, max_length=64)
    number = engine.add(PROMPTS[0], max_new_tokens=9, end_token_ids=())

    def result() -> None:
        with contextlib.suppress(KeyError):  # it waits so long that the request is gone
            engine.result(number)

    calls = {
        "cancel": lambda: engine.cancel(number),
        "stop": lambda: engine.stop(number, 2),
        "result": result,
        "metrics": engine.metrics,
        "add": lambda: engine.add([1], max_new_tokens=1),
    }
    learn, others, began = Request.learn, [], []

    def learned(request, *given):
        if not others:
            other = threading.Thread(target=lambda: (began.append(True), calls[call](), began.append(False)))
            others.append(other)
            other.start()
            other.join(0.05)
            assert began in ([], [True])
        learn(request, *given)

    monkeypatch.setattr(Request, "learn", learned)
    results = [update.result for update in engine.stream() if update.index == number and update.result is not None]
    joined(others)
    assert began == [True, False] and len(results) == 1
    native = simsd.generate(target, PROMPTS[:1], max_new_tokens=9, end_token_ids=(), verify="none")[0]
    assert results[0].tokens == native.tokens[: len(results[0].tokens)]


@pytest.mark.parametrize("call", ["step", "stream", "generate"])
def test_a_second_thread_that_drives_is_refused_and_the_first_goes_on(call):
    inside, go_on = threading.Event(), threading.Event()

    def held(*given):
        inside.set()
        assert go_on.wait(20)
        return run_plan(*given)

    engine = simsd.Engine(random_sdar(0), max_batch=2, max_length=64, parts=Parts(forward=held))
    engine.add(PROMPTS[0], max_new_tokens=5, end_token_ids=())
    results = []
    first = threading.Thread(target=lambda: results.extend(u.result for u in engine.stream()), name="first")
    first.start()
    assert inside.wait(10)
    with pytest.raises(SimsdError, match="thread 'first' is in step, stream or generate of this engine, and 'MainThr"):
        {"step": engine.step, "stream": lambda: list(engine.stream()), "generate": lambda: engine.generate([[1]])}[
            call
        ]()
    # What does not drive is not held up by the forward that runs.
    waiting = engine.add(PROMPTS[1], max_new_tokens=5)
    engine.cancel(waiting)
    assert engine.metrics().running == 1 and engine.result(waiting).finish_reason == "cancelled" and engine.busy
    go_on.set()
    joined([first])
    native = simsd.generate(random_sdar(0), PROMPTS[:1], max_new_tokens=5, end_token_ids=(), verify="none")
    assert native[0].tokens in [result.tokens for result in results if result is not None]
    assert engine.metrics().failed_iterations == 0
    assert engine.step() == []


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_when_the_driving_thread_dies_another_one_takes_over(target, draft, error, monkeypatch):
    calls = itertools.count()

    def dying(*given):
        if next(calls) == 3:
            raise error("dies here")
        return run_plan(*given)

    monkeypatch.setattr(threading, "excepthook", lambda given: None)
    engine = simsd.Engine(target, draft, max_batch=2, max_length=64, parts=Parts(forward=dying))
    numbers = [engine.add(prompt, max_new_tokens=12, end_token_ids=()) for prompt in PROMPTS]
    results: dict[int, simsd.Result] = {}

    def drive() -> None:
        results.update({u.index: u.result for u in engine.stream() if u.result is not None})

    thread = threading.Thread(target=drive)
    thread.start()
    joined([thread])
    assert engine.busy
    drive()
    native = simsd.generate(target, PROMPTS, max_new_tokens=12, end_token_ids=(), verify="none")
    assert [results[number].text for number in numbers] == [result.text for result in native]
    assert engine.step() == [] and engine.metrics().free_pages == engine.metrics().pages
