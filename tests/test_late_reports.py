"""The engine where shapes are static and reports come one iteration late, as on CUDA; here on the CPU."""

from __future__ import annotations

import pytest
import torch

import simsd
from serving import check, serve, temporal_jobs, varied_jobs
from simsd.decode.iteration import PARTS, Parts
from simsd.decode.slots import Slots
from simsd.engine.runner import Runner

STATIC = Parts(packed=False)


@pytest.fixture(scope="module")
def pair():
    return [simsd.load(name) for name in ("tiny-target", "tiny-draft")]


@pytest.fixture(scope="module")
def jobs(pair):
    return varied_jobs(pair[0], per_family=3)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def late(monkeypatch):
    """Iterations run at once, and what they did is told with the next one."""
    run, held = Runner.run, {}

    def run_late(runner, columns, shape, note=None):
        if not runner.static:
            return run(runner, columns, shape, note)
        told = held.pop(runner, [])
        held[runner] = run(runner, columns, shape, note)
        return told

    monkeypatch.setattr(Runner, "run", run_late)
    monkeypatch.setattr(Runner, "flush", lambda runner: held.pop(runner, []))
    monkeypatch.setattr(Runner, "forget", lambda runner: held.pop(runner, None))


def engine(pair, parts: Parts = STATIC, max_rows: int | None = 64) -> simsd.Engine:
    return simsd.Engine(*pair, max_batch=4, max_length=128, max_rows=max_rows, parts=parts)


@pytest.mark.parametrize("drafter", ["model", "self", "auto"])
def test_texts_are_native_decodings_whoever_joins_and_leaves(pair, jobs, drafter):
    cancels = (1, 3, 6)
    results = serve(engine(pair), jobs, cancels, drafter=drafter)
    check(results, jobs, cancels)
    assert any(result.finish_reason == "cancelled" for result in results.values())
    if drafter != "auto":
        assert sum(result.stats.accepted for result in results.values()) > 0


def test_temporal_texts_do_not_depend_on_the_batch(pair, jobs):
    temporal = temporal_jobs(pair, jobs)
    check(serve(engine(pair), temporal), temporal)


def test_exact_requests_of_different_shapes_do_not_read_each_others_logits(pair, jobs):
    """They take turns, and each turn leaves logits for a draft by the target itself."""
    kinds = [{"drafter": "self"}, {"drafter": "self", "draft_steps": 2}, {"draft_steps": 3}]
    mixed = [(prompt, own | kinds[n % 3], alone) for n, (prompt, own, alone) in enumerate(jobs)]
    for parts in (PARTS, STATIC):
        check(serve(engine(pair, parts), mixed), mixed)


def test_what_a_captured_iteration_reads_stays_where_it_is(pair, jobs, monkeypatch):
    """Also when later iterations are larger."""
    made, init = [], Runner.__init__

    def noted(runner, *arguments):
        init(runner, *arguments)
        made.append(runner)

    monkeypatch.setattr(Runner, "__init__", noted)
    served = engine(pair, max_rows=None)  # as many as there are requests for

    def tensors() -> dict[str, torch.Tensor]:
        (runner,) = made
        holders = {"slots": runner.slots, "target": runner.target, "draft": runner.draft}
        found = {f"{holder}.{name}": x for holder, them in holders.items() for name, x in vars(them).items()}
        return {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}

    serve(served, jobs[:1], drafter="self")
    first = tensors()
    serve(served, jobs[1:6], drafter="self")
    now = tensors()
    moved = [name for name, x in first.items() if now[name].data_ptr() != x.data_ptr()]
    assert "target.last_logits" in first and not moved


def test_ids_that_a_captured_iteration_bans_stay_where_they_are():
    slots = Slots(1, 4, 16, 1, 2, (5, 6, 7), torch.device("cpu"))
    slots.ban((5, 6, 7), allowed=(6,))
    first = slots.banned((6,))
    slots.ban((5, 6, 7), allowed=(6,))
    assert slots.banned((6,)) is first and first.tolist() == [5, 7]


def test_all_kinds_of_requests_share_an_engine(pair, jobs):
    mixed = [
        (prompt, own | kind, alone)
        for (prompt, own, alone), kind in zip(
            jobs, [{"drafter": "self"}, {"verify": "none"}, {"draft_steps": 2, "drafter": "model"}] * 4, strict=False
        )
    ]
    mixed += temporal_jobs(pair, jobs, count=3)
    check(serve(engine(pair), mixed), mixed)
