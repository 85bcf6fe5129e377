"""The kernels of plan_block against the definition, and those of CUDA against the CPU's: every output bit for bit."""

import functools
import math

import pytest
import torch
from hypothesis import given

from backends import backends, kernels, needs_compiled_ops
from plans import arguments, assert_same, cases, ints, plan, random_case, strided
from rules import STRATEGIES, even
from simsd_kernels.plan_block import slots
from test_plan_block import REFUSED, bounded, good_arguments, sample_logits

OP = "plan_block"


@kernels
@given(made=cases())
@bounded
def test_same_plan_as_the_reference_to_the_last_bit(backend, made):
    assert_same(plan(made, backend), plan(made, "reference"))


@kernels
@given(made=cases(logits=True))
@bounded
def test_same_plan_as_the_reference_would_make_of_the_same_draws(monkeypatch, backend, made):
    out = plan(made, backend)
    with monkeypatch.context() as patched:
        patched.setattr(slots, "sample_logits", functools.partial(sample_logits, backend=backend))
        assert_same(out, plan(made, "reference"))


@needs_compiled_ops
def test_compiled_op_checks_every_number_that_it_writes_by():
    named = ("start", "end", "kv_len", "banned", "seed")
    for name, value in [*((n, v) for n, v, *_ in REFUSED if n in named), ("temperature", None)]:
        with pytest.raises(RuntimeError, match=r"plan_block: "):
            torch.ops.simsd.plan_block(**{**good_arguments(), name: value})


def assert_same_plan(made):
    before = {name: value.clone() for name, value in made.items() if torch.is_tensor(value)}
    out = plan(made, "cuda")
    assert_same(out, plan(made, "cpu"))
    for name, value in before.items():
        assert torch.equal(made[name].nan_to_num(7), value.nan_to_num(7)), name
    return out


@backends("cuda")
@pytest.mark.parametrize("logits", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("number", range(200))
def test_random_batches(number, logits):
    made = random_case(number, logits)
    assert_same_plan(strided(made) if number % 3 == 0 else made)


@backends("cuda")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length, steps", [(16, 16), (33, 12), (64, 64)])
def test_long_blocks(strategy, length, steps):
    out = assert_same_plan(arguments(2, 2, length, length, [(even(length, steps), strategy, 0.8)] * 2, max_states=12))
    assert (out.block >= 0).sum() > 2


@backends("cuda")
def test_a_batch_that_fights_for_its_rows_is_cut_alike():
    for number in range(8):
        made = arguments(7, 2, 4, number, max_states=20, row_budget=ints(40 + 9 * number), logits_rows=7 * 4 * 3)
        out = assert_same_plan(made)
        assert 7 < (out.block >= 0).sum() < 7 * 20


@backends("cuda")
def test_numbers_that_are_none():
    made = arguments(2, 2, 8, 3, max_states=20)
    for name in ("prob", "log_odds", "entropy"):
        made[name].view(-1)[1::3] = math.nan
        made[name].view(-1)[2::5] = math.inf
    assert_same_plan(made)


@backends("cuda")
@pytest.mark.parametrize("sizes", [(0, 2, 4), (2, 0, 4), (1, 1, 1)], ids=["no slots", "nothing drafted", "one token"])
def test_small_sizes(sizes):
    assert_same_plan(arguments(*sizes, max_states=3))


@backends("cuda")
def test_every_place_of_the_outputs_is_written():
    """Outputs start as NaN bytes: a place left out would differ from the CPU's."""
    made = arguments(3, 1, 4, max_states=5, logits_rows=3 * 4 + 7, start=ints(-1, 8, 0))
    out = assert_same_plan(made)
    assert (out.slots[0] == -1).all() and (out.clock[0] == -1).all()


@backends("emulation")
def test_launches_do_not_depend_on_what_grows(counted):
    def launches(made):
        return counted(lambda: plan(made, "cuda"))["launches"]

    few, many = (arguments(4, 2, 4, max_states=16, min_visit_prob=torch.full((4,), floor)) for floor in (1.0, 0.0))
    assert launches(few) == launches(many) == 3
    drawn = good_arguments()  # 8 states, top-k and top-p
    assert launches(drawn) == 3 + 7 * 4
