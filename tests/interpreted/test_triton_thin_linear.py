"""The Triton kernel of thin_linear, interpreted: right, and no row notices anything but itself."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import simsd_kernels  # noqa: E402
from test_thin_linear import random_case  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear(x, weight):
    return simsd_kernels.thin_linear(x, weight, backend="triton")


@pytest.mark.parametrize("seed", range(60))
def test_it_is_the_linear_layer_and_rows_are_alone(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    sizes = (pick(1, 3, 15, 16, 17, 40),), pick(1, 31, 32, 33, 70), pick(1, 16, 63, 64, 65, 256, 257, 600)
    x, weight = random_case(*sizes, pick(*DTYPES), seed)
    given = pick(weight, weight.T.contiguous().T, torch.nn.functional.pad(weight, (3, 2))[:, 3:-2])
    got = linear(x, given)
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    bound = x.shape[1] * torch.finfo(torch.float32).eps * magnitude + torch.finfo(x.dtype).eps * exact.abs()
    assert got.dtype == x.dtype and ((got.double() - exact).abs() <= bound).all()

    order = torch.randperm(len(x), generator=generator)
    assert torch.equal(linear(x[order], weight), got[order])
    row, first = int(order[0]), int(torch.randint(len(weight), (), generator=generator))
    assert torch.equal(linear(x[row:], weight), got[row:])
    assert torch.equal(linear(x[row], weight[first : first + 1]), got[row, first : first + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_rows(dtype):
    x, weight = random_case((20,), 40, 100, dtype)
    expected = linear(x, weight)
    x[3], x[11, 5] = float("nan"), float("inf")
    got = linear(x, weight)
    clean = [i for i in range(20) if i not in (3, 11)]
    assert torch.equal(got[clean], expected[clean]) and not got[[3, 11]].isfinite().any()


@pytest.mark.parametrize("shape, n, k", [((0,), 5, 4), ((3,), 0, 4), ((2, 0), 5, 4), ((), 5, 4), ((2, 1, 5), 33, 20)])
def test_leading_sizes_are_kept(shape, n, k):
    x, weight = random_case(shape, n, k)
    torch.testing.assert_close(linear(x, weight), torch.nn.functional.linear(x, weight))


def test_a_sum_over_nothing_is_zero():
    assert torch.equal(linear(*random_case((3,), 5, 0)), torch.zeros(3, 5))


def test_gradients_are_those_of_the_linear_layer():
    ours = [value.requires_grad_() for value in random_case((2, 5))]
    torchs = [value.detach().clone().requires_grad_() for value in ours]
    linear(*ours).square().sum().backward()
    torch.nn.functional.linear(*torchs).square().sum().backward()
    for mine, theirs in zip(ours, torchs, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-3, rtol=1e-3)


def test_float64_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"triton: supports float32, bfloat16 and float16, got torch.float64"):
        linear(*random_case(dtype=torch.float64))
