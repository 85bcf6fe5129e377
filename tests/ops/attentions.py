"""Calls of masked_attention at random or by hand, and what is a right answer for kernels in 16 bits."""

from __future__ import annotations

import dataclasses

import torch

from arguments import Pick
from backends import FLOATS, callable_of
from simsd_kernels import INF, Visibility
from simsd_kernels.masked_attention import reference

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
masked_attention = callable_of("masked_attention")


@dataclasses.dataclass(frozen=True)
class Call:
    q: torch.Tensor  # [B, Hq, Lq, D]
    k: torch.Tensor  # [B, Hkv, Lk, D]
    v: torch.Tensor  # [B, Hkv, Lk, D]
    clock: torch.Tensor  # [B, Lq]
    birth: torch.Tensor  # [B, Lk]
    death: torch.Tensor  # [B, Lk]
    kv_len: torch.Tensor | None = None
    scale: float | None = None
    block_table: torch.Tensor | None = None  # then k and v are [P, Hkv, page_size, D]

    def arguments(self):
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def run(call, backend):
    """Where Triton serves, both of its kernels do, and give the same bits."""
    if backend != "triton":
        return masked_attention(*call.arguments(), backend=backend)
    from simsd_kernels.masked_attention import triton

    before, found = triton.SPLIT_ROWS, []
    try:
        for triton.SPLIT_ROWS in (0, 1 << 30):
            found.append(masked_attention(*call.arguments(), backend=backend))
    finally:
        triton.SPLIT_ROWS = before
    assert torch.equal(found[0].view(torch.uint8), found[1].view(torch.uint8)) if found[0].numel() else True
    return found[0]


def random_lives(generator, batch, queries, keys):
    """Overlapping lives, a prefix that all see, dead keys (now and then a run of them) and some dead queries."""
    clock = torch.randint(0, 12, (batch, queries), generator=generator)
    clock[torch.rand(batch, queries, generator=generator) < 0.1] = -1
    birth = torch.randint(0, 14, (batch, keys), generator=generator)
    death = birth + torch.randint(0, 6, (batch, keys), generator=generator)
    death[torch.rand(batch, keys, generator=generator) < 0.3] = INF
    birth[:, : keys // 3], death[:, : keys // 3] = 0, INF
    birth[torch.rand(batch, keys, generator=generator) < 0.1] = INF
    if keys > 64:
        birth[:, keys // 2 : keys // 2 + int(torch.randint(150, (), generator=generator))] = INF
    return clock.int(), birth.int(), death.int()


def make(dtype, batch=1, heads=(2, 1), queries=4, keys=70, dim=64, kv_len=None, lives=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads[0], queries, dim), (batch, heads[1], keys, dim), (batch, heads[1], keys, dim))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    if lives is None:
        lives = random_lives(generator, batch, queries, keys)
    elif isinstance(lives, Visibility):
        lives = (part.reshape(-1, part.shape[-1]).expand(batch, -1) for part in (lives.clock, lives.birth, lives.death))
    return Call(q, k, v, *lives, None if kv_len is None else torch.tensor(kv_len, dtype=torch.int32))


def poisoned(call):
    """NaN and infinities in the K and V of every key that no query of its batch element sees."""
    seen = reference.visible(call.clock, call.birth, call.death, call.kv_len).any(1)[:, None, :, None]
    garbage = torch.full_like(call.k, float("nan"))
    garbage[..., ::2] = float("inf")
    return call.replace(k=torch.where(seen, call.k, garbage), v=torch.where(seen, call.v, garbage))


def in_pages(call, page_size, generator):
    """The same keys in pages, in any order among pages of garbage. Lk must be a multiple of page_size.

    Some pages are not there at all: the first result has their keys dead.
    """
    batch, heads, keys, dim = call.k.shape
    count = keys // page_size
    spare = int(torch.randint(1, 4, (), generator=generator))
    order = torch.randperm(batch * count + spare, generator=generator)[: batch * count].view(batch, count)
    pools = []
    for part in (call.k, call.v):
        pool = torch.full((batch * count + spare, heads, page_size, dim), float("nan")).to(part.dtype)
        pool[order.flatten()] = part.view(batch, heads, count, page_size, dim).transpose(1, 2).flatten(0, 1)
        pools.append(pool)
    holes = torch.rand(batch, count, generator=generator) < 0.2
    table = torch.where(holes, torch.where(order % 2 == 0, -1, len(pools[0])), order).int()
    dead = holes.repeat_interleave(page_size, 1)
    ordered = call.replace(birth=torch.where(dead, 2**31 - 1, call.birth).int())
    return poisoned(ordered), call.replace(k=pools[0], v=pools[1], block_table=table)


def plain(call):
    """What a user would write: dense mask, weights rounded to the dtype of V before the second product.

    A score adds one product after the other: how a BLAS cuts its sums, and so how it rounds, goes by the machine.
    """
    seen = reference.visible(call.clock, call.birth, call.death, call.kv_len)
    live = seen.any(1)[:, None, :, None]
    group = call.q.shape[1] // call.k.shape[1]
    k, v = (torch.where(live, part, 0).repeat_interleave(group, 1).float() for part in (call.k, call.v))
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = torch.zeros(*call.q.shape[:3], k.shape[2])
    for q_d, k_d in zip(call.q.float().unbind(3), k.unbind(3), strict=True):
        scores += q_d[:, :, :, None] * k_d[:, :, None]
    scores = (scores * scale).masked_fill(~seen[:, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0).to(call.q.dtype)
    return (weights.float() @ v).to(call.q.dtype)


def assert_right(out, call):
    """Error <= 2 x (error of the plain computation in the same dtype + the rounding of an output), elementwise."""
    assert call.block_table is None
    exact = reference.masked_attention(call.q.double(), call.k.double(), call.v.double(), *call.arguments()[3:8])
    assert out.dtype == call.q.dtype and out.shape == call.q.shape and out.isfinite().all()
    if not out.numel():
        return
    bound = 2 * ((plain(call).double() - exact).abs().amax() + EPSILON[call.q.dtype] * (1 + exact.abs()))
    worst = ((out.double() - exact).abs() / bound).max().item()
    assert worst <= 1, f"the error is {worst:.2f} times what is allowed"
    blind = ~reference.visible(call.clock, call.birth, call.death, call.kv_len).any(2)  # [B, Lq]
    assert (out.transpose(1, 2)[blind] == 0).all()


def random_call(seed, least_dim=1, most_heads=14):
    """A call, and the same with its keys in order, not in pages."""
    pick = Pick(seed)
    dtype = pick(*FLOATS, *FLOATS[1:])
    dim = max(least_dim, pick(16, 24, 32, 64, 80, 96, 128, 192, 256, *((1, 7, 40) if seed % 5 == 0 else (64,))))
    batch, kv_heads, group = pick(1, 1, 2, 3), pick(1, 1, 2), pick(1, 2, 3, 4, 7)
    group, batch = min(group, most_heads // kv_heads), min(batch, most_heads // 2)
    queries = pick(1, 2, 4, 9, 17) if dim > 96 else pick(1, 3, 8, 16, 33)
    page_size = pick(None, None, 16, 32, 48, 256)
    keys = page_size * pick(1, 2, 5) if page_size else pick(1, 17, 63, 64, 65, 255, 257, 300, 520)
    kv_len = [int(pick.integers(-2, keys + 20)) for _ in range(batch)] if pick(False, True) else None
    call = make(dtype, batch, (kv_heads * group, kv_heads), queries, keys, dim, kv_len, seed=seed)
    call = call.replace(scale=pick(None, None, None, 0.3, -0.5, 0.0, 4.0))
    if pick(False, True):  # as a projection's output is: [B, Lq, Hq, D] in memory
        call = call.replace(q=call.q.transpose(1, 2).contiguous().transpose(1, 2))
    if page_size is not None:
        ordered, given = in_pages(call, page_size, pick.generator)
        return given, ordered
    call = given = poisoned(call)
    if pick(False, True):  # a cache with room for more
        room = [torch.nn.functional.pad(part, (0, 0, 0, 9), value=float("nan")) for part in (call.k, call.v)]
        given = call.replace(k=room[0][:, :, :keys], v=room[1][:, :, :keys])
    return given, call


def random_qkv(batch=1, kv_heads=2, group=2, rows=5, keys=70, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator).to(dtype)

    q = draw(batch, kv_heads * group, rows, dim)
    return q, draw(batch, kv_heads, keys, dim), draw(batch, kv_heads, keys, dim)


def random_intervals(batch, rows, keys, seed=0, moments=12):
    """Clocks and lives in which every kind of key occurs: always seen, never, by some rows only."""
    generator = torch.Generator().manual_seed(seed)
    clock = torch.randint(-1, moments, (batch, rows), generator=generator)
    birth = torch.randint(0, moments + 3, (batch, keys), generator=generator)
    death = birth + torch.randint(-2, moments, (batch, keys), generator=generator)
    return clock.int(), birth.int(), death.int()


def batched(visibility: Visibility, batch: int = 1):
    vectors = visibility.clock, visibility.birth, visibility.death
    return tuple(vector.expand(batch, -1) for vector in vectors)


def see_all(batch: int, rows: int, keys: int):
    zeros = torch.zeros(batch, rows, dtype=torch.int32)
    births = torch.zeros(batch, keys, dtype=torch.int32)
    return zeros, births, torch.full_like(births, INF)


def paged(k, v, page_size, spare=3, seed=0):
    """K and V of whole pages in a pool of NaN, in random order: k_pages, v_pages, block_table."""
    batch, heads, keys, dim = k.shape
    count = batch * keys // page_size
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(count + spare, generator=generator)[:count]

    def pool(cache):
        pages = torch.full((count + spare, heads, page_size, dim), float("nan"), dtype=cache.dtype)
        lying = cache.view(batch, heads, -1, page_size, dim).transpose(1, 2).flatten(0, 1)
        return pages.index_copy(0, table, lying)

    return pool(k), pool(v), table.view(batch, -1).int()
