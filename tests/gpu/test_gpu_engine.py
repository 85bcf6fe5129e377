"""The engine on a GPU: iterations are captured once per shape and replayed; texts are native decoding's there."""

from __future__ import annotations

import contextlib

import pytest
import torch

import simsd
from backends import DEVICE, needs_gpu
from serving import check, serve, temporal_jobs, varied_jobs
from simsd.engine.runner import MAX_SHAPES, Runner


@pytest.fixture(scope="module")
def pair():
    return [simsd.load(name, device=DEVICE, deterministic=True) for name in ("tiny-target", "tiny-draft")]


@pytest.fixture(scope="module")
def jobs(pair):
    return varied_jobs(pair[0])


@pytest.mark.parametrize("drafter", ["model", "self", "auto"])
def test_texts_are_native_decodings_whoever_joins_and_leaves(pair, jobs, drafter):
    cancels = (1, 3, 6)
    results = serve(simsd.Engine(*pair, max_batch=4, max_length=256), jobs, cancels, drafter=drafter)
    check(results, jobs, cancels)
    if drafter != "auto":
        assert sum(result.stats.accepted for result in results.values()) > 0


def test_temporal_texts_do_not_depend_on_the_batch(pair, jobs):
    temporal = temporal_jobs(pair, jobs)
    check(serve(simsd.Engine(*pair, max_batch=4, max_length=256), temporal), temporal)


def test_the_most_probable_ids_are_native_decodings_in_replays(pair, jobs):
    results = serve(simsd.Engine(*pair, max_batch=4, max_length=256, top_logprobs=5), jobs, drafter="model")
    check(results, jobs)
    for job, (prompt, own, _) in enumerate(jobs):
        (alone,) = simsd.generate(pair[0], [prompt], None, verify="none", max_batch=1, top_logprobs=5, **own)
        assert results[job].top_logprobs == alone.top_logprobs


@pytest.mark.parametrize("drafter", ["model", "auto"])
def test_texts_do_not_depend_on_a_draft_with_a_stream_of_its_own(pair, jobs, drafter):
    cancels = (1, 3, 6)
    engine = simsd.Engine(*pair, max_batch=4, max_length=256, draft_device=str(DEVICE))
    results = serve(engine, jobs, cancels, drafter=drafter)
    check(results, jobs, cancels)
    assert sum(result.stats.accepted for result in results.values()) > 0
    mixed = [job for both in zip(temporal_jobs(pair, jobs), jobs, strict=False) for job in both]
    check(serve(engine, mixed), mixed)


@needs_gpu
def test_texts_do_not_depend_on_a_draft_on_another_gpu(pair, jobs):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    engine = simsd.Engine(pair[0], "tiny-draft", max_batch=4, max_length=256, draft_device="cuda:1")
    results = serve(engine, jobs, drafter="model")
    check(results, jobs)
    assert sum(result.stats.accepted for result in results.values()) > 0
    temporal = temporal_jobs(pair, jobs)
    check(serve(engine, temporal), temporal)


@contextlib.contextmanager
def host_must_not_wait():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@needs_gpu
@pytest.mark.parametrize("beside", [False, True], ids=["in turn", "beside"])
@pytest.mark.parametrize("drafter", ["model", "self"])
def test_replays_wait_for_nothing(pair, jobs, drafter, beside, monkeypatch):
    """From an iteration's commands to the report of the one before, where its shape is captured."""
    run, replays = Runner.run, []

    def watched(runner, columns, shape, note=None):
        if shape not in runner.captured:
            return run(runner, columns, shape, note)
        replays.append(shape)
        with host_must_not_wait():
            return run(runner, columns, shape, note)

    monkeypatch.setattr(Runner, "run", watched)
    engine = simsd.Engine(*pair, max_batch=4, max_length=256, draft_device=str(DEVICE) if beside else None)
    check(serve(engine, jobs, drafter=drafter), jobs)
    assert len(replays) > 3 * len(set(replays)) > 0


@needs_gpu
def test_memory_does_not_grow_once_shapes_are_captured(pair, jobs, monkeypatch):
    runners, init = [], Runner.__init__

    def noted(runner, *arguments):
        runners.append(runner)
        init(runner, *arguments)

    monkeypatch.setattr(Runner, "__init__", noted)
    engine = simsd.Engine(*pair, max_batch=4, max_length=256)
    serve(engine, jobs, drafter="model")
    (runner,) = runners
    captured, before = dict(runner.captured), torch.cuda.memory_allocated(DEVICE)
    serve(engine, jobs, drafter="model")
    assert 0 < len(captured) <= MAX_SHAPES and set(runner.captured) >= set(captured)
    if set(runner.captured) == set(captured):
        assert torch.cuda.memory_allocated(DEVICE) <= before + 2**20
    assert all(seconds > 0 and mebibytes >= 0 for seconds, mebibytes in captured.values())


@needs_gpu
def test_an_engine_may_run_on_a_stream_of_its_own(pair, jobs):
    """Meanwhile the default stream has work, too."""
    other = torch.randn(2048, 2048, device=DEVICE)
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
        engine = simsd.Engine(*pair, max_batch=4, max_length=256)
        for prompt, settings, _ in jobs[:4]:
            engine.add(prompt, drafter="model", **settings)
        results = {}
        for update in engine.stream():
            with torch.cuda.stream(torch.cuda.default_stream(DEVICE)):
                other = (other @ other).clamp(-1, 1)
            if update.result is not None:
                results[update.index] = update.result
    assert len(results) == 4
    check(results, jobs)
