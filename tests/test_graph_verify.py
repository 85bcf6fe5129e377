"""The walk through drafted states: exactly the steps that the target would take, one forward each."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import simsd_kernels
from backends import needs_compiled_ops, on_each_backend, unsafe
from simsd_kernels.block_verify import graph_reference
from simsd_kernels.block_verify.graph_api import DENOISED, DRAFTED
from walks import FINISHED, LAST, ORDER, TAKEN, VOCABULARY, arguments, ints, native, replay

STRATEGIES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")
each_backend = on_each_backend("block_verify.graph")
each_other_backend = on_each_backend("block_verify.graph", but="reference")


def walk(made, backend=None):
    return simsd_kernels.block_verify_graph(**made, backend=backend)


def random_case(number):
    """Graphs of noisy versions of the target's own choice: long walks, early ends, idle lanes, partly known blocks."""
    chance = random.Random(number)
    pick = chance.choice
    batch, ahead, length = pick([1, 2, 3]), pick([0, 1, 2, 2, 3, 3, 3]), pick([1, 2, 3, 4, 4, 4, 5, 5])

    def lanes(values, dtype):
        return torch.tensor([pick(values) for _ in range(batch)], dtype=dtype)

    prefixes = [(1 << n) - 1 for n in range(length)]
    given = {
        "strategy": pick(STRATEGIES),
        "threshold": pick([0.2, 0.6, 0.95, 1.0]),
        "start": lanes([0, *[length, 2 * length] * 4, -1], torch.int32),
        "temperature": lanes([0.0, 0.8], torch.float32),
        "seed": lanes([-(2**40), 3, 2**40], torch.int64),
        "depth": lanes([*[ahead] * 5, ahead // 2], torch.int32),
        "known": lanes([0, 0, *prefixes], torch.int64),
        "max_copies": pick([1, 8, *[100] * 8]),
        "dtype": pick([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
        "from_logits": chance.random() < 0.2,
    }
    if chance.random() < 0.3:
        given |= {"top_k": lanes([0, 3], torch.int32), "banned_ids": torch.tensor([1, 7])}
        given |= {"top_p": lanes([1.0, 0.8], torch.float32)}
    steps = pick([length, length, chance.randint(1, length)])
    if chance.random() < 0.15:
        given["schedule"] = ints(0, *[1] * steps)
    made = arguments(batch, ahead, length, steps, number, **given)
    if chance.random() < 0.5 and ahead:
        draft = made["clean"].clone()
        draft.view(-1)[chance.randrange(draft.numel())] = chance.randrange(VOCABULARY)
        made = arguments(batch, ahead, length, steps, number, draft=draft, **given)
    return made | {"again": (number, given)}


CASES = st.integers(0, 2**20).map(random_case)


@each_backend
@given(case=CASES)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_walk_is_the_step_by_step_replay(backend, case):
    made = {name: case[name] for name in ORDER}
    before = {name: value.clone() for name, value in made.items() if torch.is_tensor(value)}
    out = walk(made, backend)
    for name, value, expected in zip(out._fields, out, replay(made, backend), strict=True):
        assert value.tolist() == torch.tensor(expected, dtype=value.dtype).tolist(), name
    assert all(torch.equal(made[name], value) for name, value in before.items())


@each_other_backend
@given(case=CASES)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_same_walk_as_the_reference(backend, case):
    made = {name: case[name] for name in ORDER}
    for name, value, expected in zip(*(walk(made)._fields, walk(made, backend), walk(made, "reference")), strict=True):
        assert value.dtype == expected.dtype
        if name == "prob":
            torch.testing.assert_close(value, expected, rtol=5e-6, atol=5e-6)
        else:
            assert torch.equal(value, expected), name


@given(case=CASES)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_walk_is_where_as_many_forwards_on_the_current_state_alone_would_be(case):
    made, (number, given) = {name: case[name] for name in ORDER}, case["again"]
    out = walk(made)
    forwards = out.progress[:, TAKEN].tolist()
    first, known = made["states"][:, 0], made["revealed"][:, 0]
    for b, count in enumerate(forwards):
        expected = native(made, first, known, number, given["dtype"], count)[b]
        found = list(zip(out.tokens[b].tolist(), out.step_map[b].tolist(), strict=True))
        assert found[: len(expected)] == expected
        assert len(expected) == out.progress[b, FINISHED] + 1


@each_backend
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_full_agreement_walks_over_all_blocks(backend, strategy, temperature):
    made = arguments(ahead=3, strategy=strategy, threshold=0.0, temperature=torch.tensor([temperature]))
    out = walk(made, backend)
    finished, committed, taken, last, _, judged, accepted = out.progress[0].tolist()
    at_once = strategy == "low_confidence_dynamic"  # everything is above a threshold of 0
    assert (finished, committed, taken) == ((4, 3, 4) if at_once else (3, 3, 13))
    assert (judged, accepted, made["block"][0, last].item()) == (12, 12, 3)
    assert torch.equal(out.tokens[0, :3], made["clean"][0])
    assert (out.origin[0, :3] >= DENOISED).all() and (out.origin[0, 1:3] == DRAFTED).all()


@each_backend
def test_first_step_that_the_draft_did_not_foresee_is_the_only_one(backend):
    made = arguments(draft=(arguments()["clean"] + 1) % VOCABULARY)
    out = walk(made, backend)
    assert out.progress.tolist() == [[0, 0, 1, 0, 1, 1, 0]]
    assert int(out.revealed[0]).bit_count() == 1
    assert out.origin[0, 0].tolist().count(DENOISED) == 1 and not (out.origin == DRAFTED).any()
    assert not out.tokens[0, 1:].any() and (out.prob[0, 1:] == 1).all()


@each_backend
def test_block_finished_otherwise_than_drafted_is_not_committed_and_ends_the_walk(backend):
    clean = arguments()["clean"]
    last = walk(arguments(), backend).step_map[0, 0].argmax()
    draft = clean.clone()
    draft[0, 0, last] = (draft[0, 0, last] + 1) % VOCABULARY
    out = walk(arguments(draft=draft), backend)
    assert out.progress[0].tolist() == [1, 0, 4, out.progress[0, LAST], 0, 4, 3]
    assert torch.equal(out.tokens[0, 0], clean[0, 0]) and out.revealed.item() == 0


@each_backend
def test_block_finished_as_drafted_without_its_rows_is_not_committed(backend):
    made = arguments()
    out = walk(made | {"cleaned": ints(0)}, backend)
    assert out.progress[0, :3].tolist() == [1, 0, 4]


@each_backend
def test_idle_lane_keeps_its_state(backend):
    made = arguments(batch=2, start=ints(-1, 8), step=ints(3, 0), known=torch.tensor([5, 0]))
    made["block"][0] = -1
    made["states"][0, 0], made["revealed"][0, 0] = torch.tensor([6, 7, 8, 9]), 5
    made["prob"][0], made["step_map"][0], made["origin"][0] = 0.5, 2, 1
    out = walk(made, backend)
    assert out.progress[0].tolist() == [0, 0, 0, -1, 3, 0, 0] and out.progress[1, TAKEN] > 1
    assert out.revealed[0] == 5 and out.tokens[0, 0].tolist() == [6, 0, 8, 0]
    assert (out.prob[0, 0] == 0.5).all() and (out.step_map[0, 0] == 2).all() and (out.origin[0, 0] == 1).all()


@each_backend
def test_waiting_steps_stay_at_their_copy_and_are_counted(backend):
    made = arguments(ahead=0, schedule=ints(0, 0, 4), max_copies=2)
    assert walk(made, backend).progress.tolist() == [[0, 0, 2, 0, 2, 0, 0]]
    made["step"] += 1
    assert walk(made, backend).progress.tolist() == [[1, 0, 2, 0, 0, 0, 0]]


@each_backend
def test_block_known_in_full_is_finished_by_a_step_without_logits(backend):
    made = arguments(ahead=0, known=torch.tensor([15]))
    out = walk(made | {"target_logits": torch.zeros(0, VOCABULARY)}, backend)
    assert out.progress.tolist() == [[1, 0, 1, 0, 0, 0, 0]] and not out.origin.any()


@each_backend
@pytest.mark.parametrize("row", [-1, 10**6, -(2**31)])
def test_missing_row_matters_only_where_the_walk_comes_by(backend, row):
    made = arguments(draft=(arguments()["clean"] + 1) % VOCABULARY)
    made["rows"][:, 1:] = row
    assert walk(made, backend).progress[0, TAKEN] == 1
    made["rows"][0, 0, 2] = row
    with pytest.raises((ValueError, RuntimeError), match=r"rows must be in \[0, .*\) at masked positions"):
        walk(made, backend)


@each_backend
def test_result_does_not_depend_on_batch_strides_or_threads(backend):
    made = arguments(batch=3, temperature=torch.tensor([0.0, 0.8, 0.8]), start=ints(4, 8, 12))
    whole = walk(made, backend)
    strided = {
        name: torch.stack((value, value), dim=-1)[..., 0] if torch.is_tensor(value) else value
        for name, value in made.items()
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        again = walk(strided, backend)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for b in range(3):
        alone = {
            name: value[b : b + 1] if torch.is_tensor(value) and name not in ("target_logits", "schedule") else value
            for name, value in made.items()
        }
        assert all(torch.equal(x[0], y[b]) for x, y in zip(walk(alone, backend), whole, strict=True))


@each_backend
@pytest.mark.parametrize("batch, copies, length", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty_batches_graphs_and_blocks_are_fine(backend, batch, copies, length):
    made = arguments(batch=2)
    shapes = {
        **dict.fromkeys(("rows", "states"), (batch, copies, length)),
        **dict.fromkeys(("revealed", "block"), (batch, copies)),
        **dict.fromkeys(("cleaned", "depth", "start", "step", "temperature", "seed"), (batch,)),
        **dict.fromkeys(("step_map", "prob", "origin"), (batch, length)),
        "clean": (batch, 1, length),
    }
    out = walk(made | {name: made[name].new_zeros(shape) for name, shape in shapes.items()}, backend)
    assert out.progress.tolist() == [[0, 0, 0, -1, 0, 0, 0]] * batch
    assert out.tokens.shape == out.origin.shape == (batch, 3, length)
    assert [x.dtype for x in out] == [torch.int32, torch.int64, torch.int64, torch.int32, torch.float32, torch.int32]


REFUSED = [
    ("target_logits", torch.zeros(4), ValueError, r"target_logits must be \[N, V\].*got \[4\]"),
    ("target_logits", torch.zeros(4, 0), ValueError, "at least one vocabulary entry"),
    ("target_logits", torch.zeros(4, 9, dtype=torch.int32), TypeError, "target_logits must be .*got torch.int32"),
    ("rows", torch.zeros(1, 64, 4), TypeError, "rows must be torch.int32, got torch.float32"),
    ("rows", torch.zeros(1, 63, 4, dtype=torch.int32), ValueError, r"rows must be \[B, C, L\] = \[1, 64, 4\]"),
    ("states", torch.zeros(1, 64, 65, dtype=torch.int64), ValueError, "L must be at most 64, got 65"),
    ("states", torch.zeros(1, 64, 4, dtype=torch.int32), TypeError, "states must be torch.int64"),
    ("revealed", torch.zeros(1, dtype=torch.int64), ValueError, r"revealed must be \[B, C\]"),
    ("block", torch.zeros(1, 64, dtype=torch.int64), TypeError, "block must be torch.int32"),
    ("block", torch.full((1, 64), 3, dtype=torch.int32), ValueError, r"block must be in \[-1, 2\], got 3"),
    ("clean", torch.zeros(1, 2, 3, dtype=torch.int64), ValueError, r"clean must be \[B, K, L\]"),
    ("cleaned", ints(3), ValueError, r"cleaned must be in \[0, 2\], got 3"),
    ("depth", ints(3), ValueError, r"depth must be in \[0, 2\], got 3"),
    ("depth", ints(0, 0), ValueError, r"depth must be \[B\]"),
    ("start", torch.zeros(1), TypeError, "start must be torch.int32"),
    ("step", ints(4), ValueError, r"step must be in \[0, 3\], got 4"),
    ("step_map", torch.zeros(1, 4), TypeError, "step_map must be torch.int32"),
    ("prob", torch.zeros(1, 3), ValueError, r"prob must be \[B, L\]"),
    ("origin", torch.zeros(1, 4, dtype=torch.int64), TypeError, "origin must be torch.int32"),
    ("temperature", torch.full((1,), math.inf), ValueError, "temperature must be finite and >= 0"),
    ("temperature", 0.0, TypeError, "temperature must be a tensor, got float"),
    ("top_k", ints(-1), ValueError, "top_k must be >= 0"),
    ("top_k", torch.zeros(1), TypeError, "top_k must be torch.int32"),
    ("top_p", torch.full((1,), 1.5), ValueError, r"top_p must be in \[0, 1\]"),
    ("top_p", torch.ones(2), ValueError, r"top_p must be \[B\]"),
    ("seed", None, ValueError, "temperature must be 0 without seed, got 0.5"),
    ("seed", torch.zeros(1, dtype=torch.int32), TypeError, "seed must be torch.int64"),
    ("banned_ids", torch.tensor([VOCABULARY]), ValueError, r"banned_ids must be in \[0, 30\), got 30"),
    ("schedule", torch.zeros(0, dtype=torch.int32), ValueError, "schedule must have at least one step"),
    ("schedule", ints(1, -1), ValueError, "schedule must be >= 0, got -1"),
    ("strategy", "greedy", ValueError, "strategy must be one of .*got 'greedy'"),
    ("threshold", math.nan, ValueError, "threshold must be a number, got nan"),
    ("start", torch.zeros(1, dtype=torch.int32, device="meta"), ValueError, "one device.*start on meta"),
]


def good_arguments():
    half = torch.full((1,), 0.5)
    return arguments(temperature=half, top_k=ints(4), top_p=half * 2, banned_ids=torch.tensor([0]))


@pytest.mark.parametrize("name, value, error, message", REFUSED)
def test_bad_input_is_refused_by_name(name, value, error, message):
    with pytest.raises(error, match=message):
        walk(good_arguments() | {name: value})


@needs_compiled_ops
def test_compiled_op_checks_shapes_and_dtypes_itself():
    good = good_arguments()
    only_values = ("schedule",)  # any length will do
    values = [("seed", None), ("banned_ids", torch.tensor([VOCABULARY])), ("strategy", "greedy")]
    for name, value in [*(x for x in unsafe(REFUSED, good) if x[0] not in only_values), *values]:
        with pytest.raises(RuntimeError, match=r"block_verify.graph: "):
            torch.ops.simsd.block_verify.graph(**{**good, name: value})


@needs_compiled_ops
@pytest.mark.parametrize("name", ["block", "cleaned", "depth", "step", "start", "revealed"])
@pytest.mark.parametrize("value", [-(2**31), -1, 3, 2**31 - 1])
def test_compiled_op_survives_any_number_and_the_definition_agrees(name, value):
    made = good_arguments()
    made[name] = torch.full_like(made[name], value)
    made["target_logits"] = made["target_logits"][:1]
    made["rows"] = torch.zeros_like(made["rows"])
    out = torch.ops.simsd.block_verify.graph(**made)
    expected = graph_reference.block_verify_graph(**made)
    for n, (a, b) in enumerate(zip(out, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=5e-6, atol=5e-6, msg=f"output {n}")


def test_opcheck():
    torch.library.opcheck(torch.ops.simsd.block_verify.graph, (), good_arguments())
    torch.library.opcheck(torch.ops.simsd.block_verify.graph, (), arguments(batch=2, max_copies=5))


@each_backend
def test_compiles_into_a_larger_graph(backend):
    def step(logits, rest):
        return simsd_kernels.block_verify_graph(logits * 2, **rest, backend=backend).tokens + 1

    made = arguments(max_copies=4)
    logits = made.pop("target_logits")
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, made), step(logits, made))
