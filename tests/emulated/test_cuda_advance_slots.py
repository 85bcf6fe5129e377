"""The CUDA kernel of advance_slots, run on the CPU, against the definition and the C++ op, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

from advances import WRITTEN, advance, finished, random_case, slot
from arguments import copy_of, same_bits, strided
from backends import unsafe
from simsd_kernels.advance_slots.arguments import NO_END
from test_advance_slots import REFUSED, past_the_text

LENGTHS = (1, 2, 4, 7, 31, 32, 33, 63, 64)


@pytest.mark.parametrize("seed", range(200))
def test_any_walk_is_applied_as_by_the_definition_and_the_cpu(seed):
    case = random_case(seed, (1 + seed % 5, seed % 4, LENGTHS[seed % 9], 1 + seed % 7 * 13, seed % 3))
    expected = {backend: advance(copy_of(case), backend) for backend in ("reference", "cpu")}
    case = advance(strided(case) if seed % 3 == 0 else case, "cuda")
    for backend, other in expected.items():
        assert all(same_bits(case[name], other[name]) for name in WRITTEN), backend


def test_one_launch_with_a_warp_per_slot():
    case = random_case(5, (7, 2, 4, 3, 2))
    torch.ops.simsd_emulated.take_counters()
    advance(case, "cuda")
    counters = json.loads(torch.ops.simsd_emulated.take_counters())
    assert counters["launches"] == 1 and counters["blocks"] == 7


def test_walk_past_the_text_ends_the_launch():
    with pytest.raises(RuntimeError, match="the walk must stay within the text"):
        torch.ops.simsd_emulated.advance_slots(**past_the_text({0: 1}))


def test_long_walk_of_a_long_proposal_moves_what_stands():
    blocks = [[1] * 64] * 5
    case = slot(length=64, blocks=7, capacity=12, **finished(*blocks, length=64, walk=9, tail={63: 1}, draft_end=7))
    advance(case, "cuda")
    assert case["proposal_depth"].item() == 2 and case["draft_end"].item() == 2 < NO_END
    assert case["draft_prob"][0, :, 0].tolist() == [5.5, 6.5, 2.5, 3.5, 4.5, 5.5, 6.5]


def test_kernel_checks_shapes_and_dtypes_itself():
    good = slot()
    refused = list(unsafe(REFUSED, good))
    assert len(refused) > 15
    for name, value in refused:
        errors = []
        for library in (torch.ops.simsd, torch.ops.simsd_emulated):
            with pytest.raises(RuntimeError, match="advance_slots: ") as caught:
                library.advance_slots(**{**good, name: value})
            errors.append(str(caught.value).splitlines()[0])
        assert errors[0] == errors[1], name
