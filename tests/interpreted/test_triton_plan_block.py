"""The Triton kernels of plan_block against the reference: the same plan, to the last bit."""

from __future__ import annotations

import math
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from plans import STRATEGIES, arguments, ints, plan, random_case, sizes  # noqa: E402
from simsd_kernels import dispatch  # noqa: E402
from simsd_kernels.plan_block import reference  # noqa: E402


def assert_same_plan(made):
    out, expected = plan(made, "triton"), plan(made, "reference")
    for name, value in expected._asdict().items():
        assert getattr(out, name).dtype == value.dtype and torch.equal(getattr(out, name), value), name
    return out


@pytest.fixture
def same_draws(monkeypatch):
    """The reference draws by what the kernel's host side calls, so that not even the last bit may differ."""
    if dispatch.compiled_obstacle("sample_logits", "CPU") is None:
        monkeypatch.setattr(reference, "sample_logits", torch.ops.simsd.sample_logits.default)


def small(number, logits=False):
    made = random_case(number, logits)
    return made | {"max_copies": min(made["max_copies"], 12)}


def numbers(first, count):
    """Seeds of cases with blocks of up to 8; the interpreter is slow."""
    found = []
    while len(found) < count:
        if small(first)["tokens"].shape[1] <= 8:
            found.append(first)
        first += 1
    return found


@pytest.mark.parametrize("number", numbers(0, 48))
def test_random_plans(number):
    assert_same_plan(small(number))


@pytest.mark.parametrize("number", numbers(1000, 16))
def test_random_plans_that_draw_at_every_state(same_draws, number):
    assert_same_plan(small(number, logits=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_graphs_that_reach_the_third_block(strategy):
    threshold = 0.0 if strategy == "entropy_bounded" else 0.6
    made = arguments(1, 2, 3, strategy=strategy, threshold=threshold, max_copies=24)
    made["prob"].clamp_(min=0.6)
    out = assert_same_plan(made)
    assert out.cleaned.item() >= 1 and len(sizes(out)) > 6


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_blocks_of_64_use_the_sign_bit_and_more_continuations_than_are_looked_at(strategy):
    made = arguments(1, 1, 64, 3, strategy=strategy, threshold=0.9, max_copies=4)
    made["revealed"] = torch.tensor([-(2**63)])
    out = assert_same_plan(made)
    assert (out.revealed[0] < 0).all() and len(sizes(out)) == 4


def test_entropies_are_added_one_by_one():
    """0.1 + 0.2 exceeds 0.3 in double, though not in float32."""
    made = arguments(strategy="entropy_bounded", threshold=0.3, max_copies=8)
    for entropies in ([0.1, 0.2, 0.05, 2.0], [0.0, 0.0, 0.3, 0.3], [math.nan, math.inf, 0.1, 0.1]):
        assert_same_plan(made | {"entropy": torch.tensor([[entropies]])})


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_nan_scores_tie_with_the_worst_that_are_not_nan(strategy):
    """Triton before 3.9 takes a literal such as -1e30 as float32, which is another number in double."""
    nan, inf = math.nan, math.inf
    scores = torch.tensor([[[-inf, nan, inf, 0.5]], [[nan, -inf, 0.5, inf]], [[nan, nan, -inf, -inf]]])
    made = arguments(3, strategy=strategy, max_copies=5, log_odds=scores, entropy=-scores)
    assert_same_plan(made | {"power": torch.tensor([[1.0], [1.0], [1e-30]])})  # the last makes 1e30 odds that one sees


def test_a_row_budget_is_shared_by_the_batch():
    made = arguments(3, 1, 4, max_copies=10, max_rows=4 * 7, start=ints(8, -1, 4))
    out = assert_same_plan(made)
    assert sum(len(sizes(out, lane)) - 1 for lane in (0, 2)) <= 7 and not sizes(out, 1)


def test_tensors_of_any_strides():
    made = arguments(2, 2, 3, max_copies=8)
    strided = {
        name: torch.stack((value, value), dim=-1)[..., 0] if torch.is_tensor(value) else value
        for name, value in made.items()
    }
    assert all(torch.equal(a, b) for a, b in zip(plan(strided, "triton"), plan(made, "triton"), strict=True))


def test_nothing_is_drafted():
    assert_same_plan(arguments(0, 1, 4, max_copies=3))
    assert_same_plan(arguments(2, 0, 4, max_copies=3))
    assert_same_plan(arguments(2, 1, 4, max_copies=1))
    assert_same_plan(arguments(2, 1, 4, max_copies=3, depth=ints(0, 1), schedule=ints()))


def test_float64_logits_are_refused_by_name():
    made = arguments(draft_logits=torch.zeros(1, 1, 4, 20, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"triton: supports .*got draft_logits of torch.float64"):
        plan(made, "triton")
