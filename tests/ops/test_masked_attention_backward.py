"""The gradients of interval attention: those of its definition, on every backend, with no memory for the mask."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attentions import batched, random_call, random_intervals, random_qkv, see_all
from backends import FLOATS, backends, callable_of, each_dtype, sized
from simsd_kernels import INF, Visibility, masked_attention
from simsd_kernels.masked_attention import reference as forward

OP = "masked_attention_backward"
CASES = {"reference": 10, "cpu": 60, "triton": 6, "cuda": 1}  # CUDA has no kernel of this op
masked_attention_backward = callable_of(OP)
LANES = ("dout", "q", "k", "v", "out", "clock", "birth", "death", "kv_len")
any_head_size = backends("reference", "cpu")  # Triton takes 16 to 256
NAMES = ("dq", "dk", "dv")


def arguments(q, k, v, clock, birth, death, kv_len=None, scale=None, seed=5) -> dict:
    """Those of a backward: the forward's result, and some gradient of it."""
    intervals = {"clock": clock, "birth": birth, "death": death, "kv_len": kv_len}
    out = forward.masked_attention(q, k, v, **intervals, scale=scale)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)).to(q.dtype)
    return {"dout": dout, "q": q, "k": k, "v": v, "out": out, **intervals, "scale": scale}


def random_arguments(seed: int) -> dict:
    call = random_call(seed)[1]  # in order, where it is paged
    return arguments(*call.arguments()[:8], seed=seed)


def good_arguments() -> dict:
    return arguments(*random_qkv(batch=2), *see_all(2, 5, 70))


def exact(given: dict) -> list[torch.Tensor]:
    """The gradients of the forward's definition in float64, by autograd."""
    qkv = [given[name].double().requires_grad_() for name in "qkv"]
    rest = [given[name] for name in ("clock", "birth", "death", "kv_len", "scale")]
    return list(torch.autograd.grad(forward.masked_attention(*qkv, *rest), qkv, given["dout"].double()))


def plain(given: dict) -> list[torch.Tensor]:
    """What a user would write in this dtype, with a dense mask: weights and scores' gradients rounded to it."""
    q, k, v, dout = (given[name] for name in ("q", "k", "v", "dout"))
    seen = forward.visible(given["clock"], given["birth"], given["death"], given["kv_len"])
    live, blind = seen.any(1)[:, None, :, None], ~seen.any(2)[:, None, :, None]
    group = q.shape[1] // k.shape[1]
    k, v = (torch.where(live, x, 0).float().repeat_interleave(group, 1) for x in (k, v))
    q, dout = (torch.where(blind, 0, x).float() for x in (q, dout))
    scale = forward.factor(given["scale"], q.shape[-1])
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen[:, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    delta = (dout * given["out"].float()).sum(-1, keepdim=True)
    change = (weights * (dout @ v.transpose(-1, -2) - delta)).to(given["q"].dtype).float()
    weights = weights.to(given["q"].dtype).float()
    of_keys = (change.transpose(-1, -2) @ q * scale, weights.transpose(-1, -2) @ dout)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in of_keys)
    return [x.to(given["q"].dtype) for x in (change @ k * scale, dk, dv)]


def assert_right(found, given: dict) -> None:
    """The error in float64 is at most twice that of the plain computation in this dtype, plus roundings."""
    for name, x, wanted, other in zip(NAMES, found, exact(given), plain(given), strict=True):
        assert x.dtype == given["q"].dtype and x.shape == wanted.shape and x.isfinite().all(), name
        if not x.numel():
            continue
        largest = max(float(wanted.abs().amax()), float(given["dout"].abs().amax()) if name == "dv" else 0.0)
        band = 2 * torch.finfo(x.dtype).eps * largest + 32 * torch.finfo(torch.float32).eps * (1 + largest)
        allowed = 2 * (float((other.double() - wanted).abs().amax()) + band)
        error = float((x.double() - wanted).abs().amax())
        assert error <= allowed, f"{name}: the error is {error / allowed:.2f} times what is allowed"


def test_reference_is_the_gradient_of_the_forwards_definition():
    q, k, v = (x.double() for x in random_qkv(2, 1, 2, 3, 9, 4))
    clock, birth, death = random_intervals(2, 3, 9, seed=1)
    clock[0, 1] = -1
    kv_len = torch.tensor([9, 5], dtype=torch.int32)
    made = arguments(q, k, v, clock, birth, death, kv_len, 0.7)
    made["out"] = forward.masked_attention(q, k, v, clock, birth, death, kv_len, 0.7)
    for found, wanted in zip(masked_attention_backward(**made, backend="reference"), exact(made), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_random_calls_have_the_gradients_of_the_definition(backend, seed):
    made = random_arguments(seed)
    if backend == "triton" and made["q"].shape[3] < 16:
        pytest.skip("Triton takes head sizes 16 to 256")
    assert_right(masked_attention_backward(**made, backend=backend), made)


SIZES = [  # batch, kv heads, group, rows, keys, head size
    (1, 1, 1, 1, 1, 1),
    (2, 3, 1, 3, 7, 5),
    (1, 2, 5, 4, 63, 17),
    (2, 1, 4, 8, 64, 128),
    (1, 1, 7, 9, 257, 33),
    (3, 1, 8, 33, 129, 24),
    (1, 1, 2, 70, 1030, 7),
    (1, 1, 1, 2, 700, 256),
]


@any_head_size
@each_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_float64_at_any_size(backend, dtype, sizes):
    batch, _, _, rows, keys, _ = sizes
    made = arguments(*random_qkv(*sizes, dtype=dtype), *random_intervals(batch, rows, keys))
    assert_right(masked_attention_backward(**made, backend=backend), made)


MASKS = {
    "bidirectional": Visibility.bidirectional(40),
    "causal": Visibility.causal(90),
    "sliding window": Visibility.sliding_window(150, 9),
    "block-causal": Visibility.block_causal(sized(300, interpreted=90), 4),
    "draft tree": Visibility.tree([-1, 0, 0, 1, 1, 2, 3, 3, 7, -1, 9]),
    "unrolled": Visibility.unrolled(15, 4, prefix_length=64, pending=True),
}


@each_dtype
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_of_the_design(backend, dtype, mask):
    visibility = MASKS[mask]
    rows, keys = visibility.clock.numel(), visibility.birth.numel()
    made = arguments(*random_qkv(2, 1, 2, rows, keys, 16, dtype), *batched(visibility, 2))
    assert_right(masked_attention_backward(**made, backend=backend), made)


@any_head_size
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_intervals_have_the_gradients_of_the_definition(backend, data):
    batch, kv_heads, group = (data.draw(st.integers(1, top), label) for label, top in [("B", 3), ("Hkv", 3), ("G", 4)])
    rows, keys, dim = (data.draw(st.integers(1, top), label) for label, top in [("Lq", 40), ("Lk", 300), ("D", 40)])
    dtype = data.draw(st.sampled_from(FLOATS))
    seed, moments = data.draw(st.integers(0, 2**31)), data.draw(st.integers(1, 30))
    qkv = random_qkv(batch, kv_heads, group, rows, keys, dim, dtype, seed)
    made = arguments(*qkv, *random_intervals(batch, rows, keys, seed, moments))
    assert_right(masked_attention_backward(**made, backend=backend), made)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_what_nobody_sees_has_gradient_zero_whatever_it_holds(backend, poison):
    q, k, v = random_qkv(2, 1, 2, 7, 130, 16)
    clock, birth, death = random_intervals(2, 7, 130)
    birth[:, 30:90] = INF
    clock[:, 2] = -1
    kv_len = torch.tensor([130, 41], dtype=torch.int32)
    made = arguments(q, k, v, clock, birth, death, kv_len)
    seen = forward.visible(clock, birth, death, kv_len)
    live, blind = seen.any(1)[:, None, :, None], ~seen.any(2)[:, None, :, None]
    spoilt = {name: torch.where(blind, poison, made[name]) for name in ("dout", "q")}
    spoilt |= {name: torch.where(live, made[name], poison) for name in ("k", "v")}
    found = masked_attention_backward(**{**made, **spoilt}, backend=backend)
    assert_right(found, {**made, "k": torch.where(live, k, 0), "v": torch.where(live, v, 0)})
    assert not (found.q * blind).any() and not (found.k * ~live).any() and not (found.v * ~live).any()


def test_a_mask_of_nothing_gives_zeros(backend):
    q, k, v = random_qkv(rows=6, keys=90, dim=16)
    clock, birth, death = see_all(1, 6, 90)
    found = masked_attention_backward(**arguments(q, k, v, clock, torch.full_like(birth, INF), death), backend=backend)
    assert not any(x.any() or x.isnan().any() for x in found)


@any_head_size
@pytest.mark.parametrize("empty", ["batch", "rows", "keys", "dim", "group"])
def test_empty_sizes_are_fine(backend, empty):
    q, k, v = random_qkv(**{"batch": 2, "rows": 3, "keys": 4, empty: 0})
    made = arguments(q, k, v, *see_all(k.shape[0], q.shape[2], k.shape[2]))
    for found, x in zip(masked_attention_backward(**made, backend=backend), (q, k, v), strict=True):
        assert found.shape == x.shape and not found.any()


def test_strided_views_are_read_as_they_lie(backend):
    made = arguments(*random_qkv(2, 2, 2, 6, 80, 24), *random_intervals(2, 6, 80))
    expected = masked_attention_backward(**made, backend=backend)
    views = {name: made[name].transpose(2, 3).contiguous().transpose(2, 3) for name in ("q", "dout", "v")}
    views["k"] = torch.cat((made["k"], made["k"]), dim=2)[:, :, :80]
    views["out"] = made["out"].contiguous()
    for name in ("clock", "birth", "death"):
        views[name] = torch.stack((made[name], made[name] - 7), -1)[..., 0]
    for found, wanted in zip(masked_attention_backward(**{**made, **views}, backend=backend), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    same = made["dout"][:, :1, :1, :1].expand_as(made["dout"])  # as that of a sum is
    found = masked_attention_backward(**{**made, "dout": same}, backend=backend)
    assert_right(found, {**made, "dout": same.contiguous()})


@backends("cpu")
@each_dtype
def test_bits_do_not_depend_on_the_number_of_threads(backend, dtype, threads):
    made = arguments(*random_qkv(2, 3, 2, 45, 600, 24, dtype), *random_intervals(2, 45, 600))
    threads(1)
    expected = masked_attention_backward(**made, backend=backend)
    for count in (2, 3, 5):
        threads(count)
        found = masked_attention_backward(**made, backend=backend)
        assert all(torch.equal(x, wanted) for x, wanted in zip(found, expected, strict=True))


LENGTH, HEADS = 16_384, 8
MEASURED = f"""
import resource, torch
from simsd_kernels import Visibility, masked_attention
torch.set_num_threads(1)
window = Visibility.sliding_window({LENGTH}, 64)
def step(rows):
    q, k, v = (torch.randn(1, {HEADS}, rows, 16).requires_grad_() for _ in range(3))
    some = [vector[None, :rows] for vector in (window.clock, window.birth, window.death)]
    masked_attention(q, k, v, *some, backend="cpu").square().sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, v))
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step({LENGTH})
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@backends("cpu")
def test_a_training_step_takes_no_memory_for_scores(backend):
    """Of 16,384 tokens they would take 8.6 GB, and one byte for each head, query and key 2.1 GB."""
    ran = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < HEADS * LENGTH**2 / 8


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that torch makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x)]
        self.bytes = max(self.bytes, *(x.nbytes for x in tensors), 0)
        return out


@backends("triton")
def test_no_tensor_grows_with_queries_times_keys(backend):
    rows = 200
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 1, 2, rows, rows, 16))
    intervals = batched(Visibility.sliding_window(rows, 8))
    with Largest() as largest:
        masked_attention(q, k, v, *intervals, backend=backend).sum().backward()
    assert 0 < largest.bytes < rows * rows  # one byte each


@backends("cpu")
@pytest.mark.parametrize("capability", ["avx2", "portable"])
def test_narrower_instruction_sets_pass_the_same_tests(backend, capability):
    narrower = ("avx2", "portable")
    best = torch.ops.simsd._cpu_capability()
    if best in narrower[narrower.index(capability) :]:
        pytest.skip(f"the tests above ran on {best}")
    chosen = "cpu and (random_calls or any_size or nobody or any_intervals)"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env=os.environ | {"SIMSD_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout


def test_it_cannot_be_differentiated_and_says_what_can():
    made = good_arguments()
    made["v"] = made["v"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"masked_attention_backward: has no backward, but v requires grad"):
        masked_attention_backward(**made)


REFUSED = [
    ("q", torch.zeros(2, 4, 5), ValueError, r"q must be \[B, Hq, Lq, D\].*got \[2, 4, 5\]"),
    ("q", torch.zeros(2, 5, 5, 16), ValueError, "5 query heads are not a multiple of 2 key/value heads"),
    ("q", torch.zeros(2, 4, 5, 16).int(), TypeError, "q must be .*got torch.int32"),
    ("k", torch.zeros(2, 2, 70, 16).half(), TypeError, "k must be torch.float32, got torch.float16"),
    ("v", torch.zeros(2, 2, 69, 16), ValueError, r"v must be \[B, Hkv, Lk, D\] = .*got \[2, 2, 69, 16\]"),
    (
        "dout",
        torch.zeros(2, 4, 6, 16),
        ValueError,
        r"dout must be \[B, Hq, Lq, D\] = \[2, 4, 5, 16\], got \[2, 4, 6",
    ),
    ("dout", torch.zeros(2, 4, 5, 16).half(), TypeError, "dout must be torch.float32, got torch.float16"),
    ("out", torch.zeros(2, 5, 4, 16), ValueError, r"out must be \[B, Hq, Lq, D\] = \[2, 4, 5, 16\], got \[2, 5, 4, 16"),
    ("out", torch.zeros(2, 4, 5, 16).bfloat16(), TypeError, "out must be torch.float32, got torch.bfloat16"),
    ("clock", torch.zeros(2, 5).long(), TypeError, "clock must be torch.int32, got torch.int64"),
    ("birth", torch.zeros(2, 71).int(), ValueError, r"birth must be \[B, Lk\] = \[2, 70\], got \[2, 71\]"),
    ("death", torch.zeros(2, 70).bool(), TypeError, "death must be torch.int32, got torch.bool"),
    ("kv_len", torch.zeros(3).int(), ValueError, r"kv_len must be \[B\] = \[2\], got \[3\]"),
]


def test_what_only_python_can_be_given_is_refused():
    with pytest.raises(TypeError, match="dout must be a tensor, got NoneType"):
        masked_attention_backward(**{**good_arguments(), "dout": None})
    with pytest.raises(ValueError, match="one device.*out on meta"):
        masked_attention_backward(**{**good_arguments(), "out": torch.zeros(2, 4, 5, 16, device="meta")})
