"""The Triton kernel of add_rms_norm, interpreted, against transformers' modules."""

from __future__ import annotations

import pytest
import torch

from simsd_kernels.add_rms_norm import triton
from test_add_rms_norm import FLOATS, check, copied, random_case, run


@pytest.mark.parametrize("seed", range(60))
def test_rows_are_added_and_normed(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    shape = pick((), (0,), (1,), (7,), (2, 3), (2, 1, 4))
    dim = pick(1, 2, 5, 16, 33, 160, 512, 513, 1000, 4096, 4100, 9000)
    made = random_case(shape, dim, pick(*FLOATS), pick(True, True, False), seed)
    made["eps"] = pick(0.0, 1e-6, 1e-6, 1e-5, 0.5)
    if pick(False, True):
        roomy = torch.zeros(*shape, dim + 3, dtype=made["residual"].dtype)[..., 1:-2]
        made["residual"] = roomy.copy_(made["residual"])
    if len(shape) > 1 and pick(False, True):
        made["residual"] = made["residual"].transpose(0, 1).contiguous().transpose(0, 1)
    if made["x"] is not None and pick(False, True):
        made["x"] = torch.stack((made["x"], made["x"]), -1)[..., 1]
    check(made, "triton")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [33, 160, 4100])
def test_a_row_is_bit_identical_whatever_rides_along(dtype, dim):
    made = random_case((2, 3), dim, dtype)
    alone = copied(made)
    out = run(made, "triton")
    for name in ("x", "residual"):
        alone[name] = alone[name][1:, 2]
    assert torch.equal(run(alone, "triton"), out[1:, 2])
    made["x"][0, 1] = float("nan")
    poisoned = run(copied(made), "triton")
    assert poisoned[0, 1].isnan().all() and int(poisoned.isnan().sum()) == dim


@pytest.mark.parametrize("dim", [1, 160, 4096, 4097, 100000])
def test_the_order_of_the_sum_follows_from_the_size_of_a_row(dim):
    constants, options = triton.configuration(dim)
    assert 1 << constants["LOG_BLOCK"] >= min(dim, triton.LARGEST_BLOCK) and options["num_warps"] in (1, 2, 4, 8)


def test_float64_is_refused_by_name():
    made = random_case() | {"x": None}
    made |= {name: made[name].double() for name in ("residual", "weight")}
    with pytest.raises(RuntimeError, match="triton: supports float32, bfloat16 and float16, got torch.float64"):
        run(made, "triton")
