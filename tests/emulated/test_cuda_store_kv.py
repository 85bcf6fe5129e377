"""The CUDA kernel of store_kv, run on the CPU, against the definition."""

from __future__ import annotations

import json

import pytest
import torch

import simsd_kernels
from test_store_kv import random_case, stored

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("seed", range(300))
def test_rows_land_in_their_slots_and_nowhere_else(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    rows = pick(0, 1, 3, 16, 33)
    sizes = {"batch": pick(1, 2, 3), "heads": pick(1, 2, 5), "rows": rows, "dim": pick(1, 8, 33, 64, 128, 256)}
    k, v, k_cache, v_cache, slots = random_case(**sizes, capacity=rows + pick(0, 1, 20), dtype=pick(*DTYPES), seed=seed)
    slots = torch.where(torch.rand(slots.shape, generator=generator) < 0.2, -1, slots).int()
    if pick(False, True):  # as a projection's output is: [B, R, Hkv, D] in memory
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    if pick(False, True):
        k_cache = k_cache.transpose(0, 1).contiguous().transpose(0, 1)
    expected = stored(k, k_cache, slots), stored(v, v_cache, slots)
    for backend in ("reference", "cpu", "cuda"):
        caches = k_cache.clone(), v_cache.clone()  # which keep their strides
        simsd_kernels.store_kv(k, v, *caches, slots, backend=backend)
        assert torch.equal(caches[0], expected[0]) and torch.equal(caches[1], expected[1]), backend


def test_rows_without_a_slot_are_not_read():
    k, v, k_cache, v_cache, slots = random_case(batch=1, heads=1, rows=4, dim=64, dtype=torch.bfloat16)
    torch.ops.simsd_emulated.take_counters()
    slots[0, 1:] = -1
    simsd_kernels.store_kv(k, v, k_cache, v_cache, slots, backend="cuda")
    counters = json.loads(torch.ops.simsd_emulated.take_counters())
    assert counters["launches"] == 1 and counters["loaded_bytes"] == 2 * 64 * 2
