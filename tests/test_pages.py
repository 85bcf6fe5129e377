"""Pages: who has which, how many fit into memory, and that texts do not depend on how many there are."""

from __future__ import annotations

import itertools

import pytest

import simsd
from simsd.engine import pages
from simsd.engine.pages import PagePool, page_bytes, places_of
from simsd.models.runner import ModelRunner
from stand_ins import random_sdar


def test_a_pool_hands_each_page_to_one_owner():
    pool = PagePool(5)
    first, second = pool.take(2), pool.take(3)
    assert sorted(first + second) == list(range(5))
    assert pool.take(1) is None and pool.take(0) == [] and pool.free == 0
    pool.retire(first, 0)
    pool.reclaim(0)
    assert sorted(pool.take(2)) == sorted(first)


def test_a_page_is_free_once_the_last_iteration_that_knew_it_was_reported():
    pool = PagePool(3)
    one, two = pool.take(1), pool.take(1)
    pool.retire(one, 7)
    pool.retire(two, 8)
    pool.reclaim(6)
    assert pool.free == 1
    pool.reclaim(7)
    assert pool.free == 2
    pool.reclaim(9)
    assert pool.free == 3


def test_after_an_interrupt_all_that_nobody_has_is_free():
    pool = PagePool(6)
    owned, _lost = pool.take(2), pool.take(3)
    pool.retire(pool.take(1), 4)
    pool.recount(owned)
    assert sorted(pool.take(4) + owned) == list(range(6)) and pool.take(1) is None


def shared_out(**changes):
    target, draft = random_sdar(0), random_sdar(1)
    given = {"slots": 3, "capacity": 100, "block_length": 4, "states": 5, "page_size": 32, "kv_memory": None}
    return target, draft, places_of(target, draft, **given | changes)


def test_every_slot_has_pages_of_its_own_behind_those_of_texts():
    target, draft, places = shared_out()
    assert (places.positions, places.pages) == (4, 12)  # 100 tokens in pages of 32, for three slots
    assert places.scratch == 256 and places.target % 32 == places.draft % 32 == 0
    assert places.draft < places.target
    (table,), *runners = places.runners(target, draft)
    first = places.scratch // 32
    assert (table.pages[:, :first] == -1).all()
    for runner, size in zip(runners, (places.target, places.draft), strict=True):
        own = table.pages[:, first : size // 32].flatten().tolist()
        assert sorted(own) == list(range(places.pages, len(runner.cache.keys[0])))


def test_memory_is_counted_in_bytes_of_both_models():
    target, draft, _ = shared_out()
    both = page_bytes(target, 32) + page_bytes(draft, 32)
    runner = ModelRunner(target, 1, 32)
    assert page_bytes(target, 32) == runner.cache.keys.nbytes + runner.cache.values.nbytes
    assert shared_out(kv_memory=7 * both + both - 1)[2].pages == 7
    assert shared_out(kv_memory=10**12)[2].pages == 12  # more is of no use
    with pytest.raises(simsd.SimsdError, match=f"a page of 32 tokens takes {both:,} bytes.*kv_memory {both - 1:,} by"):
        shared_out(kv_memory=both - 1)


def test_without_a_limit_most_of_what_is_free_is_used(monkeypatch):
    target, draft, whole = shared_out()
    both = page_bytes(target, 32) + page_bytes(draft, 32)
    own = sum(
        3 * (size - whole.scratch) // 32 * page_bytes(model, 32)
        for model, size in ((target, whole.target), (draft, whole.draft))
    )
    monkeypatch.setattr(pages, "free_memory", lambda device: int((own + 5.5 * both) / pages.SHARE))
    assert shared_out()[2].pages == 5
    monkeypatch.setattr(pages, "free_memory", lambda device: own)
    with pytest.raises(simsd.SimsdError, match="more than what is free"):
        shared_out()


def test_the_system_tells_how_much_is_free():
    assert pages.free_memory(random_sdar(0).device) > 2**20


# Engines whose memory is too small for all of their requests

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [17] * 30, [18, 19], [20] * 17, [21, 22, 23, 24]]


def crowded(target, draft, count: int, **settings) -> simsd.Engine:
    """Room for `count` pages of 16 tokens."""
    each = page_bytes(target, 16) + (0 if draft is None else page_bytes(draft, 16))
    return simsd.Engine(target, draft, max_length=96, page_size=16, kv_memory=count * each, max_rows=64, **settings)


def owned(engine: simsd.Engine) -> list[int]:
    return [page for _, occupant in engine.loop.scheduler.occupied for page in occupant.pages]


@pytest.mark.parametrize("verify", ["none", "exact", "temporal"])
@pytest.mark.parametrize("count", [6, 9, 14])
def test_texts_do_not_depend_on_memory(target, draft, count, verify):
    settings = {"max_new_tokens": 50, "temperature": 0.8, "seed": 3, "end_token_ids": (), "verify": verify}
    roomy = simsd.Engine(target, draft, max_batch=4, max_length=96, max_rows=64).generate(PROMPTS, **settings)
    engine = crowded(target, draft, count, max_batch=4)
    numbers = [engine.add(prompt, **settings) for prompt in PROMPTS]
    results, preempted = {}, 0
    running = set()
    while engine.busy:
        results |= {update.index: update.result for update in engine.step() if update.result is not None}
        now = {occupant.request.index for _, occupant in engine.loop.scheduler.occupied}
        preempted += len(running - now - results.keys())
        running = now
        mine = owned(engine)
        assert len(set(mine)) == len(mine) and set(mine) <= set(range(count))
    engine.step()
    assert engine.metrics().free_pages == count
    assert preempted > 0 or count == 14
    for number, wanted in zip(numbers, roomy, strict=True):
        found = results[number]
        assert (found.tokens, found.step_map, found.probs) == (wanted.tokens, wanted.step_map, wanted.probs)
        assert (found.draw_logprobs, found.cut_tokens) == (wanted.draw_logprobs, wanted.cut_tokens)


def test_the_oldest_request_is_never_driven_out(target):
    engine = crowded(target, None, 6, max_batch=4)
    numbers = [engine.add(prompt, max_new_tokens=50, end_token_ids=(), verify="none") for prompt in PROMPTS]
    done = []
    while len(done) < len(numbers):
        oldest = next(number for number in numbers if number not in done)
        done += [update.index for update in engine.step() if update.result is not None]
        running = {occupant.request.index for _, occupant in engine.loop.scheduler.occupied}
        assert oldest in running or oldest in done
    assert sorted(done) == numbers


def test_what_never_fits_is_refused_with_the_figures(target):
    engine = crowded(target, None, 3, max_batch=2)
    engine.add([1] * 20, max_new_tokens=28)
    with pytest.raises(
        simsd.SimsdError, match=r"21 prompt tokens \+ max_new_tokens 28, .*52, exceed the 48 tokens .*3 pages of 16"
    ):
        engine.add([1] * 21, max_new_tokens=28)


def test_a_cancelled_request_leaves_no_page(target, draft):
    engine = crowded(target, draft, 9, max_batch=4)
    numbers = [engine.add(prompt, max_new_tokens=50, end_token_ids=()) for prompt in PROMPTS]
    for number in itertools.islice(numbers, 0, None, 2):
        engine.step()
        engine.cancel(number)
    while engine.busy:
        engine.step()
    engine.step()
    assert engine.metrics().free_pages == 9


@pytest.mark.parametrize("value", [0, 8, 17, 48, 512, 64.5])
def test_a_page_size_that_kernels_do_not_know_is_refused(value):
    with pytest.raises(simsd.SimsdError, match="page_size"):
        simsd.EngineConfig(page_size=value)
