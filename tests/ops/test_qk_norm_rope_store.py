"""QK-norm, rotary embedding and store in one call: what transformers' modules compute, rounded as they round."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from arguments import Pick, alike, relaid
from backends import FLOATS, backends, callable_of, device_of, each_dtype, kernels, sized
from roundings import Interval, assert_within, normed, roundings, times
from simsd_kernels import dispatch

qk_norm_rope_store = callable_of("qk_norm_rope_store")
LANES = ("q", "k", "v", "cos", "sin", "k_cache", "v_cache", "slots")
# Head size and rotary columns: whole units of 16 bytes and broken ones, more of them than a warp has lanes.
SIZES = [(128, 128), (128, 64), (64, 64), (64, 16), (256, 256), (256, 2), (256, 0), (80, 80), (80, 24), (96, 48)]
SIZES += [(48, 12), (33, 10), (17, 16), (8, 4), (2, 2), (1, 0), (255, 254), (192, 128), (16, 16)]


@dataclasses.dataclass
class Case:
    q: torch.Tensor  # [B, R, Hq, D]
    k: torch.Tensor  # [B, R, Hkv, D]
    v: torch.Tensor  # [B, R, Hkv, D]
    q_weight: torch.Tensor | None  # [D]
    k_weight: torch.Tensor | None  # [D]
    cos: torch.Tensor  # [B, R, D_rot]
    sin: torch.Tensor  # [B, R, D_rot]
    k_cache: torch.Tensor  # [B, Hkv, C, D]
    v_cache: torch.Tensor  # [B, Hkv, C, D]
    slots: torch.Tensor  # [B, R]
    eps: float = 1e-6

    def arguments(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def run(self, backend: str | None = None) -> torch.Tensor:
        return qk_norm_rope_store(**self.arguments(), backend=backend)

    def clone(self) -> Case:
        return Case(**{name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in self.arguments().items()})

    def replace(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)


def random_case(
    batch=2, rows=5, heads=(4, 2), dim=16, rotary=None, capacity=11, dtype=torch.float32, weights=(True, True), seed=0
) -> Case:
    """Views of one fused projection's output; angles as of random positions; weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    rotary = dim if rotary is None else rotary
    q_heads, kv_heads = heads

    def draw(*size):
        return torch.randn(size, generator=generator)

    fused = draw(batch, rows, (q_heads + 2 * kv_heads) * dim).mul(3).to(dtype)
    heads_of = fused.view(batch, rows, q_heads + 2 * kv_heads, dim)
    q, k, v = heads_of.split((q_heads, kv_heads, kv_heads), dim=2)
    q_weight, k_weight = ((1 + 0.3 * draw(dim)).to(dtype) if given else None for given in weights)
    position = torch.randint(0, 4000, (batch, rows, 1), generator=generator)
    angle = position * 1e4 ** (-torch.arange(0, rotary, 2) / max(rotary, 1))
    angle = torch.cat((angle, angle), -1)
    caches = [draw(batch, kv_heads, capacity, dim).to(dtype) for _ in range(2)]
    order = [torch.randperm(capacity, generator=generator)[:rows] for _ in range(batch)]
    slots = torch.stack(order).int() if batch else torch.zeros(0, rows, dtype=torch.int32)
    return Case(q, k, v, q_weight, k_weight, angle.cos().to(dtype), angle.sin().to(dtype), *caches, slots)


def good_arguments() -> dict:
    return random_case().arguments()


def random_arguments(seed: int) -> dict:
    pick = Pick(seed)
    rows = pick(0, 1, 2, 5, sized(17, interpreted=3))
    dim, rotary = pick(*SIZES)
    case = random_case(
        *(pick(1, 2, 3), rows, pick((1, 1), (4, 2), (5, 1), (3, 3), (9, 3), (0, 2), (2, 0)), dim, rotary),
        capacity=rows + pick(0, 1, 9),
        dtype=pick(*FLOATS),
        weights=pick((True, True), (True, True), (False, False), (True, False), (False, True)),
        seed=seed,
    )
    case.slots = torch.where(torch.rand(case.slots.shape, generator=pick.generator) < 0.2, -1, case.slots).int()
    scale = pick(1, 1, 1e-3, 100)
    case.q, case.k = case.q * scale, case.k * scale
    for cache in (case.k_cache, case.v_cache):
        cache[..., ::3] = float("nan")  # old contents stay as they are
    made = {name: relaid(x, pick) if torch.is_tensor(x) else x for name, x in case.arguments().items()}
    if pick(False, True):  # as the heads of one product lie
        made["q"] = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    if pick(False, False, True):
        made |= {name: made[name][:1].expand(made[name].shape) for name in ("cos", "sin")}
    return made | {"eps": pick(0.0, 1e-6, 1e-6, 1e-5, 0.5)}


def modules(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, Hq, R, D] and both caches as transformers' modules leave them, partly rotated as its families do it."""

    def by_module(x, weight):
        if weight is None:
            return x
        norm = Qwen3RMSNorm(weight.numel(), eps=case.eps).to(x.dtype)
        norm.weight.data.copy_(weight)
        with torch.no_grad():
            return norm(x)

    q, k = by_module(case.q, case.q_weight).transpose(1, 2), by_module(case.k, case.k_weight).transpose(1, 2)
    rotary = case.cos.shape[-1]
    turned = apply_rotary_pos_emb(q[..., :rotary], k[..., :rotary], case.cos, case.sin)
    q, k = (torch.cat((new, x[..., rotary:]), -1) for new, x in zip(turned, (q, k), strict=True))
    return q, stored(k, case.k_cache, case.slots), stored(case.v.transpose(1, 2), case.v_cache, case.slots)


def stored(x: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The cache [B, H, C, D] with x [B, H, R, D] in it."""
    cache = cache.clone()
    for b, row_slots in enumerate(slots.tolist()):
        for r, slot in enumerate(row_slots):
            if slot >= 0:
                cache[b, :, slot] = x[b, :, r]
    return cache


def allowed(x: torch.Tensor, weight: torch.Tensor | None, case: Case) -> Interval:
    """What x [B, R, H, D], normed and turned, may be: [B, H, R, D]."""
    least, largest = (x, x) if weight is None else times(roundings(normed(x, case.eps), x.dtype), weight)
    rotary = case.cos.shape[-1]
    (a, b), (c, d) = (end[..., :rotary].chunk(2, -1) for end in (least, largest))
    cos, sin = case.cos[:, :, None], case.sin[:, :, None]
    direct = times((least[..., :rotary], largest[..., :rotary]), cos)
    crossed = times((torch.cat((-d, a), -1), torch.cat((-b, c), -1)), sin)
    turned = (x + y for x, y in zip(direct, crossed, strict=True))
    ends = (torch.cat((x, end[..., rotary:]), -1) for x, end in zip(turned, (least, largest), strict=True))
    return tuple(end.transpose(1, 2) for end in ends)


def assert_as_modules(case: Case, out: torch.Tensor, before: Case) -> None:
    """Caches exactly where no key goes; queries and keys too, unless a normed value lies next to a boundary."""
    wanted = modules(before)
    assert alike(case.v_cache, wanted[2])
    queries, keys = allowed(before.q, before.q_weight, before), allowed(before.k, before.k_weight, before)
    caches = tuple(stored(end, before.k_cache, before.slots) for end in keys)
    for found, stands in ((out, case.k_cache), wanted[:2]):
        assert_within(queries, found)
        assert_within(caches, stands)
    assert out.is_contiguous()


def check(case: Case, backend: str) -> torch.Tensor:
    before = case.clone()
    out = case.run(backend)
    assert_as_modules(case, out, before)
    return out


def test_rows_are_normed_turned_and_stored(backend, seed):
    check(Case(**random_arguments(seed)), backend)


@each_dtype
@pytest.mark.parametrize(
    "dim, rotary", [(128, 128), (128, 64), (64, 64), (80, 40), (16, 0), (6, 2), (33, 10), (256, 256)]
)
def test_agrees_with_the_modules_of_transformers(backend, dtype, dim, rotary):
    rows = sized(9, interpreted=2)
    check(random_case(batch=2, rows=rows, dim=dim, rotary=rotary, dtype=dtype), backend)


@each_dtype
def test_reference_is_the_modules_bit_for_bit(dtype):
    case = random_case(rows=40, capacity=50, dim=128, dtype=dtype)
    expected = modules(case.clone())
    out = case.run("reference")
    for got, wanted in zip((out, case.k_cache, case.v_cache), expected, strict=True):
        assert torch.equal(got, wanted)


@each_dtype
@pytest.mark.parametrize("weights", [(False, False), (True, False), (False, True)], ids=["neither", "q", "k"])
def test_a_norm_can_be_left_out(backend, dtype, weights):
    check(random_case(weights=weights, dtype=dtype), backend)


@pytest.mark.parametrize("skipped", [[0], [4], [0, 1, 2, 3, 4]], ids=["first", "last", "all"])
def test_rows_with_slot_minus_one_are_not_stored_but_their_queries_are_served(backend, skipped):
    case = random_case()
    case.slots[0, skipped] = -1
    check(case, backend)


@kernels
@each_dtype
def test_any_strides_are_read_and_written_as_they_lie(backend, dtype):
    case = random_case(batch=2, rows=4, heads=(6, 3), dim=24, rotary=16, dtype=dtype)
    plain = case.clone()
    expected = check(plain, backend)
    case.q = case.q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    case.k = torch.stack((case.k, case.k), -1)[..., 0]
    case.v = case.v.transpose(1, 2).contiguous().transpose(1, 2)
    case.q_weight, case.k_weight = (torch.stack((w, w), -1)[:, 0] for w in (case.q_weight, case.k_weight))
    case.cos, case.sin = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.cos, case.sin))
    backing = torch.zeros(2, 3, 40, 24, dtype=dtype)
    k_cache = backing[:, :, 3:25:2]
    k_cache.copy_(case.k_cache)
    case.k_cache = k_cache
    case.v_cache = case.v_cache.transpose(2, 3).contiguous().transpose(2, 3)
    case.slots = torch.stack((case.slots, case.slots), -1).flatten(1)[:, ::2]
    # The order of a row's sum does not follow from how the row lies in memory (torch's, in the reference, does).
    assert torch.equal(case.run(backend), expected)
    assert torch.equal(case.k_cache, plain.k_cache) and torch.equal(case.v_cache, plain.v_cache)
    assert not backing[:, :, 4:25:2].any() and not backing[:, :, :3].any()


def test_angles_may_be_shared_by_all_sequences(backend):
    case = random_case()
    case = case.replace(cos=case.cos[:1].expand(2, -1, -1), sin=case.sin[:1].expand(2, -1, -1))
    check(case, backend)


@each_dtype
def test_a_row_is_bit_identical_whatever_rides_along(backend, dtype):
    case = random_case(batch=3, rows=17, capacity=40, heads=sized((6, 2), interpreted=(2, 1)), dim=80, dtype=dtype)
    alone = [case.clone() for _ in range(3)]
    out = case.run(backend)
    for b, rows in enumerate((slice(0, 1), slice(5, 9), slice(16, 17))):
        one = alone[b]
        for name in ("q", "k", "v", "cos", "sin", "slots"):
            setattr(one, name, getattr(one, name)[b : b + 1, rows])
        one.k_cache, one.v_cache = one.k_cache[b : b + 1], one.v_cache[b : b + 1]
        assert torch.equal(one.run(backend)[0], out[b, :, rows])
        slots = one.slots[0].long()
        assert torch.equal(one.k_cache[0, :, slots], case.k_cache[b, :, slots])


@pytest.mark.parametrize("empty", ["batch", "rows", "q heads", "kv heads", "heads", "dim"])
def test_empty_sizes_are_fine(backend, empty):
    heads = {"q heads": (0, 2), "kv heads": (4, 0), "heads": (0, 0)}
    case = random_case(**({"heads": heads[empty]} if empty in heads else {empty: 0}))
    out = case.run(backend)
    assert list(out.shape) == [case.q.shape[0], case.q.shape[2], case.q.shape[1], case.q.shape[3]]


def test_cache_without_slots_takes_skipped_rows(backend):
    case = random_case()
    case.slots.fill_(-1)
    check(case.replace(k_cache=case.k_cache[:, :, :0], v_cache=case.v_cache[:, :, :0]), backend)


@each_dtype
def test_a_row_of_zeros_stays_zero_and_nan_shows_in_its_head_alone(backend, dtype):
    case = random_case(dtype=dtype)
    case.q[0, 1, 2] = 0
    case.q[0, 2, 1, 3] = float("nan")
    case.v[1, 0, 0, 0] = float("nan")
    out = case.run(backend)
    assert not out[0, 2, 1].any()
    assert out[0, 1, 2].isnan().all() and int(out.isnan().sum()) == out.shape[-1]
    assert int(case.v_cache.isnan().sum()) == 1 and not case.k_cache.isnan().any()


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2, 3.0])
def test_eps_is_honoured(backend, eps):
    check(random_case().replace(eps=eps), backend)


SIZE = (2, 5, 4, 16)
KV = (2, 5, 2, 16)
ANGLES = (2, 5, 16)
CACHE = (2, 2, 11, 16)
REFUSED = [
    ("q", torch.zeros(2, 5, 4), ValueError, r"q must be \[B, R, Hq, D\].*got \[2, 5, 4\]"),
    ("q", None, TypeError, "q must be a tensor, got NoneType"),
    ("q", torch.zeros(SIZE).int(), TypeError, "q must be .*got torch.int32"),
    ("k", torch.zeros(2, 4, 2, 16), ValueError, r"k must be \[B, R, Hkv, D\] = \[2, 5, any, 16\], got \[2, 4, 2, 16\]"),
    ("k", torch.zeros(KV).half(), TypeError, "k must be torch.float32, got torch.float16"),
    ("v", torch.zeros(2, 5, 3, 16), ValueError, r"v must be \[B, R, Hkv, D\] = \[2, 5, 2, 16\], got \[2, 5, 3, 16\]"),
    ("v", torch.zeros(KV).bfloat16(), TypeError, "v must be torch.float32, got torch.bfloat16"),
    ("q_weight", torch.ones(8), ValueError, r"q_weight must be \[D\] = \[16\], got \[8\]"),
    ("q_weight", torch.ones(16).half(), TypeError, "q_weight must be torch.float32, got torch.float16"),
    ("k_weight", torch.ones(16, 1), ValueError, r"k_weight must be \[D\] = \[16\], got \[16, 1\]"),
    ("k_weight", 1.0, TypeError, "k_weight must be a tensor, got float"),
    ("cos", torch.zeros(1, 5, 16), ValueError, r"cos must be \[B, R, D_rot\] = \[2, 5, any\], got \[1, 5, 16\]"),
    ("cos", torch.zeros(ANGLES).half(), TypeError, "cos must be torch.float32, got torch.float16"),
    ("sin", torch.zeros(2, 5, 8), ValueError, r"sin must be \[B, R, D_rot\] = \[2, 5, 16\], got \[2, 5, 8\]"),
    ("sin", torch.zeros(ANGLES).half(), TypeError, "sin must be torch.float32, got torch.float16"),
    ("k_cache", torch.zeros(2, 3, 11, 16), ValueError, r"k_cache must be .*\[2, 2, any, 16\], got \[2, 3, 11, 16\]"),
    ("k_cache", torch.zeros(CACHE).half(), TypeError, "k_cache must be torch.float32, got torch.float16"),
    ("v_cache", torch.zeros(2, 2, 12, 16), ValueError, r"v_cache must be .*got \[2, 2, 12, 16\]"),
    ("v_cache", torch.zeros(CACHE).half(), TypeError, "v_cache must be torch.float32, got torch.float16"),
    ("slots", torch.zeros(2, 4).int(), ValueError, r"slots must be \[B, R\] = \[2, 5\], got \[2, 4\]"),
    ("slots", torch.zeros(2, 5).long(), TypeError, "slots must be torch.int32, got torch.int64"),
    ("slots", torch.full((2, 5), 11).int(), ValueError, r"slots must be -1 or in \[0, 11\), got 11"),
    ("slots", torch.full((2, 5), -2).int(), ValueError, r"slots must be -1 or in \[0, 11\), got -2"),
    ("slots", torch.zeros(2, 5, dtype=torch.int32, device="meta"), ValueError, "one device.*slots on meta"),
]


@pytest.mark.parametrize("columns", [7, 18])
def test_angles_that_fit_no_head_are_refused(backend, columns):
    angles = torch.zeros(2, 5, columns)
    good = random_case().arguments() | {"cos": angles, "sin": angles}
    message = f"cos and sin must have an even number of columns, at most 16, got {columns}"
    with pytest.raises(ValueError, match=message):
        qk_norm_rope_store(**good, backend=backend)
    if backend in ("cpu", "cuda"):
        with pytest.raises((RuntimeError, ValueError), match=message):
            dispatch.operator("qk_norm_rope_store", backend)(**good)


@each_dtype
def test_opcheck(dtype):
    for weights in ((True, True), (False, False)):
        case = random_case(dtype=dtype, weights=weights)
        torch.library.opcheck(torch.ops.simsd.qk_norm_rope_store, tuple(case.arguments().values()))


@kernels
@each_dtype
@pytest.mark.parametrize("dim, rotary", [(128, 128), (256, 64), (64, 0)])
def test_alignment_does_not_change_a_bit(backend, dtype, dim, rotary):
    aligned = random_case(rows=sized(5, interpreted=2), dim=dim, rotary=rotary, dtype=dtype)
    off = aligned.clone()
    roomy = torch.zeros(*off.q.shape[:3], dim + 1, dtype=dtype)[..., 1:]
    off.q = roomy.copy_(off.q)
    assert torch.equal(aligned.run(backend), off.run(backend))
    assert torch.equal(aligned.k_cache, off.k_cache) and torch.equal(aligned.v_cache, off.v_cache)


@backends("triton", "cuda")
@pytest.mark.parametrize("slot", [11, 2**31 - 1, -7])
def test_a_slot_out_of_range_is_skipped(backend, slot):
    """Where nobody looks at the values: the kernel itself writes nowhere else."""
    before = random_case()
    before.slots[0, 2] = slot
    device = device_of(backend)
    given = {name: x.clone().to(device) if torch.is_tensor(x) else x for name, x in before.arguments().items()}
    if backend == "cuda":
        out = dispatch.operator("qk_norm_rope_store", backend)(*given.values())
    else:
        from simsd_kernels.qk_norm_rope_store import triton

        out = triton.qk_norm_rope_store(*given.values())
    case = Case(**{name: x.cpu() if torch.is_tensor(x) else x for name, x in given.items()})
    before.slots[0, 2] = case.slots[0, 2] = -1
    assert_as_modules(case, out.cpu(), before)


@backends("triton", "cuda")
def test_larger_heads_are_refused_by_name(backend):
    case = random_case(dim=258)
    with pytest.raises(RuntimeError, match=f"{backend}: supports head sizes up to 256, got 258"):
        case.run(backend)
    if backend == "cuda":
        given = {name: x.to(device_of(backend)) if torch.is_tensor(x) else x for name, x in case.arguments().items()}
        with pytest.raises(RuntimeError, match="supports head sizes up to 256, got 258"):
            dispatch.operator("qk_norm_rope_store", backend)(*given.values())


@backends("emulation")
@pytest.mark.parametrize("dim, rotary", [(128, 128), (128, 64), (256, 256)])
def test_one_launch_reads_every_row_once_and_none_without_a_slot(counted, dim, rotary):
    case = random_case(batch=1, rows=3, heads=(4, 2), dim=dim, rotary=rotary, dtype=torch.bfloat16)
    case.slots[0, 1:] = -1
    head, angles = 2 * dim, 2 * 2 * rotary
    normed = 2 * head + angles  # a row, its weight, cos and sin
    counters = counted(lambda: case.run("cuda"))
    assert counters["launches"] == 1
    assert counters["loaded_bytes"] == (3 * 4 + 2) * normed + 2 * head
