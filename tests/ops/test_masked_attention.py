"""Interval attention: right to rounding on every backend, and bit-identical whatever rides along."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attentions import batched, random_call, random_intervals, random_qkv, see_all
from backends import FLOATS, backends, callable_of, each_dtype
from simsd_kernels import INF, Visibility, dispatch
from simsd_kernels.masked_attention import reference

OP = "masked_attention"
masked_attention = callable_of("masked_attention")
LANES = ("q", "k", "v", "clock", "birth", "death", "kv_len")
any_head_size = backends("reference", "cpu", "cuda")  # Triton takes 16 to 256
fast = backends("reference", "cpu", "cuda")  # test_masked_attention_kernels.py asks the interpreter for less


def assert_right(out, q, k, v, clock, birth, death, kv_len=None, scale=None):
    """The error in float64 is at most twice that of a plain torch computation in this dtype, plus rounding.

    The rounding band is one of the output, and one of the scores: a weight is off by that of the score it comes from.
    """
    exact = reference.masked_attention(q.double(), k.double(), v.double(), clock, birth, death, kv_len, scale)
    assert out.dtype == q.dtype and out.shape == q.shape
    if not out.numel():
        return
    plain = reference.masked_attention(q, k, v, clock, birth, death, kv_len, scale)
    live = reference.visible(clock, birth, death, kv_len).any(1)[:, None, :, None]
    k, v = torch.where(live, k, 0).double(), torch.where(live, v, 0).double()
    factor = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    score = factor * float(q.double().norm(dim=-1).amax()) * float(k.norm(dim=-1).amax()) if k.numel() else 0.0
    value = float(v.abs().amax()) if v.numel() else 0.0
    band = torch.finfo(q.dtype).eps * float(exact.abs().amax()) + torch.finfo(torch.float32).eps * score * value
    allowed = 2 * (float((plain.double() - exact).abs().amax()) + band)
    assert float((out.double() - exact).abs().amax()) <= allowed


def test_reference_is_the_definition_row_by_row():
    q, k, v = (tensor.double() for tensor in random_qkv(batch=2, keys=9, dim=4))
    clock, birth, death = random_intervals(2, 5, 9)
    out = reference.masked_attention(q, k, v, clock, birth, death)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(4) for i in range(5)):
        seen = [j for j in range(9) if birth[b, j] <= clock[b, i] <= death[b, j]]
        scores = torch.stack([q[b, h, i] @ k[b, h // 2, j] / 2 for j in seen]) if seen else torch.zeros(0)
        expected = torch.softmax(scores, 0) @ v[b, h // 2, seen] if seen else torch.zeros(4).double()
        torch.testing.assert_close(out[b, h, i], expected)


SIZES = [  # batch, kv heads, group, rows, keys, head size
    (1, 1, 1, 1, 1, 1),
    (2, 3, 1, 3, 7, 5),
    (1, 2, 5, 4, 63, 17),
    (2, 1, 4, 8, 64, 128),
    (1, 2, 3, 11, 65, 80),
    (1, 1, 7, 9, 257, 33),
    (1, 8, 4, 8, 300, 64),
    (3, 1, 8, 33, 129, 24),
    (1, 1, 2, 70, 1030, 7),
    (1, 1, 1, 2, 700, 256),
]


@any_head_size
@each_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_float64_at_any_size(backend, dtype, sizes):
    batch, _, _, rows, keys, _ = sizes
    q, k, v = random_qkv(*sizes, dtype=dtype)
    intervals = random_intervals(batch, rows, keys)
    assert_right(masked_attention(q, k, v, *intervals, backend=backend), q, k, v, *intervals)


@pytest.mark.parametrize("group", range(1, 9))
def test_query_heads_share_their_kv_head(backend, group):
    q, k, v = random_qkv(group=group, rows=3)
    intervals = random_intervals(1, 3, 70)
    out = masked_attention(q, k, v, *intervals, backend=backend)
    assert_right(out, q, k, v, *intervals)
    repeated = masked_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), *intervals, backend=backend
    )
    torch.testing.assert_close(out, repeated)


MASKS = {
    "bidirectional": Visibility.bidirectional(90),
    "causal": Visibility.causal(90),
    "sliding window": Visibility.sliding_window(150, 9),
    "block-causal": Visibility.block_causal(300, 4),
    "draft tree": Visibility.tree([-1, 0, 0, 1, 1, 2, 3, 3, 7, -1, 9]),
    "temporal": Visibility.temporal([2, 0, 1, -1], prefix_length=320, pending=True),
    "unrolled": Visibility.unrolled(15, 4, prefix_length=64, pending=True),
}


@any_head_size
@each_dtype
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_of_the_design(backend, dtype, mask):
    visibility = MASKS[mask]
    q, k, v = random_qkv(2, 1, 3, visibility.clock.numel(), visibility.birth.numel(), 16, dtype)
    intervals = batched(visibility, 2)
    out = masked_attention(q, k, v, *intervals, backend=backend)
    assert_right(out, q, k, v, *intervals)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=visibility.dense(), enable_gqa=True
    )
    assert float((out.double() - dense).abs().amax()) < 8 * torch.finfo(dtype).eps * float(v.abs().amax())


@fast
@each_dtype
def test_strided_views_are_read_as_they_lie(backend, dtype):
    q, k, v = random_qkv(2, 2, 2, 6, 80, 24, dtype)
    clock, birth, death = random_intervals(2, 6, 80)
    intervals = clock, birth, death
    expected = masked_attention(q, k, v, *intervals, backend=backend)
    views = {
        "projection": q.transpose(1, 2).contiguous().transpose(1, 2),  # [B, L, H, D] in memory
        "cache": torch.cat((k, k), dim=2)[:, :, :80],
        "columns": v.transpose(2, 3).contiguous().transpose(2, 3),  # last dimension not contiguous
    }
    out = masked_attention(views["projection"], views["cache"], views["columns"], *intervals, backend=backend)
    assert torch.equal(out, expected)
    every_other = [torch.stack((vector, vector - 7), -1).flatten(1)[:, ::2] for vector in intervals]
    columns = [torch.stack((tensor, tensor), -1)[..., 0] for tensor in (q, k, v)]
    assert torch.equal(masked_attention(*columns, *every_other, backend=backend), expected)
    shared = [tensor[:1].expand(2, -1, -1, -1) for tensor in (k, v)]
    torch.testing.assert_close(
        masked_attention(q, *shared, *intervals, backend=backend),
        masked_attention(q, *(tensor.contiguous() for tensor in shared), *intervals, backend=backend),
    )


@any_head_size
@pytest.mark.parametrize("empty", ["batch", "rows", "keys", "dim", "group"])
def test_empty_sizes_are_fine(backend, empty):
    q, k, v = random_qkv(**{"batch": 2, "rows": 3, "keys": 4, empty: 0})
    intervals = see_all(k.shape[0], q.shape[2], k.shape[2])
    out = masked_attention(q, k, v, *intervals, backend=backend)
    assert out.shape == q.shape and not out.any()


@each_dtype
def test_a_row_that_sees_nothing_is_zero(backend, dtype):
    q, k, v = random_qkv(rows=6, keys=150, dtype=dtype)
    clock, birth, death = see_all(1, 6, 150)
    clock[0, [1, 4]] = -1  # dead queries among live ones
    out = masked_attention(q, k, v, clock, birth, death, backend=backend)
    assert not out[:, :, [1, 4]].any() and out[:, :, [0, 2, 3, 5]].all()
    nothing = masked_attention(q, k, v, clock, torch.full_like(birth, INF), death, backend=backend)
    assert not nothing.any() and not nothing.isnan().any()


@fast
@each_dtype
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_garbage_in_unseen_keys_never_shows(backend, dtype, poison):
    q, k, v = random_qkv(batch=2, rows=7, keys=330, dtype=dtype)
    clock, birth, death = random_intervals(2, 7, 330)
    birth[:, 100:230] = INF  # whole tiles, and parts of tiles
    kv_len = torch.tensor([300, 41], dtype=torch.int32)
    seen = reference.visible(clock, birth, death, kv_len).any(1)[:, None, :, None]
    assert not seen.all() and seen[0, 0, :64].any() and not seen[0, 0, :64].all()
    zeroed = (torch.where(seen, x, 0) for x in (k, v))
    clean = masked_attention(q, *zeroed, clock, birth, death, kv_len, backend=backend)
    k, v = torch.where(seen, k, poison), torch.where(seen, v, poison)
    out = masked_attention(q, k, v, clock, birth, death, kv_len, backend=backend)
    assert_right(out, q, k, v, clock, birth, death, kv_len)
    torch.testing.assert_close(out, clean)


def test_a_key_weighs_exactly_nothing_for_a_row_that_does_not_see_it(backend):
    q, k, v = random_qkv(rows=4, keys=70)
    clock, birth, death = see_all(1, 4, 70)
    clock[0] = torch.tensor([0, 1, 0, 1])
    birth[0, 30:50] = 1  # rows 0 and 2 do not see these
    before = masked_attention(q, k, v, clock, birth, death, backend=backend)
    k[:, :, 30:50] *= 1e4
    v[:, :, 30:50] -= 1e4
    after = masked_attention(q, k, v, clock, birth, death, backend=backend)
    assert torch.equal(before[:, :, ::2], after[:, :, ::2])
    assert not torch.equal(before[:, :, 1::2], after[:, :, 1::2])


def test_kv_len_cuts_the_keys(backend):
    q, k, v = random_qkv(batch=4, keys=130)
    intervals = random_intervals(4, 5, 130)
    kv_len = torch.tensor([130, 67, 0, -3], dtype=torch.int32)
    out = masked_attention(q, k, v, *intervals, kv_len, backend=backend)
    assert_right(out, q, k, v, *intervals, kv_len)
    assert not out[2:].any()
    beyond = torch.full((4,), 1000, dtype=torch.int32)
    whole = masked_attention(q, k, v, *intervals, backend=backend)
    torch.testing.assert_close(masked_attention(q, k, v, *intervals, beyond, backend=backend), whole)


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0, 30.0])
def test_scale_is_honoured_and_large_scores_do_not_overflow(backend, scale):
    q, k, v = random_qkv(keys=300)
    intervals = random_intervals(1, 5, 300)
    out = masked_attention(q, k, v, *intervals, scale=scale, backend=backend)
    assert out.isfinite().all()
    assert_right(out, q, k, v, *intervals, scale=scale)


def test_nan_in_a_seen_key_shows(backend):
    q, k, v = random_qkv()
    k[0, 0, 3, 2] = float("nan")
    out = masked_attention(q, k, v, *see_all(1, 5, 70), backend=backend)
    assert out[:, :2].isnan().all() and not out[:, 2:].isnan().any()


@backends("cpu", "cuda")
@each_dtype
@pytest.mark.parametrize("dim", [24, 128])
def test_a_row_is_bit_identical_whatever_rows_and_batch_ride_along(backend, dtype, dim):
    q, k, v = random_qkv(3, 2, 3, 45, 600, dim, dtype)
    intervals = random_intervals(3, 45, 600)
    whole = masked_attention(q, k, v, *intervals, backend=backend)
    clock, birth, death = intervals
    for b, first, last in [(0, 0, 1), (1, 7, 8), (2, 44, 45), (1, 3, 9), (0, 5, 31)]:
        lone = masked_attention(
            *(q[b : b + 1, :, first:last], k[b : b + 1], v[b : b + 1]),
            *(clock[b : b + 1, first:last], birth[b : b + 1], death[b : b + 1]),
            backend=backend,
        )
        assert torch.equal(lone[0], whole[b, :, first:last])
    order = torch.tensor([2, 0, 1])
    moved = masked_attention(*(tensor[order] for tensor in (q, k, v, *intervals)), backend=backend)
    assert torch.equal(moved, whole[order])


@backends("cpu", "cuda")
@each_dtype
def test_a_row_is_bit_identical_whatever_the_capacity_and_the_threads(backend, dtype, threads):
    q, k, v = random_qkv(1, 1, 2, 9, 1500, 64, dtype)  # one KV head: the keys are split over the threads
    clock, birth, death = random_intervals(1, 9, 1500)
    expected = masked_attention(q, k, v, clock, birth, death, backend=backend)
    for count in (1, 2, 3, 5):
        threads(count)
        assert torch.equal(masked_attention(q, k, v, clock, birth, death, backend=backend), expected)
    room = (0, 0, 0, 777)
    unwritten = torch.nn.functional.pad(birth, (0, 777), value=INF), torch.nn.functional.pad(death, (0, 777), value=INF)
    larger = [torch.nn.functional.pad(tensor, room, value=float("nan")) for tensor in (k, v)]
    assert torch.equal(masked_attention(q, *larger, clock, *unwritten, backend=backend), expected)
    alive = torch.zeros(1, 777, dtype=torch.int32)
    grown = torch.cat((birth, alive), 1), torch.cat((death, alive + INF), 1)
    kv_len = torch.tensor([1500], dtype=torch.int32)
    assert torch.equal(masked_attention(q, *larger, clock, *grown, kv_len, backend=backend), expected)


@backends("cpu", "cuda")
def test_many_waves_of_splits_fold_to_the_same_bits(backend, threads):
    q, k, v = random_qkv(1, 1, 1, 2, 12000, 8)
    intervals = see_all(1, 2, 12000)
    threads(1)
    expected = masked_attention(q, k, v, *intervals, backend=backend)
    threads(2)
    assert torch.equal(masked_attention(q, k, v, *intervals, backend=backend), expected)
    assert_right(expected, q, k, v, *intervals)


@any_head_size
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_intervals_behave_as_defined(backend, data):
    batch, kv_heads, group = (data.draw(st.integers(1, top), label) for label, top in [("B", 3), ("Hkv", 3), ("G", 4)])
    rows, keys, dim = (data.draw(st.integers(1, top), label) for label, top in [("Lq", 40), ("Lk", 300), ("D", 40)])
    dtype = data.draw(st.sampled_from(FLOATS))
    seed, moments = data.draw(st.integers(0, 2**31)), data.draw(st.integers(1, 30))
    q, k, v = random_qkv(batch, kv_heads, group, rows, keys, dim, dtype, seed)
    intervals = random_intervals(batch, rows, keys, seed, moments)
    lengths = st.lists(st.integers(0, keys), min_size=batch, max_size=batch)
    kv_len = data.draw(st.none() | lengths.map(lambda values: torch.tensor(values, dtype=torch.int32)))
    seen = reference.visible(*intervals, kv_len).any(1)[:, None, :, None]
    k, v = torch.where(seen, k, float("nan")), torch.where(seen, v, float("inf"))
    assert_right(masked_attention(q, k, v, *intervals, kv_len, backend=backend), q, k, v, *intervals, kv_len)


def random_arguments(seed: int) -> dict:
    return dataclasses.asdict(random_call(seed)[0])


def good_arguments() -> dict:
    q, k, v = random_qkv(batch=2)
    return dict(zip(("q", "k", "v", "clock", "birth", "death"), (q, k, v, *see_all(2, 5, 70)), strict=True))


REFUSED = [
    ("q", torch.zeros(2, 4, 5), ValueError, r"q must be \[B, Hq, Lq, D\].*got \[2, 4, 5\]"),
    ("q", torch.zeros(2, 5, 5, 16), ValueError, "5 query heads are not a multiple of 2 key/value heads"),
    ("q", torch.zeros(2, 4, 5, 16).int(), TypeError, "q must be .*got torch.int32"),
    (
        "k",
        torch.zeros(2, 2, 70, 8),
        ValueError,
        r"k must be \[B, Hkv, Lk, D\] = \[2, any, any, 16\], got \[2, 2, 70, 8\]",
    ),
    ("k", torch.zeros(2, 2, 70, 16).half(), TypeError, "k must be torch.float32, got torch.float16"),
    (
        "v",
        torch.zeros(2, 2, 69, 16),
        ValueError,
        r"v must be \[B, Hkv, Lk, D\] = \[2, 2, 70, 16\], got \[2, 2, 69, 16\]",
    ),
    ("v", torch.zeros(2, 2, 70, 16).bfloat16(), TypeError, "v must be torch.float32, got torch.bfloat16"),
    ("clock", torch.zeros(2, 6).int(), ValueError, r"clock must be \[B, Lq\] = \[2, 5\], got \[2, 6\]"),
    ("clock", torch.zeros(2, 5).long(), TypeError, "clock must be torch.int32, got torch.int64"),
    ("birth", torch.zeros(2, 71).int(), ValueError, r"birth must be \[B, Lk\] = \[2, 70\], got \[2, 71\]"),
    ("birth", torch.zeros(2, 70), TypeError, "birth must be torch.int32, got torch.float32"),
    ("death", torch.zeros(70).int(), ValueError, r"death must be \[B, Lk\] = \[2, 70\], got \[70\]"),
    ("death", torch.zeros(2, 70).bool(), TypeError, "death must be torch.int32, got torch.bool"),
    ("kv_len", torch.zeros(3).int(), ValueError, r"kv_len must be \[B\] = \[2\], got \[3\]"),
    ("kv_len", torch.zeros(2).long(), TypeError, "kv_len must be torch.int32, got torch.int64"),
]
PAGES_OF_NO_SIZE = [
    (
        "block_table",
        torch.zeros(2, 1).int(),
        ValueError,
        "a page must hold a multiple of 16 keys, from 16 to 256, got 70",
    ),
]


def test_what_only_python_can_be_given_is_refused():
    with pytest.raises(TypeError, match="q must be a tensor, got NoneType"):
        masked_attention(**{**good_arguments(), "q": None})
    with pytest.raises(ValueError, match="one device.*clock on meta"):
        masked_attention(**{**good_arguments(), "clock": torch.zeros(2, 5, dtype=torch.int32, device="meta")})


@each_dtype
def test_opcheck(dtype):
    arguments = (*random_qkv(batch=2, dtype=dtype), *random_intervals(2, 5, 70))
    torch.library.opcheck(torch.ops.simsd.masked_attention, arguments)
    kv_len = torch.tensor([3, 70], dtype=torch.int32)
    torch.library.opcheck(torch.ops.simsd.masked_attention, (*arguments, kv_len, 0.5))


NARROWER = ("avx2", "portable")  # what the tests above do not run where the machine has AVX-512


@backends("emulation")
@pytest.mark.parametrize("name, value, error, message", [*REFUSED, *PAGES_OF_NO_SIZE])
def test_bad_input_is_refused_by_name_before_any_kernel_starts(counted, name, value, error, message):
    def call():
        with pytest.raises(RuntimeError, match=message):
            dispatch.operator(OP, "cuda")(**{**good_arguments(), name: value})

    assert counted(call)["launches"] == 0


@backends("cpu")
@pytest.mark.parametrize("capability", NARROWER)
def test_narrower_instruction_sets_pass_the_same_tests(backend, capability):
    best = torch.ops.simsd._cpu_capability()
    if best in NARROWER[NARROWER.index(capability) :]:
        pytest.skip(f"the tests above ran on {best}")
    pytest_on = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    chosen = "float64 or unseen or bit_identical or sees_nothing or behave or page"
    ran = subprocess.run(
        [*pytest_on, __file__, __file__.replace(".py", "_pages.py"), "-k", f"cpu and ({chosen})"],
        env=os.environ | {"SIMSD_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout


@backends("cpu")
def test_an_unknown_instruction_set_is_refused_by_name(backend):
    code = "import torch, simsd_kernels; torch.ops.simsd._cpu_capability()"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"SIMSD_CPU_CAPABILITY": "avx3"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode != 0
    assert "SIMSD_CPU_CAPABILITY='avx3' is unknown: choose one of avx512, avx2, portable" in ran.stderr
