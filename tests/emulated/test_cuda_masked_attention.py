"""The CUDA kernels of masked_attention, run on the CPU, against the definition in float64."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import torch

import simsd_kernels
from simsd_kernels import INF, Visibility
from simsd_kernels.masked_attention import reference
from test_masked_attention import FLOATS, good_arguments, random_intervals

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "temporal_masks.json").read_text())["masks"]
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
HALVES = (torch.bfloat16, torch.float16)
SPLIT, TILE = 256, 32


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


def run(call, backend="cuda"):
    return simsd_kernels.masked_attention(*call.arguments(), backend=backend)


def counted(call):
    """The result and what the kernels did for it."""
    torch.ops.simsd_emulated.take_counters()
    return run(call), json.loads(torch.ops.simsd_emulated.take_counters())


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


def see_all(batch, queries, keys):
    births = torch.zeros(batch, keys, dtype=torch.int32)
    return torch.zeros(batch, queries, dtype=torch.int32), births, torch.full_like(births, INF)


def poisoned(call):
    """NaN and infinities in the K and V of every key that no query of its batch element sees."""
    seen = reference.visible(call.clock, call.birth, call.death, call.kv_len).any(1)[:, None, :, None]
    garbage = torch.full_like(call.k, float("nan"))
    garbage[..., ::2] = float("inf")
    return call.replace(k=torch.where(seen, call.k, garbage), v=torch.where(seen, call.v, garbage))


def paged(call, page_size, generator):
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


@pytest.mark.parametrize("seed", range(300))
def test_any_lives_sizes_and_layouts(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    dtype = pick(torch.float32, *HALVES, *HALVES)
    dim = pick(16, 32, 64, 80, 96, 128, 192, 256, *((1, 7, 40) if seed % 5 == 0 else (64,)))
    batch, kv_heads, group = pick(1, 1, 2, 3), pick(1, 1, 2), pick(1, 2, 3, 4, 7)
    queries = pick(1, 2, 4, 9, 17) if dim > 96 else pick(1, 3, 8, 16, 33)
    page_size = pick(None, None, 16, 32, 48, 256)
    keys = page_size * pick(1, 2, 5) if page_size else pick(1, 17, 64, 255, 257, 300, 520)
    kv_len = [int(torch.randint(-2, keys + 20, (), generator=generator)) for _ in range(batch)] if pick(0, 1) else None
    call = make(dtype, batch, (kv_heads * group, kv_heads), queries, keys, dim, kv_len, seed=seed)
    call = call.replace(scale=pick(None, None, None, 0.3, -0.5, 0.0, 4.0))
    if pick(0, 1):  # as a projection's output is: [B, Lq, Hq, D] in memory
        call = call.replace(q=call.q.transpose(1, 2).contiguous().transpose(1, 2))
    if page_size is None:
        call = given = poisoned(call)
        if pick(0, 1):  # a cache with room for more
            room = [torch.nn.functional.pad(part, (0, 0, 0, 9), value=float("nan")) for part in (call.k, call.v)]
            given = call.replace(k=room[0][:, :, :keys], v=room[1][:, :, :keys])
    else:
        call, given = paged(call, page_size, generator)
    for backend in ("cuda", "cpu"):
        assert_right(run(given, backend), call)


def golden_mask(case):
    return Visibility.from_labels(
        torch.tensor(case["token_labels"]), torch.tensor(case["block_ids"]), case["block_length"]
    )


FAMILIES = {
    "bidirectional": Visibility.bidirectional(90),
    "causal": Visibility.causal(70),
    "sliding_window": Visibility.sliding_window(150, 20),
    "block_causal": Visibility.block_causal(130, 16),
    "tree": Visibility.tree([-1, 0, 0, 1, 1, 2, 2, 3, -1, 8]),
    "temporal": Visibility.temporal([0, 1, 3, -1], 300, pending=True),
    "unrolled": Visibility.unrolled(3, 4, 270),
    **{f"golden_{number}": golden_mask(case) for number, case in enumerate(GOLDEN)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_masks(family):
    mask = FAMILIES[family]
    queries, keys = mask.clock.shape[-1], mask.birth.shape[-1]
    call = poisoned(make(torch.bfloat16, 1, (2, 1), queries, keys, 64, lives=mask))
    assert torch.equal(reference.visible(call.clock, call.birth, call.death)[0], mask.dense())
    assert_right(run(call), call)


@pytest.mark.parametrize("dim", [64, 96, 128, 200])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_few_and_many_rows_go_different_ways_to_the_same_bits(dtype, dim):
    """Many blocks of rows walk over all keys; few spread the splits over blocks and add them up in a second kernel."""
    call = poisoned(make(dtype, 9, (3, 1), 6, 600, dim, [600, 411, 0, 256, 257, 1, 600, 600, 520]))
    together, work = counted(call)
    assert work["launches"] == 1
    for b in (0, 1, 2, 4, 8):
        alone, work = counted(call.replace(**{
            name: getattr(call, name)[b : b + 1] for name in ("q", "k", "v", "clock", "birth", "death", "kv_len")
        }))  # fmt: skip
        assert work["launches"] == 2
        assert torch.equal(alone[0], together[b])


def first_rows(call, rows):
    return call.replace(q=call.q[:, :, :rows], clock=call.clock[:, :rows])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_row_does_not_change_with_what_rides_along(dtype):
    call = make(dtype, 3, (2, 1), 70, 300, 64)
    call = call.replace(clock=call.clock.clamp(min=0))
    out = run(call)
    for rows in (1, 3, 9, 17, 40):  # 2 or 4 warps in a block, whole tiles of rows and parts
        assert torch.equal(run(first_rows(call, rows)), out[:, :, :rows])
    middle = call.replace(q=call.q[:, :, 13:20], clock=call.clock[:, 13:20])
    assert torch.equal(run(middle), out[:, :, 13:20])
    lone = call.replace(**{name: getattr(call, name)[1:2] for name in ("q", "k", "v", "clock", "birth", "death")})
    assert torch.equal(run(lone), out[1:2])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_capacity_and_pages_do_not_change_a_bit(dtype):
    call = make(dtype, 2, (2, 1), 5, 300, 80)
    out = run(call)

    def grown(part, fill, keys=1040):
        shape = list(part.shape)
        axis = 2 if part.dim() == 4 else 1
        shape[axis] = keys - shape[axis]
        return torch.cat((part, torch.full(shape, fill, dtype=part.dtype)), dim=axis)

    garbage = float("nan")
    roomier = call.replace(
        k=grown(call.k, garbage), v=grown(call.v, garbage), birth=grown(call.birth, 0), death=grown(call.death, INF),
        kv_len=torch.full((2,), 300, dtype=torch.int32),
    )  # fmt: skip
    assert torch.equal(run(roomier), out)
    for page_size in (16, 80, 208):
        ordered, given = paged(roomier, page_size, torch.Generator().manual_seed(page_size))
        assert torch.equal(run(given), run(ordered))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides_do_not_change_a_bit(dtype):
    """Rows that are no whole aligned chunks are gathered, into the same products."""
    call = poisoned(make(dtype, 2, (4, 2), 6, 290, 32))
    out = run(call)
    odd = torch.empty(call.k.numel() + 1, dtype=dtype)[1:].view(call.k.shape)
    odd.copy_(call.k)
    strided = call.replace(
        q=call.q.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        k=torch.stack((call.k, call.k), -1).flatten(3)[..., ::2],
        v=call.v.transpose(1, 2).contiguous().transpose(1, 2),
        clock=call.clock.repeat(1, 3)[:, :6],
        birth=call.birth.t().contiguous().t(),
        death=call.death.repeat_interleave(2, 1)[:, ::2],
    )
    assert torch.equal(run(strided), out)
    assert torch.equal(run(call.replace(k=odd)), out)
    assert torch.equal(run(strided.replace(v=call.v.transpose(2, 3).contiguous().transpose(2, 3))), out)
    table = torch.arange(2, dtype=torch.int32)[:, None]
    pages = call.replace(
        k=call.k[:, :, :256].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), v=call.v[:, :, :256],
        birth=call.birth[:, :256], death=call.death[:, :256], block_table=table,
    )  # fmt: skip
    assert torch.equal(run(pages), run(pages.replace(k=pages.k.contiguous(), block_table=None)))


def bytes_of_tiles(tiles, dim, heads=1):
    return 2 * tiles * TILE * dim * 2 * heads


@pytest.mark.parametrize("batch", [1, 9], ids=["few rows", "many rows"])
def test_only_keys_that_somebody_sees_are_loaded(batch):
    dim, queries, keys = 64, 4, 1024
    clock, birth, death = see_all(batch, queries, keys)
    query_bytes = batch * queries * 2 * dim * 2 * (1 if batch > 1 else keys // SPLIT)  # few rows: in every split
    whole = make(torch.bfloat16, batch, (2, 1), queries, keys, dim, lives=(clock, birth, death))
    assert counted(whole)[1]["async_bytes"] == batch * bytes_of_tiles(keys // TILE, dim) + query_bytes
    birth = torch.full_like(birth, INF)
    birth[:, 64:128] = 0  # two whole tiles
    birth[:, 700:703] = 0  # three keys of a tile
    some = make(torch.bfloat16, batch, (2, 1), queries, keys, dim, lives=(clock, birth, death))
    assert counted(some)[1]["async_bytes"] == batch * (bytes_of_tiles(2, dim) + 3 * dim * 2 * 2) + query_bytes
    dead = some.replace(clock=torch.full_like(clock, -1))
    out, work = counted(dead)
    assert not out.any() and work["async_bytes"] == query_bytes and work["matrix_products"] == 0
    cut = whole.replace(kv_len=torch.full((batch,), 96, dtype=torch.int32))
    # Blocks of splits past the end do not even read their queries.
    assert counted(cut)[1]["async_bytes"] == batch * (bytes_of_tiles(3, dim) + queries * 2 * dim * 2)


def test_products_skip_what_a_warp_does_not_see():
    """64 causal queries of one head are 4 warps over the same tiles of 32 keys: each leaves out those ahead of it."""
    call = make(torch.bfloat16, 1, (1, 1), 64, 64, 64, lives=Visibility.causal(64))
    per_tile = 4 * (64 // 16) + 2 * (64 // 8)  # scores, output
    assert counted(call)[1]["matrix_products"] == (1 + 1 + 2 + 2) * per_tile


def test_dead_queries_in_a_tile_that_the_others_see_whole_return_zeros():
    for batch in (1, 9):
        clock, birth, death = see_all(batch, 8, 300)
        clock[:, 1::2] = -1
        call = make(torch.float16, batch, (2, 1), 8, 300, 64, lives=(clock, birth, death))
        out = run(call)
        assert_right(out, call)
        assert not out[:, :, 1::2].any() and out[:, :, ::2].any(-1).all()


def test_a_key_between_two_moments_is_unseen():
    """Its life [5, 6] lies inside the span of the clocks {0, 10} of its tile, so only the exact test can tell."""
    call = make(torch.bfloat16, 1, (1, 1), 2, 3, 16)
    call = poisoned(
        call.replace(
            clock=torch.tensor([[0, 10]], dtype=torch.int32),
            birth=torch.tensor([[0, 5, 0]], dtype=torch.int32),
            death=torch.tensor([[INF, 6, INF]], dtype=torch.int32),
        )
    )
    assert_right(run(call), call)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("first, last", [(0, 5), (3, INF), (3, 5)], ids=["die early", "born late", "both"])
def test_a_tile_that_some_rows_see_whole_and_others_not_at_all(first, last, dtype):
    call = make(dtype, 1, (1, 1), 4, 70, 16)
    call = call.replace(
        clock=torch.tensor([[0, 3, 5, 9]], dtype=torch.int32),
        birth=torch.full_like(call.birth, first),
        death=torch.full_like(call.death, last),
    )
    assert_right(run(call), call)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scores_of_any_size_are_weighed_without_overflow(dtype):
    """One key outweighs all others by far; it lies in the first, the last or a middle split, and after small ones."""
    for at in (0, 300, 599):
        call = make(dtype, 1, (1, 1), 3, 600, 64, lives=see_all(1, 3, 600))
        k = call.k.clone()
        k[0, 0, at] = 30 * call.q[0, 0].mean(0)
        call = call.replace(k=k, scale=20.0)
        out = run(call)
        assert_right(out, call)
    huge = call.replace(q=call.q * 100, k=call.k * 100)
    assert_right(run(huge), huge)


def test_scores_of_minus_infinity_weigh_nothing():
    call = make(torch.bfloat16, 1, (1, 1), 2, 40, 64, lives=see_all(1, 2, 40))
    q, k = call.q.abs(), call.k.clone()
    k[0, 0, 7:9] = -torch.inf
    rest = [j for j in range(40) if j not in (7, 8)]
    fewer = call.replace(
        q=q, k=k[:, :, rest], v=call.v[:, :, rest], birth=call.birth[:, rest], death=call.death[:, rest]
    )
    assert_right(run(call.replace(q=q, k=k)), fewer)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("batch", [1, 9])
def test_nan_and_infinity_in_seen_keys_show_in_rows_that_see_them(batch, dtype):
    for at, value in ((3, float("nan")), (290, float("nan")), (290, float("inf"))):
        call = make(dtype, batch, (2, 1), 3, 300, 64, lives=see_all(batch, 3, 300))
        k = call.k.clone()
        k[0, 0, at, 2] = value
        out = run(call.replace(k=k, q=call.q.abs()))
        assert out[0].isnan().all() and not out[1:].isnan().any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("queries, keys", [(0, 5), (3, 0), (0, 0)])
def test_empty_inputs(queries, keys, dtype):
    out = run(make(dtype, 2, (2, 1), queries, keys, 32))
    assert out.shape == (2, 2, queries, 32) and not out.any()
    table = torch.zeros(2, 0, dtype=torch.int32)
    no_pages = make(dtype, 2, (2, 1), 3, 0, 32).replace(block_table=table, k=torch.zeros(4, 1, 16, 32, dtype=dtype))
    assert not run(no_pages.replace(v=no_pages.k)).any()


def test_long_contexts_of_many_rows_take_no_more_scratch_than_documented():
    """Past 32 MiB of partial results one kernel serves the call."""
    queries, keys = 4, 150_000
    lives = see_all(1, queries, keys)
    lives[1][:] = INF  # all dead: no time is spent on products
    few = make(torch.bfloat16, 1, (1, 1), queries, keys, 64, lives=lives)
    assert counted(few)[1]["launches"] == 2
    many = make(torch.bfloat16, 1, (60, 1), queries, keys, 64, lives=(lives[0], *lives[1:]))
    assert counted(many)[1]["launches"] == 1


REFUSED = [
    ("q", torch.zeros(2, 4, 5), r"q must be \[B, Hq, Lq, D\].*got \[2, 4, 5\]"),
    ("q", torch.zeros(2, 5, 5, 16), "5 query heads are not a multiple of 2 key/value heads"),
    ("q", torch.zeros(2, 4, 5, 16, dtype=torch.int32), "q must be .*got torch.int32"),
    ("k", torch.zeros(2, 2, 70, 8), r"k must be \[B, Hkv, Lk, D\] = \[2, any, any, 16\], got \[2, 2, 70, 8\]"),
    ("k", torch.zeros(2, 2, 70, 16).half(), "k must be torch.float32, got torch.float16"),
    ("v", torch.zeros(2, 2, 69, 16), r"v must be \[B, Hkv, Lk, D\] = \[2, 2, 70, 16\], got \[2, 2, 69, 16\]"),
    ("clock", torch.zeros(2, 6).int(), r"clock must be \[B, Lq\] = \[2, 5\], got \[2, 6\]"),
    ("birth", torch.zeros(2, 71).int(), r"birth must be \[B, Lk\] = \[2, 70\], got \[2, 71\]"),
    ("death", torch.zeros(2, 70).bool(), "death must be torch.int32, got torch.bool"),
    ("kv_len", torch.zeros(3).int(), r"kv_len must be \[B\] = \[2\], got \[3\]"),
    ("block_table", torch.zeros(2, 1).int(), "a page must hold a multiple of 16 keys, from 16 to 256, got 70"),
    ("block_table", torch.zeros(3, 1).int(), r"block_table must be \[B, n_pages\] = \[2, any\], got \[3, 1\]"),
    ("block_table", torch.zeros(2, 1).long(), "block_table must be torch.int32, got torch.int64"),
]


@pytest.mark.parametrize("name, value, message", REFUSED)
def test_bad_input_is_refused_by_name_before_any_kernel_starts(name, value, message):
    torch.ops.simsd_emulated.take_counters()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.simsd_emulated.masked_attention(**{**good_arguments(), name: value})
    assert json.loads(torch.ops.simsd_emulated.take_counters())["launches"] == 0


def test_head_sizes_that_do_not_fit_are_refused_by_name():
    call = make(torch.bfloat16, dim=264)
    with pytest.raises(RuntimeError, match="cuda supports head sizes up to 256, got 264"):
        torch.ops.simsd_emulated.masked_attention(*call.arguments())


@pytest.mark.parametrize("seed", range(20))
def test_random_intervals_of_every_backends_tests(seed):
    call = make(torch.bfloat16, 2, (4, 2), 11, 330, 64, lives=random_intervals(2, 11, 330, seed), seed=seed)
    call = poisoned(call)
    assert_right(run(call), call)
