"""The CUDA kernels of propose_block, run on the CPU: a loop of the kernels of sample_logits and reveal, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

from arguments import copy_of, strided
from backends import unsafe
from proposals import WRITTEN, as_one_by_one, propose, random_case, slot
from test_propose_block import REFUSED, good_arguments, int32


@pytest.mark.parametrize("seed", range(40))
def test_block_is_denoised_as_by_sample_logits_and_reveal(seed):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    case = random_case(seed, seed % 2, length=1 + seed % 6, dtype=dtype, filters=seed % 4 < 2)
    by_cpu = propose(copy_of(case), "cpu")
    case = strided(case) if seed % 5 == 0 else case
    as_one_by_one(case, "cuda")
    for name in WRITTEN:
        if case[name].is_floating_point():
            torch.testing.assert_close(case[name], by_cpu[name], rtol=5e-6, atol=5e-6)
        else:
            assert torch.equal(case[name], by_cpu[name]), name


@pytest.mark.parametrize("noise", [0, 1])
@pytest.mark.parametrize("length", [33, 64])
def test_long_block_is_denoised_as_by_sample_logits_and_reveal(noise, length):
    case = random_case(4, noise, batch=2, length=length)
    case["steps"].clamp_(max=3)
    case["step"].clamp_(max=2)
    as_one_by_one(case, "cuda")


@pytest.mark.parametrize(
    "noise, contiguous, banned, launches",
    [(0, True, 0, 3), (0, False, 0, 4), (0, True, 1, 4), (1, True, 0, 1 + 4 * 3), (1, True, 1, 2 + 4 * 3)],
)
def test_launches_are_two_of_draws_and_a_small_one_a_round(noise, contiguous, banned, launches):
    """Banned ids are marked once, whatever the rounds."""
    case = slot(noise=noise, seed=torch.tensor([1]), banned_ids=torch.arange(banned))
    case["rows"] = case["rows"] if contiguous else strided(case)["rows"]
    torch.ops.simsd_emulated.take_counters()
    propose(case, "cuda")
    assert json.loads(torch.ops.simsd_emulated.take_counters())["launches"] == launches


def test_missing_row_ends_the_launch():
    with pytest.raises(RuntimeError, match=r"rows must be in \[0, N\) at masked positions"):
        torch.ops.simsd_emulated.propose_block(**slot(rows=int32([0, -1, 2, 3])))


def test_kernel_checks_shapes_and_dtypes_itself():
    good = good_arguments()
    refused = [*unsafe(REFUSED, good), ("block", 2), ("block", -1), ("noise", 2)]
    assert len(refused) > 15
    for name, value in refused:
        errors = []
        for library in (torch.ops.simsd, torch.ops.simsd_emulated):
            with pytest.raises(RuntimeError, match="propose_block: ") as caught:
                library.propose_block(**{**good, name: value})
            errors.append(str(caught.value).splitlines()[0])
        assert errors[0] == errors[1], name
