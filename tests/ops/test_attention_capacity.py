"""A row has the same bits however many places lie between the text and what is not committed, if that begins where
attention begins to sum anew."""

from __future__ import annotations

import pytest
import torch

from attentions import make, paged
from backends import FLOATS, backends, callable_of
from simsd_kernels import INF
from simsd_kernels.masked_attention.api import GROUP_KEYS, SPLIT_KEYS

OP = "masked_attention"
masked_attention = callable_of("masked_attention")
SUMMED = {"cpu": SPLIT_KEYS, "cuda": GROUP_KEYS}
CAPACITIES = range(1024, 9 * 1024 + 1, 256)
PREFIX, BLOCK, COPIES, DIM = 900, 16, 20, 16  # the copies lie in two splits


def rows(dtype: torch.dtype):
    """Keys of a text and of copies of the block behind it; queries of the copies, a moment for each."""
    call = make(dtype, 1, (2, 1), COPIES * BLOCK, PREFIX + COPIES * BLOCK, DIM)
    clock = torch.arange(1, COPIES + 1, dtype=torch.int32).repeat_interleave(BLOCK)[None]
    return call.q, call.k, call.v, clock


def lying(k, v, clock, capacity: int, summed: int):
    """Keys and values in a cache with room for `capacity` positions; what is written nowhere is NaN."""
    scratch = -(-capacity // summed) * summed
    total = scratch + COPIES * BLOCK
    place = torch.cat([torch.arange(PREFIX), scratch + torch.arange(COPIES * BLOCK)])
    caches = [torch.full((1, 1, total, DIM), float("nan"), dtype=x.dtype).index_copy(2, place, x) for x in (k, v)]
    birth = torch.full((1, total), INF, dtype=torch.int32)
    birth[:, :PREFIX] = 0
    death = torch.full_like(birth, INF)
    birth[:, scratch : scratch + COPIES * BLOCK] = death[:, scratch : scratch + COPIES * BLOCK] = clock
    return *caches, birth, death


@backends("cpu", "cuda")
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("page_size", [None, 64])
def test_a_rows_bits_do_not_depend_on_the_capacity(backend, dtype, page_size):
    q, k, v, clock = rows(dtype)
    expected = None
    for capacity in CAPACITIES:
        k_lying, v_lying, birth, death = lying(k, v, clock, capacity, SUMMED[backend])
        table = None
        if page_size is not None:
            k_lying, v_lying, table = paged(k_lying, v_lying, page_size, seed=capacity)
            first, last = -(-PREFIX // page_size), (birth.shape[1] - COPIES * BLOCK) // page_size
            table[:, first:last] = -1  # the gap has no pages
        # The first copy, one in the middle of a split, one behind a split's end and all of them.
        shown = [slice(n * BLOCK, (n + 1) * BLOCK) for n in (0, 7, COPIES - 1)] + [slice(None)]
        out = [
            masked_attention(
                q[:, :, at], k_lying, v_lying, clock[:, at], birth, death, block_table=table, backend=backend
            )
            for at in shown
        ]
        for at, alone in zip(shown, out, strict=True):
            assert torch.equal(alone, out[-1][:, :, at]), capacity
        expected = out[-1] if expected is None else expected
        assert torch.equal(out[-1], expected), capacity


@backends("cpu", "cuda")
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_a_copy_has_the_bits_of_the_first_wherever_it_lies(backend, dtype):
    q, k, v, clock = rows(dtype)
    for copy in range(1, COPIES):  # all of the first one's rows, keys and values
        at, first = slice(PREFIX + copy * BLOCK, PREFIX + (copy + 1) * BLOCK), slice(PREFIX, PREFIX + BLOCK)
        k[:, :, at], v[:, :, at] = k[:, :, first], v[:, :, first]
        q[:, :, copy * BLOCK : (copy + 1) * BLOCK] = q[:, :, :BLOCK]
    k, v, birth, death = lying(k, v, clock, 1024, SUMMED[backend])
    out = masked_attention(q, k, v, clock, birth, death, backend=backend).unflatten(2, (COPIES, BLOCK))
    for copy in range(COPIES):
        assert torch.equal(out[:, :, copy], out[:, :, 0]), copy
