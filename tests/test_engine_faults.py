"""Errors in iterations: requests go on from what they have, and those whose own they are end as failed."""

from __future__ import annotations

import itertools

import pytest
import torch

import pretended_cuda
import simsd
from replays import PROMPTS
from simsd import OutOfMemoryError, SimsdError
from simsd.decode import draft as drafting
from simsd.decode import iteration, temporal
from simsd.decode.exchange import Report
from simsd.decode.iteration import Parts, run_plan
from simsd.decode.slots import Slots
from simsd.engine import batch, pages
from simsd.engine.loop import Loop
from simsd.engine.pages import page_bytes
from simsd.engine.request import MAX_FAILURES, NOT_FINITE, Request
from simsd.engine.runner import Runner
from simsd.engine.scheduler import Scheduler
from simsd.models.block_table import BlockTable
from small_tokenizers import for_stand_ins
from stand_ins import random_sdar

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = [[(7 * i + n) % 60 for i in range(150)] for n in range(2)]  # longer than prefill_rows: in chunks
MIXED = [(prompt, {"verify": "exact", "drafter": "model"}) for prompt in (*PROMPTS[:2], LONG[0])]
MIXED += [(prompt, {"verify": "exact", "drafter": "self"}) for prompt in PROMPTS[2:]]
MIXED += [(prompt, {"verify": "temporal"}) for prompt in (PROMPTS[3], LONG[1])]
PLACES = {
    "open": (Slots, "open"),
    "close": (Slots, "close"),
    "pages": (BlockTable, "set"),
    "preempt": (Scheduler, "put_back_last"),
    "prefill": (batch, "prefill"),
    "propose": (drafting, "by_model"),
    "propose-itself": (drafting, "from_last_logits"),
    "plan": (iteration, "plan_states"),
    "forward": (drafting, "run_plan"),
    "walk": (iteration, "walk_states"),
    "advance": (iteration, "advance"),
    "judge": (temporal, "judge"),
    "run": (Runner, "run"),
    "report": (Report, "read"),
    "learn": (Request, "learn"),
    "commit": (Request, "commit"),
    "deliver": (Loop, "_update"),
}


def made(target, draft, parts: Parts | None = None, **config) -> simsd.Engine:
    """Room for 14 pages: less than three requests of which one is long can use."""
    each = sum(page_bytes(model, 16) for model in (target, draft) if model is not None)
    config = {"max_batch": 3, "max_length": 256, "prefill_rows": 64, "max_rows": 32, "page_size": 16} | config
    return simsd.Engine(target, draft, **{"kv_memory": 14 * each} | config, parts=parts or Parts())


def added(engine: simsd.Engine, jobs, new: int = 12) -> list[int]:
    return [engine.add(prompt, max_new_tokens=new, end_token_ids=(), **own) for prompt, own in jobs]


def served(engine: simsd.Engine, most_errors: int = 1000) -> tuple[dict[int, simsd.Result], list[Exception]]:
    """As a server would: on and on, whatever is raised. No page is lost."""
    results, errors, idle = {}, [], False
    while engine.busy or not idle:
        try:
            idle = not engine.busy  # one step more frees what was still on its way
            results |= {u.index: u.result for u in engine.step() if u.result is not None}
        except Exception as error:
            errors.append(error)
            assert len(errors) <= most_errors
    metrics = engine.metrics()
    assert metrics.free_pages == metrics.pages and (metrics.waiting, metrics.running) == (0, 0)
    return results, errors


@pytest.fixture(scope="module")
def alone(target, draft) -> list[simsd.Result]:
    config = {"max_new_tokens": 28, "end_token_ids": (), "prefill_rows": 64, "max_rows": 32, "lookahead": 1}
    return [simsd.generate(target, [prompt], draft, **config, **own)[0] for prompt, own in MIXED]


def failing_at(calls: set[int] | range, function, behind: bool, error: type[Exception] = RuntimeError):
    """The function, which raises at these calls of it: before or behind its work."""
    count = itertools.count()

    def call(*given, **named):
        fails = next(count) in calls
        if fails and not behind:
            raise error("injected")
        result = function(*given, **named)
        if fails:
            raise error("injected")
        return result

    return call


@pytest.mark.parametrize("static", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("place", PLACES)
def test_an_error_in_any_part_of_an_iteration_loses_and_changes_nothing(
    target, draft, alone, monkeypatch, place, behind, static
):
    if static:
        pretended_cuda.pretend(monkeypatch)
    owner, name = PLACES[place]
    failing = failing_at(range(place != "preempt", 1000, 7), getattr(owner, name), behind)
    parts = {"packed": False} if static else {}
    if (owner, name) == (drafting, "run_plan"):
        parts["forward"] = failing
    elif (owner, name) == (drafting, "by_model"):
        parts["proposer"] = failing
    elif (owner, name) == (temporal, "judge"):
        monkeypatch.setattr(iteration, "judge", failing)
    else:
        monkeypatch.setattr(owner, name, failing)
    engine = made(target, draft, Parts(**parts), lookahead=1)
    numbers = added(engine, MIXED, new=28)
    results, errors = served(engine)
    assert errors and {str(error) for error in errors} == {"injected"}
    assert sorted(results) == numbers
    for number, expected in zip(numbers, alone, strict=True):
        result = results[number]
        assert (result.tokens, result.step_map, result.probs) == (expected.tokens, expected.step_map, expected.probs)
        assert (result.finish_reason, result.error) == (expected.finish_reason, None)
    metrics = engine.metrics()
    assert metrics.failed_iterations == len(errors) and metrics.last_error == "injected"
    assert static or place == "preempt" or metrics.preemptions > 0
    assert (engine.loop.batch.slots.start < 0).all()  # one that is open yet would write to pages of others


def test_updates_of_an_iteration_that_raised_come_with_the_next_call(target, draft):
    """The temporal group raises on and on; the others' updates are not held up until it has failed."""
    engine = made(target, draft, Parts(drafter=failing_at(range(1000), temporal.draft_blocks, False)))
    exact, judged = added(engine, [(PROMPTS[0], {"drafter": "self"}), (PROMPTS[1], {"verify": "temporal"})])
    seen = []
    for _ in range(2 * MAX_FAILURES):
        try:
            seen += engine.step()
        except RuntimeError:
            seen.append(None)
    assert [update is None or update.index == exact for update in seen[:4]] == [True] * 4
    assert seen[0] is None and seen[1].index == exact
    results, _ = served(engine)
    failed = results.get(judged) or next(u.result for u in seen if u is not None and u.index == judged)
    assert (failed.finish_reason, failed.error, failed.tokens) == ("failed", "injected", [])


def test_a_request_that_makes_every_iteration_raise_fails_alone(target, draft):
    poison = 59

    def forward(model, plan, slots, shape):
        if bool(((slots.text[:, 0] == poison) & (plan.block[:, 0] >= 0)).any()):
            raise RuntimeError("poisoned")
        return run_plan(model, plan, slots, shape)

    jobs = [(prompt, {"drafter": "self"}) for prompt in PROMPTS]
    engine = made(target, draft, Parts(forward=forward), max_batch=4)
    numbers = added(engine, [*jobs[:2], ([poison, 4], {"drafter": "self"}), *jobs[2:]])
    results, errors = served(engine)
    assert len(errors) == MAX_FAILURES
    failed = results.pop(numbers[2])
    assert (failed.finish_reason, failed.error, failed.tokens) == ("failed", "poisoned", [])
    native = simsd.generate(target, PROMPTS, max_new_tokens=12, end_token_ids=(), verify="none")
    assert [results[number].tokens for number in numbers if number != numbers[2]] == [r.tokens for r in native]


@pytest.mark.parametrize("calls", [(), ("open", "close", "pages")], ids=["forwards", "everything"])
def test_a_device_that_answers_no_more_ends_every_request_with_what_it_has(target, draft, monkeypatch, calls):
    """A server that goes on and on is not kept busy by it."""
    lost = []

    def unless_lost(function):
        def call(*given):
            if lost:
                raise RuntimeError("injected")
            return function(*given)

        return call

    for call in calls:
        where, name = PLACES[call]
        monkeypatch.setattr(where, name, unless_lost(getattr(where, name)))
    count = itertools.count()

    def forward(*given):
        if next(count) >= 6:
            lost.append(True)
            raise RuntimeError("injected")
        return run_plan(*given)

    engine = made(target, draft, Parts(forward=forward), max_batch=2)
    numbers = added(engine, [(prompt, {"drafter": "self"}) for prompt in PROMPTS])
    results, errors = served(engine)
    assert len(errors) <= MAX_FAILURES * len(PROMPTS)
    assert {results[number].finish_reason for number in numbers} == {"failed"}
    assert {results[number].error for number in numbers} == {"injected"}
    lost.clear()
    native = simsd.generate(target, PROMPTS, max_new_tokens=12, end_token_ids=(), verify="none")
    for number, expected in zip(numbers, native, strict=True):
        kept = results[number].tokens
        assert kept == expected.tokens[: len(kept)]
    assert any(result.tokens for result in results.values())
    assert engine.metrics().finished == {"failed": len(numbers)}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried 1 byte"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "cublas", "python"],
)
def test_where_memory_does_not_suffice_the_error_names_the_settings_to_lower(target, draft, error):
    calls = itertools.count()

    def forward(*given):
        if next(calls) == 1:
            raise error
        return run_plan(*given)

    engine = made(target, draft, Parts(forward=forward))
    numbers = added(engine, [(prompt, {"drafter": "self"}) for prompt in PROMPTS])
    results, [raised] = served(engine)
    assert isinstance(raised, OutOfMemoryError) and isinstance(raised, SimsdError) and isinstance(raised, MemoryError)
    settings = r"lower max_batch \(3\), max_rows \(32\), prefill_rows \(64\), max_length \(256\) or kv_memory \(\d+\)"
    assert raised.__cause__ is error
    with pytest.raises(OutOfMemoryError, match=settings):
        raise raised
    native = simsd.generate(target, PROMPTS, max_new_tokens=12, end_token_ids=(), verify="none")
    assert [results[number].tokens for number in numbers] == [result.tokens for result in native]


def test_memory_that_ran_out_in_a_capture_is_named_though_ending_it_raises_too(target):
    def forward(*given):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    engine = made(target, None, Parts(forward=forward))
    added(engine, [(PROMPTS[0], {})])
    with pytest.raises(OutOfMemoryError, match="CUDA out of memory"):
        engine.step()


def test_an_error_that_the_caller_handles_is_not_taken_for_the_next_one_s_cause(target):
    errors = iter([torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("something else")])

    def forward(*_):
        raise next(errors)

    engine = made(target, None, Parts(forward=forward))
    added(engine, [(PROMPTS[0], {})])
    try:
        engine.step()
    except OutOfMemoryError:
        with pytest.raises(RuntimeError, match="something else") as raised:
            engine.step()
    assert not isinstance(raised.value, SimsdError)


def test_keys_and_values_that_do_not_fit_are_told_of_and_the_engine_can_be_tried_again(target, monkeypatch):
    runner = pages.ModelRunner
    monkeypatch.setattr(
        pages,
        "ModelRunner",
        failing_at({0}, runner, False, error=lambda _: torch.OutOfMemoryError("CUDA out of memory")),
    )
    engine = made(target, None)
    [number] = added(engine, [(PROMPTS[0], {})])
    with pytest.raises(OutOfMemoryError, match=r"max_length \(256\)"):
        engine.step()
    results, errors = served(engine)
    native = simsd.generate(target, PROMPTS[:1], max_new_tokens=12, end_token_ids=(), verify="none")
    assert errors == [] and results[number].tokens == native[0].tokens


def test_a_request_that_cannot_be_let_in_does_not_bar_the_others(target, monkeypatch):
    native = simsd.generate(target, PROMPTS[:3], max_new_tokens=12, end_token_ids=(), verify="none")
    settings = Request.slot_settings

    def refused(request, *given):
        if request.index == 1:
            raise OverflowError("too large")
        return settings(request, *given)

    monkeypatch.setattr(Request, "slot_settings", refused)
    engine = made(target, None, max_batch=1)
    numbers = added(engine, [(prompt, {}) for prompt in PROMPTS[:3]])
    results, errors = served(engine)
    assert len(errors) == MAX_FAILURES and results[numbers[1]].error == "too large"
    assert [results[numbers[n]].tokens for n in (0, 2)] == [native[n].tokens for n in (0, 2)]


@pytest.mark.parametrize("call", [0, 2, 5])
def test_a_text_that_cannot_be_decoded_fails_alone_and_at_once(draft, call):
    target = simsd.load(random_sdar(0).model, tokenizer=for_stand_ins())
    whole = simsd.generate(target, PROMPTS, max_new_tokens=12, end_token_ids=(), verify="none")
    engine = made(target, draft)
    numbers = added(engine, [(prompt, {"stop": ["never there"]}) for prompt in PROMPTS])
    broken = engine.loop.requests[numbers[1]].answer._growing
    broken.tokenizer = type("Broken", (), {"backend": target.tokenizer.backend, "decode": None})()
    broken.tokenizer.decode = failing_at(range(call, 10**6), target.tokenizer.decode, False, ValueError)
    texts, tokens, results = {}, {}, {}
    for update in engine.stream():
        texts[update.index] = texts.get(update.index, "") + update.text
        tokens[update.index] = tokens.get(update.index, []) + update.tokens
        if update.result is not None:
            results[update.index] = update.result
    failed = results[numbers[1]]
    assert (failed.finish_reason, failed.error) == ("failed", "the text cannot be decoded: injected")
    assert tokens[numbers[1]] == failed.tokens == whole[1].tokens[: len(failed.tokens)] != []
    assert texts[numbers[1]] == failed.text and whole[1].text.startswith(failed.text)
    for n in (0, 2, 3, 4):
        assert results[numbers[n]].text == texts[numbers[n]] == whole[n].text
    assert engine.metrics().failed_iterations == 0


def test_a_request_whose_logits_are_not_finite_says_so(draft):
    target = random_sdar(0)
    with torch.no_grad():
        target.model.model.embed_tokens.weight[50] = float("nan")
    result = simsd.generate(target, [[1, 50, 2]], draft, max_new_tokens=4)[0]
    assert (result.finish_reason, result.error) == ("failed", NOT_FINITE)
    assert simsd.Result.from_dict(result.to_dict()) == result


def test_a_callback_that_raises_between_updates_loses_none(target, draft):
    engine = made(target, draft)
    numbers = added(engine, [(prompt, {"drafter": "self"}) for prompt in PROMPTS])
    tokens, results = {number: [] for number in numbers}, {}
    while engine.busy or len(results) < len(numbers):
        try:
            for n, update in enumerate(engine.stream()):
                tokens[update.index] += update.tokens
                if update.result is not None:
                    results[update.index] = update.result
                if n % 3 == 2:
                    raise ValueError("the caller's")
        except ValueError:
            continue
    native = simsd.generate(target, PROMPTS, max_new_tokens=12, end_token_ids=(), verify="none")
    assert [tokens[number] for number in numbers] == [result.tokens for result in native]


def test_a_call_that_raises_leaves_none_of_its_requests_behind(target, draft):
    engine = made(target, draft, Parts(forward=failing_at({2}, run_plan, False)))
    waiting = engine.add(PROMPTS[0], max_new_tokens=40, drafter="self", end_token_ids=())
    with pytest.raises(RuntimeError, match="injected"):
        engine.generate(PROMPTS[1:], max_new_tokens=12, drafter="self")
    results, errors = served(engine)
    assert errors == [] and results.pop(waiting).finish_reason == "length"
    assert {result.finish_reason for result in results.values()} == {"cancelled"} and len(results) == 4
    again = engine.generate(PROMPTS[1:], max_new_tokens=12, drafter="self", end_token_ids=())
    native = simsd.generate(target, PROMPTS[1:], max_new_tokens=12, end_token_ids=(), verify="none")
    assert [result.tokens for result in again] == [result.tokens for result in native]
