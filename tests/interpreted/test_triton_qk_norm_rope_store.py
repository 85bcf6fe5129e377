"""The Triton kernel of qk_norm_rope_store against transformers' modules."""

from __future__ import annotations

import pytest
import torch

from simsd_kernels.qk_norm_rope_store import triton
from test_qk_norm_rope_store import FLOATS, assert_as_modules, check, random_case

SIZES = [(128, 128), (128, 64), (64, 64), (64, 16), (256, 256), (256, 2), (256, 0), (80, 80), (96, 48)]
SIZES += [(48, 12), (33, 10), (17, 16), (8, 4), (2, 2), (1, 0), (192, 128)]


@pytest.mark.parametrize("seed", range(60))
def test_rows_are_normed_turned_and_stored(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    rows = pick(0, 1, 2, 5)
    dim, rotary = pick(*SIZES)
    case = random_case(
        *(pick(1, 2), rows, pick((1, 1), (4, 2), (5, 1), (9, 3), (0, 2), (2, 0)), dim, rotary),
        capacity=rows + pick(0, 1, 9),
        dtype=pick(*FLOATS),
        weights=pick((True, True), (True, True), (False, False), (True, False), (False, True)),
        seed=seed,
    )
    case.slots = torch.where(torch.rand(case.slots.shape, generator=generator) < 0.2, -1, case.slots).int()
    case.eps = pick(0.0, 1e-6, 1e-6, 1e-5, 0.5)
    if pick(False, True):
        case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    if pick(False, True):
        case.k_cache = case.k_cache.transpose(2, 3).contiguous().transpose(2, 3)
    if pick(False, True):
        case.cos, case.sin = (x[:1].expand(x.shape) for x in (case.cos, case.sin))
    if pick(False, True):
        case.v = torch.stack((case.v, case.v), -1)[..., 1]
    check(case, "triton")


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_is_bit_identical_whatever_rides_along(dtype):
    case = random_case(batch=2, rows=4, heads=(6, 2), dim=80, dtype=dtype)
    alone = case.clone()
    out = case.run("triton")
    for name in ("q", "k", "v", "cos", "sin", "slots"):
        setattr(alone, name, getattr(alone, name)[1:, 2:3])
    alone.k_cache, alone.v_cache = alone.k_cache[1:], alone.v_cache[1:]
    assert torch.equal(alone.run("triton")[0], out[1, :, 2:3])


@pytest.mark.parametrize("empty", ["batch", "rows", "heads", "dim"])
def test_empty_sizes_are_fine(empty):
    case = random_case(**({"heads": (0, 0)} if empty == "heads" else {empty: 0}))
    out = case.run("triton")
    assert list(out.shape) == [case.q.shape[0], case.q.shape[2], case.q.shape[1], case.q.shape[3]]


@pytest.mark.parametrize("slot", [11, 2**31 - 1, -7])
def test_a_slot_out_of_range_is_skipped(slot):
    case = random_case()
    before = case.clone()
    before.slots[0, 2] = -1
    case.slots[0, 2] = slot
    out = triton.qk_norm_rope_store(*case.arguments().values())
    case.slots[0, 2] = -1
    assert_as_modules(case, out, before)


def test_larger_heads_are_refused_by_name():
    with pytest.raises(RuntimeError, match="triton: supports head sizes up to 256, got 258"):
        random_case(dim=258).run("triton")
