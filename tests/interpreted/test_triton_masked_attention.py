"""The Triton kernels of masked_attention against the reference in float64, on inputs drawn in the target dtype."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zlib

import pytest
import torch

import simsd_kernels
from simsd_kernels import INF, Visibility
from simsd_kernels.masked_attention import reference, triton

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "temporal_masks.json").read_text())["masks"]
KERNELS = ("few_rows", "many_rows")
EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


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
    block_table: torch.Tensor | None = None

    def arguments(self):
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


@pytest.fixture
def run(monkeypatch):
    """Calls the backend through the public function, with the kernel of the caller's choice."""

    def run(call, kernel="few_rows"):
        monkeypatch.setattr(triton, "SPLIT_ROWS", 0 if kernel == "many_rows" else 1 << 30)
        return simsd_kernels.masked_attention(*call.arguments(), backend="triton")

    return run


def random_vectors(generator, batch, queries, keys):
    """Overlapping lives, a fully visible prefix, dead keys and, now and then, a dead query."""
    clock = torch.randint(0, 12, (batch, queries), generator=generator)
    clock[torch.rand(batch, queries, generator=generator) < 0.1] = -1
    birth = torch.randint(0, 14, (batch, keys), generator=generator)
    death = birth + torch.randint(0, 6, (batch, keys), generator=generator)
    death[torch.rand(batch, keys, generator=generator) < 0.3] = INF
    birth[:, : keys // 3], death[:, : keys // 3] = 0, INF
    birth[torch.rand(batch, keys, generator=generator) < 0.1] = INF
    return clock.int(), birth.int(), death.int()


def make(dtype, batch, heads, queries, keys, dim, kv_len=None, visibility=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads[0], queries, dim), (batch, heads[1], keys, dim), (batch, heads[1], keys, dim))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    if visibility is None:
        vectors = random_vectors(generator, batch, queries, keys)
    else:
        vectors = (
            part.reshape(-1, part.shape[-1]).expand(batch, -1).int()
            for part in (visibility.clock, visibility.birth, visibility.death)
        )
    live = None if kv_len is None else torch.tensor(kv_len, dtype=torch.int32)
    return Call(q, k, v, *vectors, live)


def poisoned(call):
    """NaN and infinities in the K and V of every key that no query of its batch element sees."""
    seen = reference.visible(call.clock, call.birth, call.death, call.kv_len).any(1)[:, None, :, None]
    garbage = torch.full_like(call.k, float("nan"))
    garbage[..., ::2] = float("inf")
    return call.replace(k=torch.where(seen, call.k, garbage), v=torch.where(seen, call.v, garbage))


def plain(call):
    """What a user would write: dense mask, weights rounded to the dtype of V before the second product."""
    seen = reference.visible(call.clock, call.birth, call.death, call.kv_len)
    live = seen.any(1)[:, None, :, None]
    group = call.q.shape[1] // call.k.shape[1]
    k, v = (torch.where(live, part, 0).repeat_interleave(group, 1).float() for part in (call.k, call.v))
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = (call.q.float() @ k.transpose(2, 3) * scale).masked_fill(~seen[:, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0).to(call.q.dtype)
    return (weights.float() @ v).to(call.q.dtype)


def assert_right(out, call):
    """Error <= 2 x (error of the plain computation in the same dtype + the rounding of an output), elementwise."""
    exact = reference.masked_attention(call.q.double(), call.k.double(), call.v.double(), *call.arguments()[3:])
    assert out.dtype == call.q.dtype and out.shape == call.q.shape and out.isfinite().all()
    bound = 2 * ((plain(call).double() - exact).abs().amax() + EPSILON[call.q.dtype] * (1 + exact.abs()))
    worst = ((out.double() - exact).abs() / bound).max().item()
    assert worst <= 1, f"the error is {worst:.2f} times what is allowed"
    blind = ~reference.visible(call.clock, call.birth, call.death, call.kv_len).any(2)  # [B, Lq]
    assert (out.transpose(1, 2)[blind] == 0).all()


# dtype, batch, (Hq, Hkv), Lq, Lk, D, kv_len
SHAPES = [
    (torch.float32, 1, (1, 1), 1, 1, 16, None),
    (torch.float32, 2, (2, 1), 3, 63, 24, [63, 17]),
    (torch.float32, 1, (4, 2), 7, 300, 80, None),
    (torch.float32, 2, (1, 1), 5, 257, 128, [0, 256]),
    (torch.float32, 1, (6, 2), 2, 65, 256, None),
    (torch.float16, 1, (4, 1), 4, 64, 64, None),
    (torch.float16, 2, (5, 1), 13, 256, 96, [255, 1]),
    (torch.float16, 1, (2, 2), 33, 513, 128, None),
    (torch.float16, 1, (3, 3), 1, 129, 160, None),
    (torch.float16, 1, (8, 1), 8, 600, 32, [600]),
    (torch.bfloat16, 1, (4, 1), 4, 640, 128, None),
    (torch.bfloat16, 2, (2, 1), 31, 100, 128, [100, 50]),
    (torch.bfloat16, 1, (7, 1), 9, 255, 64, None),
    (torch.bfloat16, 1, (2, 1), 40, 191, 256, None),
    (torch.bfloat16, 3, (2, 2), 2, 40, 40, [40, 0, 7]),
]


def shape_id(shape):
    dtype, batch, heads, queries, keys, dim, kv_len = shape
    return f"{str(dtype)[6:]}-B{batch}-H{heads[0]}/{heads[1]}-Lq{queries}-Lk{keys}-D{dim}" + "-kv_len" * bool(kv_len)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_random_lives_with_garbage_in_unseen_keys(run, shape, kernel):
    call = poisoned(make(*shape, seed=zlib.crc32(shape_id(shape).encode())))
    assert_right(run(call, kernel), call)


def golden_mask(number):
    case = GOLDEN[number]
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
    **{f"golden_{number}": golden_mask(number) for number in (0, 13, 26, 39)},
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_masks(run, family, kernel):
    mask = FAMILIES[family]
    queries, keys = mask.clock.shape[-1], mask.birth.shape[-1]
    call = make(torch.float16, 1, (2, 1), queries, keys, 64, visibility=mask)
    assert torch.equal(reference.visible(call.clock, call.birth, call.death)[0], mask.dense())
    assert_right(run(call, kernel), call)


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_strides(run, kernel):
    clean = make(torch.float16, 2, (4, 2), 6, 70, 32)
    call = poisoned(clean)
    strided = call.replace(
        q=call.q.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        k=torch.stack((call.k, call.k), -1).flatten(3)[..., ::2],
        v=call.v.transpose(1, 2).contiguous().transpose(1, 2),
        clock=call.clock.repeat(1, 3)[:, :6],
        birth=call.birth.t().contiguous().t(),
        death=call.death.repeat_interleave(2, 1)[:, ::2],
    )
    assert not any(part.is_contiguous() for part in strided.arguments()[:6])
    assert torch.equal(run(strided, kernel), run(call, kernel))
    shared = clean.replace(birth=clean.birth[:1].expand(2, -1), k=clean.k[:1].expand(2, -1, -1, -1))
    assert_right(run(shared, kernel), shared)


@pytest.mark.parametrize("kernel", KERNELS)
def test_queries_that_see_nothing_return_zeros(run, kernel):
    call = make(torch.float32, 2, (2, 1), 5, 80, 16)
    dead = poisoned(call.replace(birth=torch.full_like(call.birth, INF)))
    assert (run(dead, kernel) == 0).all()
    asleep = poisoned(call.replace(clock=torch.full_like(call.clock, -1)))
    assert (run(asleep, kernel) == 0).all()
    empty = poisoned(call.replace(kv_len=torch.zeros(2, dtype=torch.int32)))
    assert (run(empty, kernel) == 0).all()


def test_a_key_between_two_moments_is_unseen(run):
    """Its life [5, 6] lies inside the span of the clocks {0, 10} of its tile, so only the exact test can tell."""
    call = make(torch.float32, 1, (1, 1), 2, 3, 16)
    call = poisoned(
        call.replace(
            clock=torch.tensor([[0, 10]], dtype=torch.int32),
            birth=torch.tensor([[0, 5, 0]], dtype=torch.int32),
            death=torch.tensor([[INF, 6, INF]], dtype=torch.int32),
        )
    )
    assert_right(run(call), call)


@pytest.mark.parametrize("first, last", [(0, 5), (3, INF), (3, 5)], ids=["die early", "born late", "both"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_tile_that_some_rows_see_whole_and_others_not_at_all(run, kernel, first, last):
    call = make(torch.float32, 1, (1, 1), 4, 70, 16)
    call = call.replace(
        clock=torch.tensor([[0, 3, 5, 9]], dtype=torch.int32),
        birth=torch.full_like(call.birth, first),
        death=torch.full_like(call.death, last),
    )
    assert_right(run(call, kernel), call)


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.3, 30.0])
def test_scale(run, scale):
    call = make(torch.float32, 1, (2, 1), 4, 90, 32).replace(scale=scale)
    assert_right(run(call), call)


@pytest.mark.parametrize("queries, keys", [(0, 5), (3, 0), (0, 0)])
def test_empty_inputs(run, queries, keys):
    call = make(torch.float16, 2, (2, 1), queries, keys, 32)
    out = run(call)
    assert out.shape == call.q.shape and (out == 0).all()


@pytest.mark.parametrize("dim", [8, 264])
def test_head_sizes_that_triton_does_not_take_are_refused_by_name(run, dim):
    with pytest.raises(RuntimeError, match=f"triton: supports head sizes 16 to 256, got {dim}"):
        run(make(torch.float16, 1, (1, 1), 1, 1, dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_kernels_give_the_same_bits(run, dtype):
    call = poisoned(make(dtype, 2, (3, 1), 30, 530, 80, [530, 411]))
    assert torch.equal(run(call, "few_rows"), run(call, "many_rows"))


def first_rows(call, rows):
    return call.replace(q=call.q[:, :, :rows], clock=call.clock[:, :rows])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_does_not_change_with_what_rides_along(run, dtype, kernel):
    call = make(dtype, 3, (2, 1), 36, 300, 64)
    call = call.replace(clock=call.clock.clamp(min=0))
    out = run(call, kernel)

    alone = call.replace(**{name: getattr(call, name)[1:2] for name in ("q", "k", "v", "clock", "birth", "death")})
    assert torch.equal(run(alone, kernel), out[1:2]), "batch"

    assert torch.equal(run(first_rows(call, 3), kernel), out[:, :, :3]), "rows"

    def grown(part, fill):
        shape = list(part.shape)
        shape[2 if part.dim() == 4 else 1] = 500
        return torch.cat((part, torch.full(shape, fill, dtype=part.dtype)), dim=2 if part.dim() == 4 else 1)

    garbage = float("nan")
    roomier = call.replace(
        k=grown(call.k, garbage), v=grown(call.v, garbage), birth=grown(call.birth, 0), death=grown(call.death, INF),
        kv_len=torch.full((3,), 300, dtype=torch.int32),
    )  # fmt: skip
    assert torch.equal(run(roomier, kernel), out), "capacity"


# dtype, batch, (Hq, Hkv), Lq, pages of a sequence, keys of a page, D, kernel
PAGED = [
    (torch.float32, 1, (1, 1), 1, 1, 16, 16, "few_rows"),
    (torch.float32, 2, (2, 1), 5, 7, 16, 24, "few_rows"),
    (torch.float32, 2, (2, 2), 9, 3, 80, 40, "many_rows"),
    (torch.float32, 1, (3, 1), 4, 2, 256, 128, "few_rows"),
    (torch.float16, 3, (4, 2), 3, 5, 48, 64, "few_rows"),
    (torch.float16, 1, (2, 1), 33, 6, 64, 128, "many_rows"),
    (torch.float16, 2, (5, 1), 7, 19, 16, 80, "few_rows"),
    (torch.float16, 1, (1, 1), 2, 3, 240, 32, "many_rows"),
    (torch.bfloat16, 2, (4, 1), 8, 9, 32, 128, "few_rows"),
    (torch.bfloat16, 1, (6, 2), 12, 4, 128, 64, "many_rows"),
    (torch.bfloat16, 3, (2, 1), 1, 21, 16, 256, "few_rows"),
    (torch.bfloat16, 2, (1, 1), 20, 5, 112, 96, "many_rows"),
]


def of_pages(call, page_size, holes, seed=0):
    """The call with its keys in pages of a pool of garbage; where `holes` [B, n_pages] the table names no page."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, keys, dim = call.k.shape
    count = batch * keys // page_size
    order = torch.randperm(count + 2, generator=generator)[:count]
    pools = []
    for cache in (call.k, call.v):
        pages = torch.full((count + 2, heads, page_size, dim), float("nan"), dtype=cache.dtype)
        pages[order] = cache.reshape(batch, heads, -1, page_size, dim).transpose(1, 2).flatten(0, 1)
        pools.append(pages)
    nowhere = torch.tensor([-1, count + 2, 2**31 - 1, -(2**31)])[torch.randint(4, holes.shape, generator=generator)]
    table = torch.where(holes, nowhere, order.view(batch, -1)).int()
    return call.replace(k=pools[0], v=pools[1], block_table=table)


@pytest.mark.parametrize("hole_rate", [0.0, 0.3])
@pytest.mark.parametrize("case", PAGED, ids=lambda case: "-".join(map(str, case)))
def test_pages_give_the_bits_of_keys_in_order(run, case, hole_rate):
    dtype, batch, heads, queries, pages, page_size, dim, kernel = case
    seed = zlib.crc32(str(case).encode())
    keys = pages * page_size
    call = make(dtype, batch, heads, queries, keys, dim, [keys - 5 * b for b in range(batch)], seed=seed)
    holes = torch.rand(batch, pages, generator=torch.Generator().manual_seed(seed)) < hole_rate
    dead = holes.repeat_interleave(page_size, 1)
    in_order = call.replace(birth=torch.where(dead, INF, call.birth))
    out = run(of_pages(call, page_size, holes, seed), kernel)
    assert torch.equal(out, run(in_order, kernel))
    assert_right(out, in_order)


def test_a_table_of_holes_sees_nothing(run):
    call = make(torch.float16, 2, (2, 1), 3, 64, 32)
    assert (run(of_pages(call, 16, torch.ones(2, 4).bool())) == 0).all()


def test_gradients_are_those_of_the_reference():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(1, heads, 20, 16, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    clock = torch.arange(20, dtype=torch.int32)[None] - 3
    for qkv, backend in ((ours, "triton"), (theirs, "reference")):
        out = simsd_kernels.masked_attention(*qkv, clock, clock + 3, torch.full_like(clock, INF), backend=backend)
        out.square().sum().backward()
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, expected.grad)
