"""The walk through drafted states: exactly the steps that the target would take, one forward each."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import callable_of, needs_compiled_ops
from rules import STRATEGIES, even
from simsd_kernels import banned_mask
from simsd_kernels.verify_graph.api import DENOISED, DRAFTED
from simsd_kernels.verify_graph.arguments import SIGNATURE
from walks import FINISHED, HELD, LAST, ORDER, SHARED, TAKEN, VOCABULARY, arguments, ints, native, replay

verify_graph, sample_logits = callable_of("verify_graph"), callable_of("sample_logits")
LANES = tuple(name for name in ORDER if name not in SHARED)


def walk(made, backend=None):
    return verify_graph(**made, backend=backend)


def strided(made):
    """The same, as columns and rows of buffers twice as large."""
    return {
        name: torch.stack((value, value), dim=-1)[..., 0] if torch.is_tensor(value) else value
        for name, value in made.items()
    }


def alone(made, b):
    """Slot b's arguments."""
    return {
        name: value[b : b + 1] if torch.is_tensor(value) and name not in SHARED else value
        for name, value in made.items()
    }


def random_case(number):
    """Slots with their own settings and graphs of what the target would do, but for a token: long walks, early ends,
    slots without a state, partly known blocks."""
    chance = random.Random(number)
    pick = chance.choice
    batch, blocks, length = pick([1, 2, 3]), pick([0, 1, 2, 2, 3, 3, 3]), pick([1, 2, 3, 4, 4, 4, 5, 5])

    def slots(values, dtype):
        return torch.tensor([pick(values) for _ in range(batch)], dtype=dtype)

    def counts():
        steps = pick([length, length, chance.randint(1, length)])
        waits = chance.random() < 0.15 and steps < length
        return ([0] if waits else []) + even(length, steps)

    prefixes = [(1 << n) - 1 for n in range(length)]
    given = {
        "rules": [(counts(), pick(STRATEGIES), pick([0.2, 0.6, 0.95, 1.0]), pick([[], [1, 3]])) for _ in range(batch)],
        "start": slots([0, *[length, 2 * length] * 4, -1], torch.int32),
        "temperature": slots([0.0, 0.8], torch.float32),
        "seed": slots([-(2**40), 3, 2**40], torch.int64),
        "proposal_depth": slots([*[blocks] * 5, blocks // 2], torch.int32),
        "known": slots([0, 0, *prefixes], torch.int64),
        "max_states": pick([1, 8, *[40] * 8]),
        "dtype": pick([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    }
    if chance.random() < 0.3:
        given |= {"top_k": slots([0, 3], torch.int32), "banned": banned_mask([1, 7], VOCABULARY)}
        given |= {"top_p": slots([1.0, 0.8], torch.float32)}
    made = arguments(batch, blocks, length, number, **given)
    if chance.random() < 0.5 and blocks:
        draft = made["draft_tokens"].clone()
        draft.view(-1)[chance.randrange(draft.numel())] = chance.randrange(VOCABULARY)
        made = arguments(batch, blocks, length, number, draft=draft, **given)
    return made | {"again": (number, given)}


RANDOM = st.integers(0, 2**20).map(random_case)


@given(case=RANDOM)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_walk_is_the_step_by_step_replay(backend, case):
    made = {name: case[name] for name in ORDER}
    before = {name: value.clone() for name, value in made.items() if torch.is_tensor(value)}
    out = walk(made, backend)
    for name, value, expected in zip(out._fields, out, replay(made, backend), strict=True):
        assert value.tolist() == torch.tensor(expected, dtype=value.dtype).tolist(), name
    assert all(torch.equal(made[name], value) for name, value in before.items())


@given(case=RANDOM)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_walk_is_where_as_many_forwards_on_the_current_state_alone_would_be(case):
    made, (number, given) = {name: case[name] for name in ORDER}, case["again"]
    out = walk(made)
    forwards = out.progress[:, TAKEN].tolist()
    first, known = made["states"][:, 0], made["state_revealed"][:, 0]
    for b, count in enumerate(forwards):
        expected = native(made, first, known, number, given["dtype"], count)[0][b]
        found = list(zip(out.tokens[b].tolist(), out.step_map[b].tolist(), strict=True))
        assert found[: len(expected)] == expected
        assert len(expected) == out.progress[b, FINISHED] + 1


def test_random_cases_walk_far():
    """Of what the tests above compare, not all is over after a step."""
    walks = [walk({name: case[name] for name in ORDER}).progress for case in map(random_case, range(100))]
    progress = torch.cat(walks)
    assert (progress[:, TAKEN] > 3).float().mean() > 0.3
    assert (progress[:, HELD] > 0).float().mean() > 0.3 and (progress[:, HELD] < progress[:, FINISHED]).any()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_full_agreement_walks_over_all_blocks(backend, strategy, temperature):
    rules = [(even(4, 4), strategy, 0.0)]
    made = arguments(blocks=3, rules=rules, temperature=torch.tensor([temperature]))
    out = walk(made, backend)
    finished, held, taken, last, _, judged, accepted = out.progress[0].tolist()
    at_once = strategy == "low_confidence_dynamic"  # everything is above a threshold of 0
    assert (finished, held, taken) == ((4, 3, 4) if at_once else (3, 3, 13))
    assert (judged, accepted, made["block"][0, last].item()) == (12, 12, 3)
    assert torch.equal(out.tokens[0, :3], made["draft_tokens"][0])
    assert (out.origin[0, :3] >= DENOISED).all() and (out.origin[0, 1:3] == DRAFTED).all()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_walk_goes_by_sub_blocks(backend, strategy, temperature):
    rules = [(even(5, 5), strategy, 0.0, (1, 3))]
    made = arguments(blocks=3, length=5, rules=rules, temperature=torch.tensor([temperature]))
    out = walk(made, backend)
    assert out.progress[0, FINISHED] == 3 and torch.equal(out.tokens[0, :3], made["draft_tokens"][0])
    for steps in out.step_map[0, :3].tolist():
        assert steps[0] == 1 < min(steps[1:3]) and max(steps[1:3]) < min(steps[3:])


def test_first_step_that_the_draft_did_not_foresee_is_the_only_one(backend):
    made = arguments(draft=(arguments()["draft_tokens"] + 1) % VOCABULARY)
    out = walk(made, backend)
    assert out.progress.tolist() == [[0, 0, 1, 0, 1, 1, 0]]
    assert int(out.revealed[0]).bit_count() == 1
    assert out.origin[0, 0].tolist().count(DENOISED) == 1 and not (out.origin == DRAFTED).any()
    assert not out.tokens[0, 1:].any() and (out.prob[0, 1:] == 1).all() and not out.draw_logprob[0, 1:].any()


def test_block_finished_otherwise_than_drafted_is_not_held_and_ends_the_walk(backend):
    own = arguments()["draft_tokens"]
    last = walk(arguments(), backend).step_map[0, 0].argmax()
    draft = own.clone()
    draft[0, 0, last] = (draft[0, 0, last] + 1) % VOCABULARY
    out = walk(arguments(draft=draft), backend)
    assert out.progress[0].tolist() == [1, 0, 4, out.progress[0, LAST], 0, 4, 3]
    assert torch.equal(out.tokens[0, 0], own[0, 0]) and out.revealed.item() == 0


def test_block_finished_as_drafted_without_its_rows_is_not_held(backend):
    out = walk(arguments() | {"draft_blocks_in_rows": ints(0)}, backend)
    assert out.progress[0, :3].tolist() == [1, 0, 4]


def test_slot_without_a_current_state_keeps_its_block(backend):
    made = arguments(batch=2, start=ints(-1, 8), step=ints(3, 0), known=torch.tensor([5, 0]))
    made["block"][0] = -1
    made["states"][0, 0], made["state_revealed"][0, 0] = torch.tensor([6, 7, 8, 9]), 5
    made["prob"][0], made["draw_logprob"][0], made["step_map"][0], made["origin"][0] = 0.5, -0.25, 2, 1
    out = walk(made, backend)
    assert out.progress[0].tolist() == [0, 0, 0, -1, 3, 0, 0] and out.progress[1, TAKEN] > 1
    assert out.revealed[0] == 5 and out.tokens[0, 0].tolist() == [6, 0, 8, 0]
    assert (out.prob[0, 0] == 0.5).all() and (out.draw_logprob[0, 0] == -0.25).all()
    assert (out.step_map[0, 0] == 2).all() and (out.origin[0, 0] == 1).all()


@pytest.mark.parametrize("step, steps", [(-1, 4), (4, 4), (0, 0), (2, 2), (2**31 - 1, 4)])
def test_slot_whose_step_is_outside_its_schedule_does_not_walk(backend, step, steps):
    made = arguments() | {"step": ints(step), "steps": ints(steps)}
    assert walk(made, backend).progress.tolist() == [[0, 0, 0, -1, step, 0, 0]]


def test_waiting_steps_stay_at_their_state_and_are_counted(backend):
    made = arguments(blocks=0, rules=([0, 0, 4], "low_confidence_static", 0.9), max_states=2)
    assert walk(made, backend).progress.tolist() == [[0, 0, 2, 0, 2, 0, 0]]
    made["step"] += 1
    assert walk(made, backend).progress.tolist() == [[1, 0, 2, 0, 0, 0, 0]]


def test_block_known_in_full_is_finished_by_a_step_without_logits(backend):
    made = arguments(blocks=0, known=torch.tensor([15]))
    out = walk(made | {"target_logits": torch.zeros(0, VOCABULARY)}, backend)
    assert out.progress.tolist() == [[1, 0, 1, 0, 0, 0, 0]] and not out.origin.any()


@pytest.mark.parametrize("row", [-1, 10**6, -(2**31)])
def test_missing_row_matters_only_where_the_walk_comes_by(backend, row):
    made = arguments(draft=(arguments()["draft_tokens"] + 1) % VOCABULARY)
    made["rows"][:, 1:] = row
    assert walk(made, backend).progress[0, TAKEN] == 1
    made["rows"][0, 0, 2] = row
    with pytest.raises((ValueError, RuntimeError), match=r"rows must be in \[0, .*\) at masked positions"):
        walk(made, backend)


def test_first_of_equal_states_is_visited(backend):
    made = arguments(length=2)
    for name in ("rows", "states", "state_revealed", "block"):
        made[name] = made[name].repeat_interleave(3, dim=1)
    made["target_logits"] = made["target_logits"].repeat_interleave(3, dim=0)
    nth = torch.arange(made["rows"].shape[1])[:, None] % 3
    made["rows"] = torch.where(made["rows"] < 0, -1, made["rows"] * 3 + nth).int()
    out = walk(made, backend)
    assert out.progress[0, HELD] == 2 and out.progress[0, LAST] % 3 == 0


def test_result_does_not_depend_on_batch_strides_or_threads(backend, threads):
    rules = [(even(4, steps), strategy, 0.5) for steps, strategy in zip((4, 2, 4, 3), STRATEGIES, strict=True)]
    made = arguments(4, rules=rules, temperature=torch.tensor([0.0, 0.8, 0.8, 0.5]), start=ints(4, 8, 12, 0))
    whole = walk(made, backend)
    threads(1)
    again = walk(strided(made), backend)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for b in range(4):
        assert all(torch.equal(x[0], y[b]) for x, y in zip(walk(alone(made, b), backend), whole, strict=True))


@pytest.mark.parametrize("batch, states, length", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty_batches_graphs_and_blocks_are_fine(backend, batch, states, length):
    made, sizes = arguments(batch=2), {"B": batch, "C": states, "L": length, "K": 1}
    for argument in SIGNATURE.arguments:
        if argument.name in made and argument.name not in SHARED and made[argument.name] is not None:
            made[argument.name] = made[argument.name].new_zeros([sizes[letter] for letter in argument.dims])
    out = walk(made, backend)
    assert out.progress.tolist() == [[0, 0, 0, -1, 0, 0, 0]] * batch
    assert out.tokens.shape == out.origin.shape == (batch, 3, length)
    floats = [torch.float32] * 2
    assert [x.dtype for x in out] == [torch.int32, torch.int64, torch.int64, torch.int32, *floats, torch.int32]


REFUSED = [
    ("target_logits", torch.zeros(4), ValueError, r"target_logits must be \[N, V\].*got \[4\]"),
    ("target_logits", torch.zeros(4, 0), ValueError, r"target_logits must have V >= 1, got \[4, 0\]"),
    ("target_logits", torch.zeros(4, 9, dtype=torch.int32), TypeError, "target_logits must be .*got torch.int32"),
    ("rows", torch.zeros(1, 64, 4), TypeError, "rows must be torch.int32, got torch.float32"),
    ("rows", torch.zeros(1, 4, dtype=torch.int32), ValueError, r"rows must be \[B, C, L\].*got \[1, 4\]"),
    ("states", torch.zeros(1, 63, 4, dtype=torch.int64), ValueError, r"states must be \[B, C, L\] = \[1, 64, 4\]"),
    ("states", torch.zeros(1, 64, 4, dtype=torch.int32), TypeError, "states must be torch.int64"),
    ("state_revealed", torch.zeros(1, dtype=torch.int64), ValueError, r"state_revealed must be \[B, C\]"),
    ("block", torch.zeros(1, 64, dtype=torch.int64), TypeError, "block must be torch.int32"),
    ("block", torch.full((1, 64), 3, dtype=torch.int32), ValueError, r"block must be in \[-1, 2\], got 3"),
    ("draft_tokens", torch.zeros(1, 2, 3, dtype=torch.int64), ValueError, r"draft_tokens must be \[B, K, L\]"),
    ("draft_blocks_in_rows", ints(3), ValueError, r"draft_blocks_in_rows must be in \[0, 2\], got 3"),
    ("proposal_depth", ints(-1), ValueError, r"proposal_depth must be >= 0, got -1"),
    ("proposal_depth", ints(0, 0), ValueError, r"proposal_depth must be \[B\]"),
    ("start", torch.zeros(1), TypeError, "start must be torch.int32"),
    ("step", torch.zeros(1, dtype=torch.int64), TypeError, "step must be torch.int32"),
    ("step_map", torch.zeros(1, 4), TypeError, "step_map must be torch.int32"),
    ("prob", torch.zeros(1, 3), ValueError, r"prob must be \[B, L\]"),
    ("draw_logprob", torch.zeros(1, 3), ValueError, r"draw_logprob must be \[B, L\]"),
    ("draw_logprob", torch.zeros(1, 4).double(), TypeError, "draw_logprob must be torch.float32"),
    ("origin", torch.zeros(1, 4, dtype=torch.int64), TypeError, "origin must be torch.int32"),
    ("temperature", torch.full((1,), math.inf), ValueError, "temperature must be finite and >= 0"),
    ("temperature", 0.0, TypeError, "temperature must be a tensor, got float"),
    ("top_k", ints(-1), ValueError, "top_k must be >= 0"),
    ("top_k", torch.zeros(1), TypeError, "top_k must be torch.int32"),
    ("top_p", torch.full((1,), 1.5), ValueError, r"top_p must be in \[0, 1\]"),
    ("top_p", torch.ones(2), ValueError, r"top_p must be \[B\]"),
    ("seed", None, ValueError, "temperature must be 0 without seed, got 0.5"),
    ("seed", torch.zeros(1, dtype=torch.int32), TypeError, "seed must be torch.int64"),
    (
        "banned",
        torch.tensor([3]),
        TypeError,
        r"simsd_kernels.banned_mask\(ids, 30\) makes it, got torch.int64",
    ),
    ("banned", torch.zeros(2, dtype=torch.int32), ValueError, r"banned must be torch.int32 \[1\], as .*got .* \[2\]"),
    ("schedule", torch.zeros(1, 3, dtype=torch.int32), ValueError, r"schedule must be \[B, L\] = \[1, 4\]"),
    ("schedule", ints(1, 1, 1, -1)[None], ValueError, "schedule must be >= 0, got -1"),
    ("steps", ints(5), ValueError, r"steps must be in \[0, 4\], got 5"),
    ("steps", ints(4, 4), ValueError, r"steps must be \[B\] = \[1\]"),
    ("strategy", "greedy", TypeError, "strategy must be a tensor, got str"),
    ("strategy", ints(-1), ValueError, r"strategy must be in \[0, 3\], got -1"),
    ("threshold", torch.tensor([math.nan]), ValueError, "threshold must be a number, got nan"),
    ("threshold", torch.zeros(1, dtype=torch.float64), TypeError, "threshold must be torch.float32"),
    ("start", torch.zeros(1, dtype=torch.int32, device="meta"), ValueError, "one device.*start on meta"),
]


def random_arguments(seed):
    case = random_case(seed)
    return {name: case[name] for name in ORDER}


def good_arguments():
    half = torch.full((1,), 0.5)
    return arguments(temperature=half, top_k=ints(4), top_p=half * 2, banned=banned_mask([0], VOCABULARY))


@pytest.mark.parametrize("length", [65, 100])
def test_block_longer_than_a_set_of_64_is_refused(length):
    made = arguments(blocks=0, length=4)
    made |= {name: made[name].new_zeros(*made[name].shape[:-1], length) for name in BY_POSITION}
    with pytest.raises(ValueError, match=f"L must be at most 64, got {length}"):
        walk(made)


BY_POSITION = ("rows", "states", "draft_tokens", "step_map", "prob", "draw_logprob", "origin", "schedule")


@needs_compiled_ops
def test_compiled_op_checks_the_noise_key_and_the_mask_itself():
    for name, value in (("seed", None), ("banned", torch.tensor([3]))):
        with pytest.raises(RuntimeError, match=r"verify_graph: "):
            torch.ops.simsd.verify_graph(**{**good_arguments(), name: value})


def test_opcheck():
    torch.library.opcheck(torch.ops.simsd.verify_graph, (), good_arguments())
    torch.library.opcheck(torch.ops.simsd.verify_graph, (), arguments(batch=2, max_states=5))
