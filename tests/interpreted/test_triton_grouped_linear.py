"""The Triton kernel of grouped_linear, interpreted: right, and every row's bits are thin_linear's of its expert."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import simsd_kernels  # noqa: E402
from test_grouped_linear import FLOATS, assert_right, random_case, run  # noqa: E402


@pytest.mark.parametrize("seed", range(60))
def test_rows_get_their_experts_product_with_thin_linears_bits(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    dtype, n, k = pick(*FLOATS), pick(1, 31, 32, 33, 70), pick(1, 16, 63, 64, 65, 256, 257, 600)
    experts = pick(1, 2, 5, 8, 33)
    taken = torch.randint(pick(1, experts, experts), (pick(1, 3, 16, 40),), generator=generator)
    x, weight, offsets = random_case(torch.bincount(taken, minlength=experts).tolist(), n, k, dtype, seed)
    views = (
        weight,
        weight.transpose(1, 2).contiguous().transpose(1, 2),
        torch.nn.functional.pad(weight, (3, 2))[..., 3:-2],
    )
    out = run(x, pick(*views), pick(offsets, torch.stack((offsets, offsets + 99), 1)[:, 0]), "triton")
    assert_right(out, x, weight, offsets)
    row = int(torch.randint(len(x), (), generator=generator))
    own = weight[int((offsets <= row).sum()) - 1]
    assert torch.equal(out[row], simsd_kernels.thin_linear(x[row], own, backend="triton"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_experts_without_rows_are_not_read_and_nan_stays_in_its_row(dtype):
    x, weight, offsets = random_case((0, 3, 0, 0, 20, 0), 33, 70, dtype)
    expected = run(x, weight, offsets, "triton")
    weight[[0, 2, 3, 5]] = float("nan")
    x[[1, 9]] = float("nan")
    out = run(x, weight, offsets, "triton")
    clean = [row for row in range(23) if row not in (1, 9)]
    assert torch.equal(out[clean], expected[clean]) and out[[1, 9]].isnan().all()


def test_sizes_that_are_zero():
    for groups, n, k in (((0, 0), 5, 8), ((2, 1), 0, 8), ((), 5, 8)):
        assert run(*random_case(groups, n, k), "triton").shape == (sum(groups), n)
    assert torch.equal(run(*random_case((2, 0, 1), 5, 0), "triton"), torch.zeros(3, 5))


def test_float64_is_refused_by_name():
    with pytest.raises(RuntimeError, match="triton: supports float32, bfloat16 and float16, got torch.float64"):
        run(*random_case(dtype=torch.float64), "triton")
