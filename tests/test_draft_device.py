"""A draft model that works beside the target, on a thread of its own: no text depends on it, whatever goes wrong."""

from __future__ import annotations

import random
import threading

import pytest
import torch

import pretended_cuda
import simsd
from replays import PROMPTS
from serving import check, serve, temporal_jobs
from simsd import SimsdError
from simsd.decode.draft import by_model
from simsd.decode.iteration import Parts, run_plan
from simsd.engine.pages import page_bytes
from simsd.engine.pair import draft_device
from stand_ins import disturbed, random_sdar
from test_engine import alone, same, settings

OWN = {"max_new_tokens": 24, "end_token_ids": ()}
STATIC = Parts(packed=False)


def beside(tiny, **config) -> simsd.Engine:
    return simsd.Engine(*tiny, **{"max_batch": 4, "max_length": 128, "max_rows": 64, "draft_device": "cpu"} | config)


def finished(engine: simsd.Engine) -> dict[int, simsd.Result]:
    results = {update.index: update.result for update in engine.stream() if update.result is not None}
    engine.step()
    assert engine.metrics().free_pages == engine.metrics().pages
    return results


@pytest.mark.parametrize("parts", [Parts(), STATIC, pretended_cuda.BESIDE], ids=["packed", "static", "captured"])
@pytest.mark.parametrize("drafter", ["model", "self", "lookup", "auto"])
def test_texts_are_native_decodings_whoever_joins_and_leaves(tiny, jobs, drafter, parts, monkeypatch, one_thread):
    if parts is pretended_cuda.BESIDE:
        pretended_cuda.pretend(monkeypatch)
    cancels = (1, 3, 6)
    results = serve(beside(tiny, parts=parts), jobs, cancels, drafter=drafter)
    check(results, jobs, cancels)
    if drafter != "auto":
        assert sum(result.stats.accepted for result in results.values()) > 0


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_temporal_texts_are_those_of_a_draft_in_the_targets_turn(tiny, jobs, captured, monkeypatch, one_thread):
    temporal = temporal_jobs(tiny, jobs)
    if captured:
        pretended_cuda.pretend(monkeypatch)
    mixed = [job for both in zip(temporal, jobs, strict=False) for job in both]
    check(serve(beside(tiny, parts=pretended_cuda.BESIDE if captured else Parts()), mixed), mixed)


@pytest.mark.parametrize("seed", range(3))
def test_requests_that_differ_in_everything_share_a_batch(target, draft, seed):
    chance = random.Random(seed)
    jobs = [(chance.choice(PROMPTS), settings(1000 + 100 * seed + n)) for n in range(16)]
    engine = simsd.Engine(target, draft, max_batch=5, max_length=64, lookahead=1 + seed, draft_device="cpu")
    numbers = [engine.add(prompt, **own) for prompt, own in jobs]
    results = finished(engine)
    for number, (prompt, own) in zip(numbers, jobs, strict=True):
        same(results[number], alone(target, draft, prompt, own), own["verify"] != "temporal")


def test_the_draft_drafts_while_the_target_verifies(target):
    """Each waits for the other to be at work: in one thread neither would come."""
    meeting, threads = threading.Barrier(2, timeout=60), set()

    def meets(function):
        def call(*arguments):
            threads.add((function, threading.current_thread()))
            meeting.wait()
            return function(*arguments)

        return call

    parts = Parts(forward=meets(run_plan), proposer=meets(by_model))
    engine = simsd.Engine(target, random_sdar(0), draft_device="cpu", parts=parts)
    (result,) = engine.generate([PROMPTS[0]], drafter="model", **OWN)
    assert result.tokens == simsd.generate(target, [PROMPTS[0]], verify="none", **OWN)[0].tokens
    assert result.stats.accepted > 0
    (target_thread,) = (thread for function, thread in threads if function is run_plan)
    (draft_thread,) = (thread for function, thread in threads if function is by_model)
    assert target_thread is threading.current_thread() is not draft_thread


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("lookahead", [1, 2, 4])
def test_a_draft_that_is_always_right_keeps_the_target_busy(lookahead, temperature):
    """As many blocks per forward as it may go through, but for the first, for which nothing is drafted yet."""
    same_model = random_sdar(0), random_sdar(0)
    engine = simsd.Engine(*same_model, lookahead=lookahead, max_rows=4096, max_length=128, draft_device="cpu")
    own = {"max_new_tokens": 96, "end_token_ids": (), "temperature": temperature, "steps": 1}
    (result,) = engine.generate([PROMPTS[1]], drafter="model", **own)
    assert result.tokens == simsd.generate(same_model[0], [PROMPTS[1]], verify="none", **own)[0].tokens
    assert result.stats.target_forwards <= 2 + -(-24 // lookahead)


def test_a_draft_that_is_sometimes_right_saves_forwards(target):
    engine = simsd.Engine(target, disturbed(random_sdar(0)), max_rows=512, draft_device="cpu")
    results = engine.generate(PROMPTS, drafter="model", **OWN | {"max_new_tokens": 96})
    native = simsd.generate(target, PROMPTS, verify="none", **OWN | {"max_new_tokens": 96})
    assert [result.tokens for result in results] == [result.tokens for result in native]
    drafted, accepted = (sum(getattr(r.stats, name) for r in results) for name in ("drafted", "accepted"))
    assert 0 < accepted < drafted
    steps, forwards = (sum(r.stats.target_forwards for r in them) for them in (native, results))
    assert forwards < 0.8 * steps


def test_those_who_make_room_for_others_lose_nothing(target, draft):
    """Each needs four pages in the end, and there are six."""
    memory = 6 * sum(page_bytes(model, 16) for model in (target, draft))
    crowded = beside((target, draft), page_size=16, max_length=96, lookahead=1, kv_memory=memory)
    own = OWN | {"max_new_tokens": 50, "drafter": "model"}
    numbers = [crowded.add(prompt, **own) for prompt in PROMPTS]
    results = finished(crowded)
    native = simsd.generate(target, PROMPTS, verify="none", max_new_tokens=50, end_token_ids=())
    assert [results[number].tokens for number in numbers] == [result.tokens for result in native]
    assert crowded.metrics().preemptions > 0


def test_beginnings_are_shared_and_long_prompts_come_in_chunks(tiny):
    prompt = [(7 * n) % 60 + 1 for n in range(300)]
    engine = beside(tiny, max_length=512, prefill_rows=64, page_size=16)
    for kind in ({"drafter": "model"}, {"verify": "temporal"}, {"drafter": "model"}, {"verify": "temporal"}):
        (result,) = engine.generate([prompt], **OWN | kind)
        other = {"verify": "none"} if "drafter" in kind else kind
        expected = simsd.generate(tiny[0], [prompt], tiny[1], prefix_cache=False, **OWN | other)[0]
        assert (result.tokens, result.probs) == (expected.tokens, expected.probs)
    assert result.stats.cached_tokens == 288 and result.stats.draft_prefill_forwards == 0


def test_what_goes_wrong_in_drafting_is_raised_and_counted(target, draft):
    calls = []

    def failing(*arguments):
        calls.append(threading.current_thread().name)
        if len(calls) in (2, 3):
            raise RuntimeError("the draft is unwell")
        return by_model(*arguments)

    engine = simsd.Engine(target, draft, draft_device="cpu", parts=Parts(proposer=failing))
    numbers = [engine.add(prompt, drafter="model", **OWN) for prompt in PROMPTS]
    results, errors = {}, []
    while engine.busy:
        try:
            results |= {u.index: u.result for u in engine.step() if u.result is not None}
        except RuntimeError as error:
            errors.append(str(error))
    assert errors == ["the draft is unwell"] * 2 and all(name.startswith("simsd-draft") for name in calls)
    native = simsd.generate(target, PROMPTS, verify="none", **OWN)
    assert [results[number].tokens for number in numbers] == [result.tokens for result in native]
    assert engine.metrics().failed_iterations == 2


def test_an_interrupt_waits_for_the_draft(target, draft):
    """Else it would go on drafting while pages change hands."""
    at_work, may_end, interrupted = threading.Event(), threading.Event(), []

    def slow(*arguments):
        at_work.set()
        may_end.wait(60)
        return by_model(*arguments)

    def forward(*arguments):
        if not interrupted:
            at_work.wait(60)
            interrupted.append(True)
            threading.Timer(0.2, may_end.set).start()
            raise KeyboardInterrupt
        assert may_end.is_set()
        return run_plan(*arguments)

    engine = simsd.Engine(target, draft, draft_device="cpu", parts=Parts(forward=forward, proposer=slow))
    number = engine.add(PROMPTS[0], drafter="model", **OWN)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert may_end.is_set()
    expected = simsd.generate(target, [PROMPTS[0]], verify="none", **OWN)[0]
    assert finished(engine)[number].tokens == expected.tokens


@pytest.mark.parametrize("which", ["target", "draft"])
def test_weights_change_and_engines_sleep_while_a_draft_is_under_way(which, monkeypatch, one_thread):
    """Captured, so that the draft goes on while the engine does nothing."""
    pair = [random_sdar(0), random_sdar(1)]
    pretended_cuda.pretend(monkeypatch)
    engine = beside(pair, parts=pretended_cuda.BESIDE)
    numbers = [engine.add(prompt, drafter="model", **OWN) for prompt in PROMPTS[:3]]
    for _ in range(4):
        engine.step()
    engine.sleep()
    engine.wake()
    for _ in range(4):
        engine.step()
    engine.update_weights(random_sdar(7).model.state_dict(), draft=which == "draft")
    before = [engine.result(number).tokens for number in numbers]
    assert any(before)
    results = finished(engine)
    monkeypatch.undo()
    fresh = random_sdar(7 if which == "target" else 0)
    for number, prompt, tokens in zip(numbers, PROMPTS, before, strict=False):
        own = OWN | {"max_new_tokens": 24 - len(tokens)}
        (rest,) = simsd.generate(fresh, [prompt + tokens], verify="none", **own)
        assert results[number].tokens == tokens + rest.tokens


def test_nothing_works_between_iterations_where_they_are_not_captured(target, draft):
    ended = []

    def noted(*arguments):
        by_model(*arguments)
        ended.append(True)

    engine = simsd.Engine(target, draft, draft_device="cpu", parts=Parts(proposer=noted))
    engine.add(PROMPTS[0], drafter="model", **OWN)
    for iteration in range(5):
        engine.step()
        assert len(ended) == iteration + 1


WRONG = [
    ("gpu9", "^draft_device: .*gpu9"),
    ("cuda:0", "^draft_device cuda:0 is not of the kind of cpu, where target .* is: both on the CPU or both on GPUs$"),
    ("meta", "^draft_device meta is not of the kind of cpu"),
    (3, '^draft_device must be the name of a device, "cuda:1" say, or None, got 3$'),
    ("", "^draft_device must be the name of a device"),
]


@pytest.mark.parametrize(("device", "message"), WRONG, ids=str)
def test_a_device_that_does_not_do_is_refused_in_one_line(target, draft, device, message):
    with pytest.raises(SimsdError, match=message) as error:
        simsd.Engine(target, draft, draft_device=device)
    assert "\n" not in str(error.value)


def test_a_draft_that_is_named_is_loaded_there(tiny):
    engine = simsd.Engine(tiny[0], "tiny-draft", draft_device="cpu")
    assert engine.draft.device == torch.device("cpu") == draft_device(tiny[0], engine.config)


def test_a_target_alone_needs_no_worker(tiny, jobs):
    threads = threading.active_count()
    check(serve(beside(tiny[:1]), jobs), jobs)
    assert threading.active_count() == threads


def test_generate_takes_the_setting(tiny):
    prompts = ["Compute 3 + 4.", "Compute 5 + 1."]
    ours = simsd.generate(tiny[0], prompts, tiny[1], draft_device="cpu")
    assert [r.tokens for r in ours] == [r.tokens for r in simsd.generate(tiny[0], prompts, verify="none")]
