"""The CUDA kernels of plan_block, run on the CPU, against the C++ of the CPU: one source, every output bit for bit."""

from __future__ import annotations

import json
import math

import pytest
import torch

from backends import unsafe
from plans import STRATEGIES, arguments, assert_same, ints, plan, random_case, strided
from rules import even
from simsd_kernels import dispatch
from test_plan_block import REFUSED, good_arguments


def assert_same_plan(made):
    before = {name: value.clone() for name, value in made.items() if torch.is_tensor(value)}
    out = plan(made, "cuda")
    assert_same(out, plan(made, "cpu"))
    for name, value in before.items():
        assert torch.equal(made[name].nan_to_num(7), value.nan_to_num(7)), name
    return out


@pytest.mark.parametrize("logits", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("number", range(200))
def test_random_batches(number, logits):
    made = random_case(number, logits)
    assert_same_plan(strided(made) if number % 3 == 0 else made)


@pytest.mark.parametrize("number", range(12))
def test_the_definition_gives_the_same(number):
    made = random_case(number)
    assert_same(plan(made, "cuda"), plan(made, "reference"))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length, steps", [(16, 16), (33, 12), (64, 64)])
def test_long_blocks(strategy, length, steps):
    out = assert_same_plan(arguments(2, 2, length, length, [(even(length, steps), strategy, 0.8)] * 2, max_states=12))
    assert (out.block >= 0).sum() > 2


def test_a_batch_that_fights_for_its_rows_is_cut_alike():
    for number in range(8):
        made = arguments(7, 2, 4, number, max_states=20, row_budget=ints(40 + 9 * number), logits_rows=7 * 4 * 3)
        out = assert_same_plan(made)
        assert 7 < (out.block >= 0).sum() < 7 * 20


def test_numbers_that_are_none():
    made = arguments(2, 2, 8, 3, max_states=20)
    for name in ("prob", "log_odds", "entropy"):
        made[name].view(-1)[1::3] = math.nan
        made[name].view(-1)[2::5] = math.inf
    assert_same_plan(made)


@pytest.mark.parametrize("sizes", [(0, 2, 4), (2, 0, 4), (1, 1, 1)], ids=["no slots", "nothing drafted", "one token"])
def test_small_sizes(sizes):
    assert_same_plan(arguments(*sizes, max_states=3))


def test_every_place_of_the_outputs_is_written():
    """Outputs start as NaN bytes in the emulation: a place left out would differ from the CPU's."""
    made = arguments(3, 1, 4, max_states=5, logits_rows=3 * 4 + 7, start=ints(-1, 8, 0))
    out = assert_same_plan(made)
    assert (out.slots[0] == -1).all() and (out.clock[0] == -1).all()


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_what_is_unsafe_is_refused_by_the_compiled_op_itself(backend):
    good = good_arguments()
    numbers = [(name, value) for name, value, *_ in REFUSED if isinstance(value, int)]
    for name, value in [*unsafe(REFUSED, good), *numbers]:
        too_short = name == "text" and value.shape == (1, 11)  # for `start`, whose value CUDA trusts
        if (name == "temperature" and value is not None) or (too_short and backend == "cuda"):
            continue
        with pytest.raises(RuntimeError, match="plan_block: "):
            dispatch.operator("plan_block", backend)(**{**good, name: value})


def launches(made):
    torch.ops.simsd_emulated.take_counters()
    plan(made, "cuda")
    return json.loads(torch.ops.simsd_emulated.take_counters())["launches"]


def test_launches_do_not_depend_on_what_grows():
    few, many = (arguments(4, 2, 4, max_states=16, min_visit_prob=torch.full((4,), floor)) for floor in (1.0, 0.0))
    assert launches(few) == launches(many) == 3
    drawn = good_arguments()  # 8 states, banned ids
    assert launches(drawn) == 3 + 7 * 4
