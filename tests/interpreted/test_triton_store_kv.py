"""The Triton kernel of store_kv against the definition."""

from __future__ import annotations

import pytest
import torch

import simsd_kernels
from test_store_kv import check, random_case, stored

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("seed", range(60))
def test_rows_land_in_their_slots_and_nowhere_else(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    rows = pick(0, 1, 3, 9)
    sizes = {"batch": pick(1, 2, 3), "heads": pick(1, 2, 5, 17), "rows": rows, "dim": pick(1, 8, 33, 128, 256, 1030)}
    k, v, k_cache, v_cache, slots = random_case(**sizes, capacity=rows + pick(0, 1, 20), dtype=pick(*DTYPES), seed=seed)
    slots = torch.where(torch.rand(slots.shape, generator=generator) < 0.2, -1, slots).int()
    if pick(False, True):  # as a projection's output is: [B, R, Hkv, D] in memory
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    if pick(False, True):
        k_cache = k_cache.transpose(0, 1).contiguous().transpose(0, 1)
    if pick(False, True):
        v_cache = v_cache.transpose(2, 3).contiguous().transpose(2, 3)
    if pick(False, True):
        slots = torch.stack((slots, slots), -1)[..., 0]
    check(k, v, k_cache, v_cache, slots, "triton")


@pytest.mark.parametrize("empty", ["batch", "heads", "rows", "dim"])
def test_empty_sizes_are_fine(empty):
    check(*random_case(**{empty: 0}), "triton")


def test_nan_and_infinity_are_stored_as_they_are():
    k, v, k_cache, v_cache, slots = random_case(dtype=torch.bfloat16)
    k[:], v[:] = float("nan"), float("-inf")
    simsd_kernels.store_kv(k, v, k_cache, v_cache, slots, backend="triton")
    assert int(k_cache.isnan().sum()) == k.numel() and int(v_cache.isinf().sum()) == v.numel()


@pytest.mark.parametrize("slot", [11, 2**31 - 1, -7])
def test_a_slot_out_of_range_is_skipped(slot):
    from simsd_kernels.store_kv import triton

    k, v, k_cache, v_cache, slots = random_case()
    slots[1, 3] = -1
    expected = stored(k, k_cache, slots), stored(v, v_cache, slots)
    slots[1, 3] = slot
    triton.store_kv(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, expected[0]) and torch.equal(v_cache, expected[1])
