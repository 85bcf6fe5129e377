"""K and V of a forward land in their cache slots, and nowhere else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arguments import Pick, relaid
from backends import FLOATS, backends, callable_of, device_of, each_dtype
from simsd_kernels import dispatch

store_kv = callable_of("store_kv")
NAMES = ("k", "v", "k_cache", "v_cache", "slots")
LANES = NAMES


def random_case(batch=2, heads=3, rows=5, dim=8, capacity=11, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    new = [torch.randn(batch, heads, rows, dim, generator=generator).to(dtype) for _ in range(2)]
    caches = [torch.randn(batch, heads, capacity, dim, generator=generator).to(dtype) for _ in range(2)]
    order = [torch.randperm(capacity, generator=generator)[:rows] for _ in range(batch)]
    slots = torch.stack(order).int() if batch else torch.zeros(0, rows, dtype=torch.int32)
    return *new, *caches, slots


def good_arguments() -> dict:
    return dict(zip(NAMES, random_case(), strict=True))


def random_arguments(seed: int) -> dict:
    pick = Pick(seed)
    rows = pick(0, 1, 3, 4, 9, 16, 33)
    sizes = {
        "batch": pick(1, 2, 3),
        "heads": pick(1, 2, 5, 17),
        "rows": rows,
        "dim": pick(1, 8, 33, 64, 128, 256, 1030),
    }
    k, v, *caches, slots = random_case(**sizes, capacity=rows + pick(0, 1, 20), dtype=pick(*FLOATS), seed=seed)
    slots = torch.where(torch.rand(slots.shape, generator=pick.generator) < 0.2, -1, slots).int()
    if pick(False, True):  # as a projection's output is: [B, R, Hkv, D] in memory
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    for cache in caches:
        cache[..., ::3] = float("nan")  # old contents stay as they are
    plain = pick(False, True)  # whole vectors, where the sizes are
    return dict(zip(NAMES, (x if plain else relaid(x, pick) for x in (k, v, *caches, slots)), strict=True))


def stored(new, cache, slots):
    """The definition, one row at a time."""
    cache = cache.clone()
    for b in range(slots.shape[0]):
        for r, slot in enumerate(slots[b].tolist()):
            if slot >= 0:
                cache[b, :, slot] = new[b, :, r]
    return cache


def check(k, v, k_cache, v_cache, slots, backend):
    expected = stored(k, k_cache, slots), stored(v, v_cache, slots)
    assert store_kv(k, v, k_cache, v_cache, slots, backend=backend) is None
    for cache, wanted in zip((k_cache, v_cache), expected, strict=True):
        torch.testing.assert_close(cache, wanted, rtol=0, atol=0, equal_nan=True)


def test_rows_land_in_their_slots_and_nowhere_else(backend, seed):
    check(**random_arguments(seed), backend=backend)


@each_dtype
@pytest.mark.parametrize("dim", [1, 8, 33])
def test_rows_land_in_their_slots_and_the_rest_is_untouched(backend, dtype, dim):
    check(*random_case(dtype=dtype, dim=dim), backend)


@pytest.mark.parametrize("skipped", [[0], [4], [0, 1, 2, 3, 4]], ids=["first", "last", "all"])
def test_rows_with_slot_minus_one_are_skipped(backend, skipped):
    k, v, k_cache, v_cache, slots = random_case()
    slots[0, skipped] = -1
    check(k, v, k_cache, v_cache, slots, backend)


def test_strided_views_are_read_and_written_in_place(backend):
    k, v, k_cache, v_cache, slots = random_case(heads=4, dim=6)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)  # as a projection's output is: [B, R, Hkv, D] in memory
    v = torch.stack((v, v), dim=-1)[..., 0]
    backing = torch.zeros(2, 4, 30, 6)
    wide = backing[:, :, 3:25:2]
    wide.copy_(k_cache)
    v_cache = v_cache.transpose(2, 3).contiguous().transpose(2, 3)
    check(k, v, wide, v_cache, slots, backend)
    assert (backing[:, :, 4:25:2] == 0).all() and (backing[:, :, :3] == 0).all()


@pytest.mark.parametrize("empty", ["batch", "heads", "rows", "dim"])
def test_empty_sizes_are_fine(backend, empty):
    check(*random_case(**{empty: 0}), backend)


def test_cache_without_slots_takes_skipped_rows(backend):
    k, v, k_cache, v_cache, _ = random_case(capacity=5)
    none = torch.full((2, 5), -1, dtype=torch.int32)
    check(k, v, k_cache[:, :, :0], v_cache[:, :, :0], none, backend)


def test_nan_and_infinity_are_stored_as_they_are(backend):
    k, v, k_cache, v_cache, slots = random_case()
    k[:] = float("nan")
    v[:] = float("-inf")
    store_kv(k, v, k_cache, v_cache, slots, backend=backend)
    assert int(k_cache.isnan().sum()) == k.numel() and int(v_cache.isinf().sum()) == v.numel()


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_slots_behave_as_defined(backend, data):
    batch, capacity = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 6))
    rows = data.draw(st.integers(0, capacity))
    k, v, k_cache, v_cache, _ = random_case(batch, 2, rows, 3, capacity)
    slots = torch.zeros(batch, rows, dtype=torch.int32)
    for b in range(batch):
        order = data.draw(st.permutations(range(capacity)))[:rows]
        slots[b] = torch.tensor([slot if data.draw(st.booleans()) else -1 for slot in order], dtype=torch.int32)
    check(k, v, k_cache, v_cache, slots, backend)


SIZE = (2, 3, 5, 8)
REFUSED = [
    ("k", torch.zeros(2, 3, 5), ValueError, r"k must be \[B, Hkv, R, D\].*got \[2, 3, 5\]"),
    ("k", None, TypeError, "k must be a tensor, got NoneType"),
    ("k", torch.zeros(SIZE, dtype=torch.int32), TypeError, "k must be .*got torch.int32"),
    ("v", torch.zeros(2, 3, 4, 8), ValueError, r"v must be \[B, Hkv, R, D\] = \[2, 3, 5, 8\], got \[2, 3, 4, 8\]"),
    ("v", torch.zeros(SIZE, dtype=torch.float16), TypeError, "v must be torch.float32, got torch.float16"),
    ("k_cache", torch.zeros(2, 2, 11, 8), ValueError, r"k_cache must be .*\[2, 3, any, 8\], got \[2, 2, 11, 8\]"),
    ("k_cache", torch.zeros(2, 3, 11, 8).bfloat16(), TypeError, "k_cache must be torch.float32, got torch.bfloat16"),
    ("v_cache", torch.zeros(2, 3, 12, 8), ValueError, r"v_cache must be .*got \[2, 3, 12, 8\]"),
    ("slots", torch.zeros(2, 4, dtype=torch.int32), ValueError, r"slots must be \[B, R\] = \[2, 5\], got \[2, 4\]"),
    ("slots", torch.zeros(2, 5, dtype=torch.int64), TypeError, "slots must be torch.int32, got torch.int64"),
    ("slots", torch.full((2, 5), 11, dtype=torch.int32), ValueError, r"slots must be -1 or in \[0, 11\), got 11"),
    ("slots", torch.full((2, 5), -2, dtype=torch.int32), ValueError, r"slots must be -1 or in \[0, 11\), got -2"),
    ("slots", torch.zeros(2, 5, dtype=torch.int32, device="meta"), ValueError, "one device.*slots on meta"),
]


@backends("triton", "cuda")
@pytest.mark.parametrize("slot", [11, 2**31 - 1, -7])
def test_a_slot_out_of_range_is_skipped(backend, slot):
    """Where nobody looks at the values: the kernel itself writes nowhere else."""
    *given, slots = random_case()
    slots[1, 3] = -1
    expected = [stored(given[n], given[n + 2], slots) for n in (0, 1)]
    slots[1, 3] = slot
    device = device_of(backend)
    k, v, *caches = (x.to(device) for x in given)
    kernel_of(backend)(k, v, *caches, slots.to(device))
    assert all(torch.equal(cache.cpu(), wanted) for cache, wanted in zip(caches, expected, strict=True))


def kernel_of(backend):
    if backend == "cuda":
        return dispatch.operator("store_kv", backend)
    from simsd_kernels.store_kv import triton

    return triton.store_kv


@backends("emulation")
def test_rows_without_a_slot_are_not_read(counted):
    *given, slots = random_case(batch=1, heads=1, rows=4, dim=64, dtype=torch.bfloat16)
    slots[0, 1:] = -1
    counters = counted(lambda: store_kv(*given, slots, backend="cuda"))
    assert counters["launches"] == 1 and counters["loaded_bytes"] == 2 * 64 * 2
