"""The kernels of masked_attention against the definition in float64, whatever sees what, and the ways they go."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

from attentions import assert_right, in_pages, make, poisoned, random_call, random_intervals, run, see_all
from backends import CASES, backends, device_of, each_dtype, kernels, sized
from simsd_kernels import INF, Visibility, dispatch
from simsd_kernels.masked_attention import reference

OP = "masked_attention"
GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "temporal_masks.json").read_text())["masks"]
HALVES = (torch.bfloat16, torch.float16)
SPLIT, TILE = 256, 32
CASES = {**CASES, "triton": sized(60, interpreted=40)}  # each by both of Triton's kernels
pytestmark = kernels


@pytest.fixture
def work_of(counted):
    """The result of a call and what the emulated kernels did for it."""

    def run_(call):
        found = []
        work = counted(lambda: found.append(run(call, "cuda")))
        return found[0], work

    return run_


def test_any_lives_sizes_and_layouts(backend, seed):
    given, call = random_call(seed, least_dim=16 if backend == "triton" else 1, most_heads=sized(14, interpreted=4))
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
def test_every_family_of_masks(backend, family):
    if backend == "triton" and family.startswith("golden") and int(family[7:]) % 13:
        pytest.skip("every 13th: the interpreter is slow")
    mask = FAMILIES[family]
    queries, keys = mask.clock.shape[-1], mask.birth.shape[-1]
    call = poisoned(make(torch.bfloat16, 1, (2, 1), queries, keys, 64, lives=mask))
    assert torch.equal(reference.visible(call.clock, call.birth, call.death)[0], mask.dense())
    assert_right(run(call, backend), call)


def element(call, b):
    """Batch element b alone."""
    names = ("q", "k", "v", "clock", "birth", "death", "kv_len")
    return call.replace(**{name: getattr(call, name)[b : b + 1] for name in names})


@pytest.fixture
def multiprocessors():
    """Sets how many the emulated GPU has."""
    yield torch.ops.simsd_emulated.set_multiprocessors
    torch.ops.simsd_emulated.set_multiprocessors(4)


@backends("emulation")
@pytest.mark.parametrize("dim", [64, 96, 128, 200])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_few_and_many_rows_go_different_ways_to_the_same_bits(work_of, multiprocessors, dtype, dim):
    """Many blocks of rows walk over all keys; few spread the splits over blocks and add them up in a second kernel. One
    more finds out first what is live, two more where its list is needed."""
    multiprocessors(8)
    call = poisoned(make(dtype, 9, (3, 1), 6, 600, dim, [600, 411, 0, 256, 257, 1, 600, 600, 520]))
    together, work = work_of(call)
    assert work["launches"] == 2
    for b in (0, 1, 2, 4, 8):
        alone, work = work_of(element(call, b))
        assert work["launches"] == 4
        assert torch.equal(alone[0], together[b])


@backends("emulation")
@pytest.mark.parametrize("dim", [64, 128, 200])
@pytest.mark.parametrize("page_size", [None, 80], ids=["in order", "paged"])
def test_splits_key_groups_and_all_keys_are_added_up_to_the_same_bits(work_of, multiprocessors, dim, page_size):
    """A large GPU takes split by split; a small one whole key groups, but for the last of the list; of many rows a
    block takes all keys. The elements' lengths differ, and most tiles are dead."""
    keys, rows = 7 * 800, 3
    call = make(torch.bfloat16, 3, (2, 1), rows, keys, dim, [5300, 2100, 4097])
    generator = torch.Generator().manual_seed(dim)
    dead = torch.rand(3, keys // 32, generator=generator).repeat_interleave(32, 1) < 0.9
    call = call.replace(birth=torch.where(dead, INF, call.birth))
    if page_size is None:
        call = poisoned(call)
    else:
        call = in_pages(call, page_size, generator)[1]
    outs, blocks = [], set()
    for count in (1, 2, 132):
        multiprocessors(count)
        out, work = work_of(call)
        outs.append(out)
        blocks.add(work["blocks"])
    assert len(blocks) == 3
    multiprocessors(4)
    riders = 129 - rows
    more = call.replace(
        q=torch.nn.functional.pad(call.q, (0, 0, 0, riders)),
        clock=torch.nn.functional.pad(call.clock, (0, riders), value=-1),
    )
    walked, work = work_of(more)
    assert work["launches"] == 2
    outs.append(walked[:, :, :rows])
    for out in outs:
        assert out.any() and torch.equal(out.view(torch.int16), outs[0].view(torch.int16))
    if page_size is None:
        assert_right(outs[0], call)
        for b in range(3):
            assert torch.equal(work_of(element(call, b))[0][0], outs[0][b])


def first_rows(call, rows):
    return call.replace(q=call.q[:, :, :rows], clock=call.clock[:, :rows])


@each_dtype
def test_a_row_does_not_change_with_what_rides_along(backend, dtype):
    call = make(dtype, sized(3, interpreted=2), (2, 1), sized(70, interpreted=20), 300, 64)
    call = call.replace(clock=call.clock.clamp(min=0))
    out = run(call, backend)
    for rows in (
        (3,) if backend == "triton" else (1, 3, 9, 17, 40)
    ):  # 2 or 4 warps in a block, whole tiles of rows and parts
        assert torch.equal(run(first_rows(call, rows), backend), out[:, :, :rows])
    middle = call.replace(q=call.q[:, :, 13:20], clock=call.clock[:, 13:20])
    assert torch.equal(run(middle, backend), out[:, :, 13:20])
    lone = call.replace(**{name: getattr(call, name)[1:2] for name in ("q", "k", "v", "clock", "birth", "death")})
    assert torch.equal(run(lone, backend), out[1:2])


@each_dtype
def test_capacity_and_pages_do_not_change_a_bit(backend, dtype):
    call = make(dtype, 2, (2, 1), 5, 300, 80)
    out = run(call, backend)

    keys = sized(1040, interpreted=560)

    def grown(part, fill):
        shape = list(part.shape)
        axis = 2 if part.dim() == 4 else 1
        shape[axis] = keys - shape[axis]
        return torch.cat((part, torch.full(shape, fill, dtype=part.dtype)), dim=axis)

    garbage = float("nan")
    roomier = call.replace(
        k=grown(call.k, garbage), v=grown(call.v, garbage), birth=grown(call.birth, 0), death=grown(call.death, INF),
        kv_len=torch.full((2,), 300, dtype=torch.int32),
    )  # fmt: skip
    assert torch.equal(run(roomier, backend), out)
    for page_size in (80,) if backend == "triton" else (16, 80, 208):
        ordered, given = in_pages(roomier, page_size, torch.Generator().manual_seed(page_size))
        assert torch.equal(run(given, backend), run(ordered, backend))


@each_dtype
def test_strides_do_not_change_a_bit(backend, dtype):
    """Rows that are no whole aligned chunks are gathered, into the same products."""
    call = poisoned(make(dtype, 2, (4, 2), 6, 290, 32))
    out = run(call, backend)
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
    assert torch.equal(run(strided, backend), out)
    assert torch.equal(run(call.replace(k=odd), backend), out)
    assert torch.equal(run(strided.replace(v=call.v.transpose(2, 3).contiguous().transpose(2, 3)), backend), out)
    table = torch.arange(2, dtype=torch.int32)[:, None]
    pages = call.replace(
        k=call.k[:, :, :256].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3), v=call.v[:, :, :256],
        birth=call.birth[:, :256], death=call.death[:, :256], block_table=table,
    )  # fmt: skip
    assert torch.equal(run(pages, backend), run(pages.replace(k=pages.k.contiguous(), block_table=None), backend))


def bytes_of_tiles(tiles, dim, heads=1):
    return 2 * tiles * TILE * dim * 2 * heads


@backends("emulation")
@pytest.mark.parametrize("batch", [1, 9], ids=["few rows", "many rows"])
def test_only_keys_that_somebody_sees_are_loaded(work_of, batch):
    dim, queries, keys = 64, 4, 1024
    clock, birth, death = see_all(batch, queries, keys)
    row_bytes = batch * queries * (2 * dim * 2 + 4)  # of both heads, and the clock
    splits = 1 if batch > 1 else keys // SPLIT  # few rows: each split by a block that reads the queries
    whole = make(torch.bfloat16, batch, (2, 1), queries, keys, dim, lives=(clock, birth, death))
    assert work_of(whole)[1]["async_bytes"] == batch * bytes_of_tiles(keys // TILE, dim) + splits * row_bytes
    birth = torch.full_like(birth, INF)
    birth[:, 64:128] = 0  # two whole tiles
    birth[:, 700:703] = 0  # three keys of a tile, whose births and deaths are looked at
    some = make(torch.bfloat16, batch, (2, 1), queries, keys, dim, lives=(clock, birth, death))
    expected = batch * (bytes_of_tiles(2, dim) + 3 * (dim * 2 * 2 + 8)) + min(splits, 2) * row_bytes
    assert work_of(some)[1]["async_bytes"] == expected
    out, work = work_of(some.replace(clock=torch.full_like(clock, -1)))
    assert not out.any() and work["matrix_products"] == 0
    assert work["async_bytes"] == (row_bytes if batch > 1 else 0)  # nothing is listed for few rows
    cut = whole.replace(kv_len=torch.full((batch,), 96, dtype=torch.int32))
    assert work_of(cut)[1]["async_bytes"] == batch * bytes_of_tiles(3, dim) + row_bytes


@backends("emulation")
def test_products_skip_what_a_warp_does_not_see(work_of):
    """64 causal queries of one head are 4 warps over the same tiles of 32 keys: each leaves out those ahead of it."""
    call = make(torch.bfloat16, 1, (1, 1), 64, 64, 64, lives=Visibility.causal(64))
    per_tile = 4 * (64 // 16) + 2 * (64 // 8)  # scores, output
    assert work_of(call)[1]["matrix_products"] == (1 + 1 + 2 + 2) * per_tile


def test_dead_queries_in_a_tile_that_the_others_see_whole_return_zeros(backend):
    for batch in (1, 9):
        clock, birth, death = see_all(batch, 8, 300)
        clock[:, 1::2] = -1
        call = make(torch.float16, batch, (2, 1), 8, 300, 64, lives=(clock, birth, death))
        out = run(call, backend)
        assert_right(out, call)
        assert not out[:, :, 1::2].any() and out[:, :, ::2].any(-1).all()


def test_a_key_between_two_moments_is_unseen(backend):
    """Its life [5, 6] lies inside the span of the clocks {0, 10} of its tile, so only the exact test can tell."""
    call = make(torch.bfloat16, 1, (1, 1), 2, 3, 16)
    call = poisoned(
        call.replace(
            clock=torch.tensor([[0, 10]], dtype=torch.int32),
            birth=torch.tensor([[0, 5, 0]], dtype=torch.int32),
            death=torch.tensor([[INF, 6, INF]], dtype=torch.int32),
        )
    )
    assert_right(run(call, backend), call)


@each_dtype
@pytest.mark.parametrize("first, last", [(0, 5), (3, INF), (3, 5)], ids=["die early", "born late", "both"])
def test_a_tile_that_some_rows_see_whole_and_others_not_at_all(backend, first, last, dtype):
    call = make(dtype, 1, (1, 1), 4, 70, 16)
    call = call.replace(
        clock=torch.tensor([[0, 3, 5, 9]], dtype=torch.int32),
        birth=torch.full_like(call.birth, first),
        death=torch.full_like(call.death, last),
    )
    assert_right(run(call, backend), call)


@each_dtype
def test_scores_of_any_size_are_weighed_without_overflow(backend, dtype):
    """One key outweighs all others by far; it lies in the first, the last or a middle split, and after small ones."""
    for at in (0, 300, 599):
        call = make(dtype, 1, (1, 1), 3, 600, 64, lives=see_all(1, 3, 600))
        k = call.k.clone()
        k[0, 0, at] = 30 * call.q[0, 0].mean(0)
        call = call.replace(k=k, scale=20.0)
        out = run(call, backend)
        assert_right(out, call)
    huge = call.replace(q=call.q * 100, k=call.k * 100)
    assert_right(run(huge, backend), huge)


def test_scores_of_minus_infinity_weigh_nothing(backend):
    call = make(torch.bfloat16, 1, (1, 1), 2, 40, 64, lives=see_all(1, 2, 40))
    q, k = call.q.abs(), call.k.clone()
    k[0, 0, 7:9] = -torch.inf
    rest = [j for j in range(40) if j not in (7, 8)]
    fewer = call.replace(
        q=q, k=k[:, :, rest], v=call.v[:, :, rest], birth=call.birth[:, rest], death=call.death[:, rest]
    )
    assert_right(run(call.replace(q=q, k=k), backend), fewer)


@each_dtype
@pytest.mark.parametrize("batch", sized([1, 9], interpreted=[2]))
def test_nan_and_infinity_in_seen_keys_show_in_rows_that_see_them(backend, batch, dtype):
    for at, value in ((3, float("nan")), (290, float("nan")), (290, float("inf"))):
        call = make(dtype, batch, (2, 1), 3, 300, 64, lives=see_all(batch, 3, 300))
        k = call.k.clone()
        k[0, 0, at, 2] = value
        out = run(call.replace(k=k, q=call.q.abs()), backend)
        assert out[0].isnan().all() and not out[1:].isnan().any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("queries, keys", [(0, 5), (3, 0), (0, 0)])
def test_empty_inputs(backend, queries, keys, dtype):
    out = run(make(dtype, 2, (2, 1), queries, keys, 32), backend)
    assert out.shape == (2, 2, queries, 32) and not out.any()
    table = torch.zeros(2, 0, dtype=torch.int32)
    no_pages = make(dtype, 2, (2, 1), 3, 0, 32).replace(block_table=table, k=torch.zeros(4, 1, 16, 32, dtype=dtype))
    assert not run(no_pages.replace(v=no_pages.k), backend).any()


@backends("emulation")
def test_dead_slots_of_a_roomy_cache_cost_nothing(work_of):
    """150,000 slots of which 300 live: as much work as with 300 slots, but for finding that out."""
    queries, room = 4, 150_000
    small = make(torch.bfloat16, 1, (4, 1), queries, 300, 64, lives=see_all(1, queries, 300))
    pad = torch.nn.functional.pad
    large = small.replace(
        k=pad(small.k, (0, 0, 0, room - 300), value=torch.nan), v=pad(small.v, (0, 0, 0, room - 300), value=torch.nan),
        birth=pad(small.birth, (0, room - 300), value=INF), death=pad(small.death, (0, room - 300), value=INF),
    )  # fmt: skip
    (out, work), (expected, least) = work_of(large), work_of(small)
    assert torch.equal(out, expected)
    assert [work[name] for name in ("async_bytes", "matrix_products", "launches")] == [
        least[name] for name in ("async_bytes", "matrix_products", "launches")
    ]


@backends("emulation")
def test_a_plan_that_lies_at_an_odd_address_is_refused():
    call = make(torch.bfloat16, 1, (2, 1), 4, 300, 64)
    plan = dispatch.operator("attention_plan", "cuda")(call.clock, call.birth, call.death, 2, 1)
    odd = torch.cat((plan[:1], plan))[1:]
    with pytest.raises(RuntimeError, match="plan must be as attention_plan returns it"):
        dispatch.operator(OP, "cuda")(*call.arguments(), odd)


@pytest.mark.parametrize("number", range(sized(20, interpreted=2)))
def test_lives_that_end_before_they_begin(backend, number):
    call = make(torch.bfloat16, 2, (4, 2), 11, 330, 64, lives=random_intervals(2, 11, 330, number), seed=number)
    call = poisoned(call)
    assert_right(run(call, backend), call)


@pytest.mark.parametrize("what", ["unborn keys", "dead queries", "nothing cached", "no pages"])
def test_queries_that_see_nothing_return_zeros(backend, what):
    call = make(torch.float32, 2, (2, 1), 5, 80, 16)
    match what:
        case "unborn keys":
            call = poisoned(call.replace(birth=torch.full_like(call.birth, INF)))
        case "dead queries":
            call = poisoned(call.replace(clock=torch.full_like(call.clock, -1)))
        case "nothing cached":
            call = poisoned(call.replace(kv_len=torch.zeros(2, dtype=torch.int32)))
        case "no pages":
            call = in_pages(call, 16, torch.Generator())[1]
            call = call.replace(block_table=torch.full_like(call.block_table, -1))
    assert not run(call, backend).any()


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.3, 30.0])
def test_scale(backend, scale):
    call = make(torch.float32, 1, (2, 1), 4, 90, 32).replace(scale=scale)
    assert_right(run(call, backend), call)


@backends("triton", "cuda")
@pytest.mark.parametrize("dim", [8, 264])
def test_head_sizes_that_do_not_fit_are_refused_by_name(backend, dim):
    call = make(torch.float16, 1, (1, 1), 1, 1, dim)
    if backend == "triton":
        with pytest.raises(RuntimeError, match=f"triton: supports head sizes 16 to 256, got {dim}"):
            run(call, backend)
    elif dim > 256:
        given = [x.to(device_of(backend)) if torch.is_tensor(x) else x for x in call.arguments()]
        with pytest.raises(RuntimeError, match="cuda supports head sizes up to 256, got 264"):
            dispatch.operator(OP, backend)(*given)
