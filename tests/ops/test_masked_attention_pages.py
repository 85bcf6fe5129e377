"""Keys in pages: the bits of keys in order, whatever the order of the pages, and dead where there is none."""

from __future__ import annotations

import zlib

import pytest
import torch

from attentions import assert_right, in_pages, make, paged, random_intervals, random_qkv, run, see_all
from backends import backends, callable_of, device_of, each_dtype, kernels, sized
from simsd_kernels import dispatch
from test_masked_attention import good_arguments

OP = "masked_attention"
masked_attention = callable_of(OP)
fast = backends("reference", "cpu", "cuda")  # the interpreter is asked for less


@fast
@each_dtype
@pytest.mark.parametrize("page_size", [16, 48, 64, 240, 256])
def test_pages_in_any_order_give_the_bits_of_keys_in_order(backend, dtype, page_size):
    keys = page_size * -(-600 // page_size)
    q, k, v = random_qkv(2, 2, 3, 21, keys, 32, dtype)
    intervals = random_intervals(2, 21, keys)
    kv_len = torch.tensor([keys, keys - 37], dtype=torch.int32)
    expected = masked_attention(q, k, v, *intervals, kv_len, backend=backend)
    k_pages, v_pages, table = paged(k, v, page_size)
    out = masked_attention(q, k_pages, v_pages, *intervals, kv_len, None, table, backend=backend)
    assert torch.equal(out, expected)
    # Pools as a serving engine may lay them out: [P, page_size, Hkv, D] in memory, and a table cut from a longer one.
    k_pages, v_pages = (pages.transpose(1, 2).contiguous().transpose(1, 2) for pages in (k_pages, v_pages))
    longer = torch.cat((table, table.flip(1)), 1)[:, : table.shape[1]]
    out = masked_attention(q, k_pages, v_pages, *intervals, kv_len, None, longer, backend=backend)
    assert torch.equal(out, expected)


@each_dtype
@pytest.mark.parametrize("hole", sized([-1, -(2**31), 15, 2**31 - 1], interpreted=[-1, 15]))
def test_keys_without_a_page_are_dead(backend, dtype, hole):
    q, k, v = random_qkv(2, 1, 2, 9, 192, 24, dtype)
    clock, birth, death = random_intervals(2, 9, 192)
    clock[:, 0], death[:, ::3] = 2**31 - 1, 2**31 - 1
    k_pages, v_pages, table = paged(k, v, 32)
    assert k_pages.shape[0] == 15
    holes = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 1]]).bool()
    out = masked_attention(
        q, k_pages, v_pages, clock, birth, death, block_table=table.masked_fill(holes, hole), backend=backend
    )
    unborn = torch.where(holes.repeat_interleave(32, 1), 2**31 - 1, birth)
    gone = torch.where(holes.repeat_interleave(32, 1), -(2**31), death)
    assert torch.equal(out, masked_attention(q, k, v, clock, unborn.int(), gone.int(), backend=backend))
    none = torch.full_like(table, hole)
    for pages in (slice(None), slice(0)):
        blind = masked_attention(
            q, k_pages[pages], v_pages[pages], clock, birth, death, block_table=none, backend=backend
        )
        assert (blind == 0).all()


def test_a_page_may_serve_several_sequences(backend):
    q, k, v = random_qkv(2, 2, 2, 5, 64, 16)
    k, v = (cache[:1].expand(2, -1, -1, -1) for cache in (k, v))
    intervals = random_intervals(2, 5, 64)
    k_pages, v_pages, table = paged(k[:1], v[:1], 16)
    out = masked_attention(q, k_pages, v_pages, *intervals, block_table=table.expand(2, -1), backend=backend)
    assert torch.equal(out, masked_attention(q, k.clone(), v.clone(), *intervals, backend=backend))


@pytest.mark.parametrize("empty", ["batch", "rows", "keys"])
def test_empty_sizes_are_fine_with_pages(backend, empty):
    q, k, v = random_qkv(**{"batch": 2, "rows": 3, "keys": 32, empty: 0})
    table = torch.zeros(k.shape[0], k.shape[2] // 16, dtype=torch.int32)
    pages = torch.zeros(1, 2, 16, 16)
    out = masked_attention(
        q, pages, pages, *see_all(k.shape[0], q.shape[2], k.shape[2]), block_table=table, backend=backend
    )
    assert out.shape == q.shape and not out.any()


def test_gradients_flow_through_pages():
    q, k, v = (x.double() for x in random_qkv(1, 1, 1, 2, 32, 4))
    k_pages, v_pages, table = paged(k, v, 16, spare=0)
    table[0, 1] = -1
    intervals = see_all(1, 2, 32)
    inputs = [x.requires_grad_() for x in (q, k_pages, v_pages)]
    assert torch.autograd.gradcheck(
        lambda *qkv: masked_attention(*qkv, *intervals, block_table=table, backend="reference"), inputs
    )


PAGED_REFUSED = [
    ("block_table", torch.zeros(2, 4).long(), TypeError, "block_table must be torch.int32, got torch.int64"),
    (
        "block_table",
        torch.zeros(3, 4).int(),
        ValueError,
        r"block_table must be \[B, n_pages\] = \[2, any\], got \[3, 4\]",
    ),
    ("block_table", torch.zeros(8).int(), ValueError, r"block_table must be \[B, n_pages\] = .*got \[8\]"),
    ("block_table", torch.zeros(2, 3).int(), ValueError, r"birth must be \[B, Lk\] = \[2, 48\], got \[2, 64\]"),
    ("k", torch.zeros(9, 2, 16, 8), ValueError, r"k must be \[P, Hkv, page_size, D\] = .*got \[9, 2, 16, 8\]"),
    ("k", torch.zeros(8, 2, 16, 16), ValueError, r"v must be \[P, Hkv, page_size, D\] = \[8, 2, 16, 16\], got \[9"),
    ("v", torch.zeros(9, 2, 32, 16), ValueError, r"v must be \[P, Hkv, page_size, D\] = \[9, 2, 16, 16\], got \[9"),
    ("pages", torch.zeros(9, 2, 24, 16), ValueError, "multiple of 16 keys, from 16 to 256, got 24"),
    ("pages", torch.zeros(9, 2, 272, 16), ValueError, "multiple of 16 keys, from 16 to 256, got 272"),
    ("pages", torch.zeros(9, 2, 0, 16), ValueError, "multiple of 16 keys, from 16 to 256, got 0"),
    ("death", torch.zeros(2, 63).int(), ValueError, r"death must be \[B, Lk\] = \[2, 64\], got \[2, 63\]"),
]


@pytest.mark.parametrize("name, value, error, message", PAGED_REFUSED)
def test_bad_pages_are_refused_by_name(backend, name, value, error, message):
    pages = torch.zeros(9, 2, 16, 16)
    arguments = {**good_arguments(), "k": pages, "v": pages, "block_table": torch.zeros(2, 4).int()}
    arguments |= {"birth": torch.zeros(2, 64).int(), "death": torch.zeros(2, 64).int()}
    arguments |= {"k": value, "v": value} if name == "pages" else {name: value}
    with pytest.raises(error, match=message):
        masked_attention(**arguments)
    if backend != "triton":
        operator = torch.ops.simsd.masked_attention if backend == "reference" else dispatch.operator(OP, backend)
        with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
            operator(**{name: x.to(device_of(backend)) for name, x in arguments.items()})


# dtype, batch, (Hq, Hkv), Lq, pages of a sequence, keys of a page, D
PAGED = [
    (torch.float32, 1, (1, 1), 1, 1, 16, 16),
    (torch.float32, 2, (2, 1), 5, 7, 16, 24),
    (torch.float32, 2, (2, 2), 9, 3, 80, 40),
    (torch.float32, 1, (3, 1), 4, 2, 256, 128),
    (torch.float16, 3, (4, 2), 3, 5, 48, 64),
    (torch.float16, 1, (2, 1), 33, 6, 64, 128),
    (torch.float16, 2, (5, 1), 7, 19, 16, 80),
    (torch.float16, 1, (1, 1), 2, 3, 240, 32),
    (torch.bfloat16, 2, (4, 1), 8, 9, 32, 128),
    (torch.bfloat16, 1, (6, 2), 12, 4, 128, 64),
    (torch.bfloat16, 3, (2, 1), 1, 21, 16, 256),
    (torch.bfloat16, 2, (1, 1), 20, 5, 112, 96),
]


@kernels
@pytest.mark.parametrize("case", PAGED, ids=lambda case: "-".join(map(str, case)))
def test_pages_give_the_bits_of_keys_in_order(backend, case):
    dtype, batch, heads, queries, pages, page_size, dim = case
    keys, seed = pages * page_size, zlib.crc32(str(case).encode())
    call = make(dtype, batch, heads, queries, keys, dim, [keys - 5 * b for b in range(batch)], seed=seed)
    ordered, given = in_pages(call, page_size, torch.Generator().manual_seed(seed))
    out = run(given, backend)
    assert torch.equal(out, masked_attention(*ordered.arguments(), backend=backend))
    assert_right(out, ordered)


@each_dtype
def test_opcheck_of_pages(dtype):
    q, k, v = random_qkv(batch=2, keys=64, dtype=dtype)
    k_pages, v_pages, table = paged(k, v, 16)
    given = (q, k_pages, v_pages, *random_intervals(2, 5, 64), None, None, table)
    torch.library.opcheck(torch.ops.simsd.masked_attention, given)
