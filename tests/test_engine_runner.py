"""The runner: eagerly where rows are packed; where shapes are static as on CUDA, its reports one iteration late."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import pretended_cuda
import simsd
from recorded import Batch, fill, request
from replays import PROMPTS
from serving import check, serve, temporal_jobs
from simsd.decode.exchange import MODEL_DRAFT, NO_DRAFT
from simsd.decode.iteration import PARTS, Parts, Shape
from simsd.engine.pages import page_bytes
from simsd.engine.runner import MAX_SHAPES, Runner
from stand_ins import disturbed, random_sdar

pytestmark = pytest.mark.usefixtures("one_thread")

STATIC = Parts(packed=False)


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    pretended_cuda.pretend(monkeypatch)


def engine(tiny, parts: Parts = STATIC, max_rows: int | None = 64) -> simsd.Engine:
    return simsd.Engine(*tiny, max_batch=4, max_length=128, max_rows=max_rows, parts=parts)


@pytest.mark.parametrize("drafter", ["model", "self", "auto"])
def test_texts_are_native_decodings_whoever_joins_and_leaves(tiny, jobs, drafter):
    cancels = (1, 3, 6)
    results = serve(engine(tiny), jobs, cancels, drafter=drafter)
    check(results, jobs, cancels)
    assert any(result.finish_reason == "cancelled" for result in results.values())
    if drafter != "auto":
        assert sum(result.stats.accepted for result in results.values()) > 0


def test_a_target_without_a_draft_model_drafts_for_itself(tiny, jobs):
    results = serve(simsd.Engine(tiny[0], max_batch=4, max_length=128, max_rows=64, parts=STATIC), jobs)
    check(results, jobs)
    assert sum(result.stats.accepted for result in results.values()) > 0


def test_temporal_texts_do_not_depend_on_the_batch(tiny, jobs):
    temporal = temporal_jobs(tiny, jobs)
    check(serve(engine(tiny), temporal), temporal)


def test_exact_requests_of_different_shapes_do_not_read_each_others_logits(tiny, jobs):
    """They take turns, and each turn leaves logits for a draft by the target itself."""
    kinds = [{"drafter": "self"}, {"drafter": "self", "draft_steps": 2}, {"draft_steps": 3}]
    mixed = [(prompt, own | kinds[n % 3], alone) for n, (prompt, own, alone) in enumerate(jobs)]
    for parts in (PARTS, STATIC):
        check(serve(engine(tiny, parts), mixed), mixed)


def test_what_a_captured_iteration_reads_stays_where_it_is(tiny, jobs, monkeypatch):
    """Also when later iterations are larger."""
    made, init = [], Runner.__init__

    def noted(runner, *arguments):
        init(runner, *arguments)
        made.append(runner)

    monkeypatch.setattr(Runner, "__init__", noted)
    served = engine(tiny, max_rows=None)  # as many as there are requests for

    def tensors() -> dict[str, torch.Tensor]:
        (runner,) = made
        holders = {"slots": runner.slots.real, "target": runner.target, "draft": runner.draft}
        found = {f"{holder}.{name}": x for holder, them in holders.items() for name, x in vars(them).items()}
        return {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}

    serve(served, jobs[:1], drafter="self")
    first = tensors()
    serve(served, jobs[1:6], drafter="self")
    now = tensors()
    moved = [name for name, x in first.items() if now[name].data_ptr() != x.data_ptr()]
    assert "target.last_logits" in first and not moved


def test_all_kinds_of_requests_share_an_engine(tiny, jobs):
    mixed = [
        (prompt, own | kind, alone)
        for (prompt, own, alone), kind in zip(
            jobs,
            [{"drafter": "self"}, {"verify": "none"}, {"draft_steps": 2, "drafter": "model"}] * 4,
            strict=False,
        )
    ]
    mixed += temporal_jobs(tiny, jobs, count=3)
    check(serve(engine(tiny), mixed), mixed)


def test_memory_runs_out_while_an_iteration_is_on_its_way(tiny, jobs):
    """Its reports come before anybody makes room, and the texts stay as they are."""
    each = sum(page_bytes(model, 16) for model in tiny)
    crowded = simsd.Engine(
        *tiny, max_batch=4, max_length=128, max_rows=64, page_size=16, kv_memory=9 * each, parts=STATIC
    )
    check(serve(crowded, jobs, drafter="model"), jobs)
    crowded.step()
    assert crowded.metrics().free_pages == 9


NATIVE = Shape(states=1, logits_rows=3 * 4)
DRAFTED = Shape(lookahead=2, states=4, logits_rows=3 * 4 * 4, draft_blocks=2)


def runner_of(parts: Parts) -> Runner:
    """Three slots, of which the middle one is free; as an engine makes it."""
    models = random_sdar(0), disturbed(random_sdar(0))
    batch = Batch(*models, [NATIVE, DRAFTED], 3, 64, parts.packed is not False)
    for slot in (0, 2):
        batch.open(slot, slot + 5, request(slot, models[0], PROMPTS[slot], max_new_tokens=24, end_token_ids=()))
        fill(batch, DRAFTED)
    slots = pretended_cuda.SlotsOnCuda(batch.slots) if parts.packed is False else batch.slots
    return Runner(slots, batch.target, batch.draft, parts)


def columns(depth: int) -> dict[str, list]:
    given = {"runs": 1, "mode": MODEL_DRAFT if depth else NO_DRAFT, "depth": depth, "peeks": 0, "head": 0}
    given |= {"calibration": 1.0, "min_visit_prob": 0.0, "row_budget": 36}
    return {name: [value] * 3 for name, value in given.items()}


def test_where_rows_are_packed_an_iteration_is_told_of_at_once():
    runner = runner_of(PARTS)
    [first] = runner.run(columns(0), NATIVE, "first")
    [second] = runner.run(columns(2), DRAFTED, "second")
    assert (first.note, second.note) == ("first", "second")
    for outcome in (first, second):
        assert [(slot, report.epoch) for slot, report in outcome.reports] == [(0, 5), (2, 7)]
        assert outcome.target_seconds > 0 and outcome.draft_seconds > 0
    assert [report.taken for _, report in first.reports] == [1, 1]
    assert [report.draft_forwards for _, report in second.reports] == [2, 2]
    # The current blocks of two slots, and what waits: the second's prompt is six tokens long.
    assert first.target_rows == 2 * 4 + 4 and first.draft_rows == 0
    assert second.draft_rows > 0 and second.target_rows > first.target_rows
    assert runner.flush() == [] and runner.captured == {}
    runner.forget()


def test_on_cuda_an_iteration_is_told_of_with_the_next_one_or_when_it_is_asked_for():
    runner, eager = runner_of(STATIC), runner_of(PARTS)
    asked = [(0, NATIVE), (2, DRAFTED), (0, NATIVE), (2, DRAFTED), (2, DRAFTED)]
    expected = [eager.run(columns(depth), shape, n)[0] for n, (depth, shape) in enumerate(asked)]
    told = [runner.run(columns(depth), shape, n) for n, (depth, shape) in enumerate(asked)]
    told.append(runner.flush())
    assert told.pop(0) == [] and runner.flush() == []
    assert [[outcome.note] for outcome in expected] == [[outcome.note for outcome in one] for one in told]
    for [outcome], eagerly in zip(told, expected, strict=True):
        assert outcome.reports == eagerly.reports
        assert outcome.target_rows >= eagerly.target_rows and outcome.draft_rows >= eagerly.draft_rows


def test_what_is_forgotten_is_not_told_later():
    runner = runner_of(STATIC)
    assert runner.run(columns(0), NATIVE, "lost") == []
    runner.forget()
    assert runner.run(columns(0), NATIVE, "kept") == []
    assert [outcome.note for outcome in runner.flush()] == ["kept"]


def test_a_shape_is_captured_once_and_rows_are_its_own():
    runner = runner_of(STATIC)
    outcomes = []
    for depth, shape in [(0, NATIVE), (2, DRAFTED), (0, NATIVE), (2, DRAFTED)]:
        outcomes += runner.run(columns(depth), shape)
    outcomes += runner.flush()
    assert list(runner.captured) == [NATIVE, DRAFTED]
    # Of each of three slots: a pending block, two drafted ones where there are any, and the states.
    rows = [3 * (1 + 1) * 4, 3 * (1 + 2 + 4) * 4]
    assert [outcome.target_rows for outcome in outcomes] == rows * 2
    assert [outcome.draft_rows for outcome in outcomes][1::2] == [3 * (2 + 1) * 4] * 2


def test_a_capture_changes_no_slot():
    """It runs the iteration without anybody."""
    runner, eager = runner_of(STATIC), runner_of(PARTS)
    runner.run(columns(0) | {"runs": [0] * 3}, DRAFTED)
    runner.run(columns(0), NATIVE)
    [expected] = eager.run(columns(0), NATIVE)
    assert runner.flush()[0].reports == expected.reports


def test_of_many_shapes_the_one_unused_for_longest_is_given_up():
    runner = runner_of(STATIC)
    shapes = [dataclasses.replace(NATIVE, allowed_ids=(n,)) for n in range(MAX_SHAPES + 1)]
    vocabulary = runner.target.model.vocab_size
    for n, shape in enumerate(shapes):
        runner.slots.real.ban((), vocabulary, allowed=(n,))
        runner.run(columns(0) | {"runs": [0] * 3}, shapes[0])
        runner.run(columns(0) | {"runs": [0] * 3}, shape)
    assert set(runner.captured) == set(shapes) - {shapes[1]}
    assert len(runner.run(columns(0), shapes[1])) == 1  # and can come again


def test_new_weights_are_read_by_the_next_iteration():
    """A graph would read the old ones."""
    runner, eager = runner_of(STATIC), runner_of(PARTS)
    runner.run(columns(0), NATIVE)
    eager.run(columns(0), NATIVE)
    runner.flush()
    for one in (runner, eager):
        head = one.target.model.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().flip(0), requires_grad=False)
    [expected] = eager.run(columns(0), NATIVE)
    runner.run(columns(0), NATIVE)
    assert runner.flush()[0].reports == expected.reports
    assert list(runner.captured) == [NATIVE]
