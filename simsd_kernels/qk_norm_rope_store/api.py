"""What lies between the QKV projection and attention, in one launch: QK-norm, rotary embedding, store to the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.qk_norm_rope_store import reference

OP = "qk_norm_rope_store"
MAX_DIM = 256  # of the kernels that hold a head's row in registers


def qk_norm_rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Tensor:
    """Norms and rotates q and k, stores k and v to their cache slots in place, and returns q as attention takes it.

    Every step rounds as transformers' Qwen3Attention does: RMSNorm in float32, rounded to the dtype, times the weight
    in it; x * cos, rotate_half(x) * sin and their sum in it. What may differ from the modules is the order in which
    the D squares are added up and the reciprocal root, by some units in the last place of float32. For float32 that
    is the difference; in 16 bits it shows where it moves a normed value over the border between two of the dtype (one
    element in some ten thousands), which is then off by one unit in its last place. Without weights nothing differs.

    Args:
        q: [B, R, Hq, D] as the projection leaves it; float32, bfloat16 or float16 (`reference` also takes float64);
            any strides, so q, k and v may be views of one fused projection's output.
        k, v: [B, R, Hkv, D], the dtype of q; any strides.
        q_weight, k_weight: [D], of the RMSNorm over each head, in the dtype of q; None leaves out the norm.
        cos, sin: [B, R, D_rot] in the dtype of q, any strides (`expand` what all sequences share); D_rot is even and
            at most D. Columns i and i + D_rot / 2 are turned, those from D_rot on stay (partial rotary embedding).
        k_cache, v_cache: [B, Hkv, C, D], the dtype of q; any strides; written in place.
        slots: int32 [B, R], each -1 (store nothing) or in [0, C), none twice in a batch element.
        eps: added to the mean square.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        q, normed and rotated: [B, Hq, R, D], contiguous.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or slot, naming what was given; nothing is written then.
            On CUDA tensors slots are trusted (looking at them would make the host wait).
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.
    """
    arguments = (q, k, v, q_weight, k_weight, cos, sin, k_cache, v_cache, slots)
    check(*arguments)
    refuse_gradients(OP, *arguments)
    match dispatch.choose(OP, backend, q.device, lambda name: obstacle(name, q)):
        case "reference":
            return reference.qk_norm_rope_store(*arguments, eps)
        case "triton":
            from simsd_kernels.qk_norm_rope_store import triton

            return triton.qk_norm_rope_store(*arguments, eps)
        case compiled:
            return dispatch.operator(OP, compiled)(*arguments, eps)


def check(q, k, v, q_weight, k_weight, cos, sin, k_cache, v_cache, slots) -> None:
    weights = {name: w for name, w in (("q_weight", q_weight), ("k_weight", k_weight)) if w is not None}
    like_q = {"k": k, "v": v, **weights, "cos": cos, "sin": sin, "k_cache": k_cache, "v_cache": v_cache}
    for name, value in {"q": q, **like_q, "slots": slots}.items():
        validate.tensor(OP, name, value)
    validate.shape(OP, "q", q, (None,) * 4, "[B, R, Hq, D]")
    batch, rows, _, dim = q.shape
    validate.shape(OP, "k", k, (batch, rows, None, dim), "[B, R, Hkv, D]")
    kv_heads = k.shape[2]
    validate.shape(OP, "v", v, k.shape, "[B, R, Hkv, D]")
    for name, weight in weights.items():
        validate.shape(OP, name, weight, (dim,), "[D]")
    validate.shape(OP, "cos", cos, (batch, rows, None), "[B, R, D_rot]")
    rotary = cos.shape[2]
    validate.shape(OP, "sin", sin, (batch, rows, rotary), "[B, R, D_rot]")
    if rotary % 2 or rotary > dim:
        raise ValueError(f"{OP}: cos and sin must have an even number of columns, at most {dim}, got {rotary}")
    validate.shape(OP, "k_cache", k_cache, (batch, kv_heads, None, dim), "[B, Hkv, C, D]")
    capacity = k_cache.shape[2]
    validate.shape(OP, "v_cache", v_cache, (batch, kv_heads, capacity, dim), "[B, Hkv, C, D]")
    validate.shape(OP, "slots", slots, (batch, rows), "[B, R]")
    validate.dtype(OP, "q", q, (*validate.FLOATS, torch.float64))
    for name, value in like_q.items():
        validate.dtype(OP, name, value, q.dtype)
    validate.dtype(OP, "slots", slots, torch.int32)
    validate.same_device(OP, q=q, **like_q, slots=slots)
    validate.within(OP, "slots", slots, -1, capacity - 1, f"-1 or in [0, {capacity})")


def obstacle(backend: str, q: Tensor) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend == "reference":
        return None
    if q.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got {q.dtype}"
    if backend in ("triton", "cuda") and q.shape[3] > MAX_DIM:
        return f"supports head sizes up to {MAX_DIM}, got {q.shape[3]}"
    return None


def _reference(*arguments) -> Tensor:
    check(*arguments[:-1])
    return reference.qk_norm_rope_store(*arguments)


def _triton(*arguments) -> Tensor:
    from simsd_kernels.qk_norm_rope_store import triton

    check(*arguments[:-1])
    return triton.qk_norm_rope_store(*arguments)


def _why_not_triton(q, *_) -> str | None:
    return obstacle("triton", q)


implement(OP, _reference, _triton, _why_not_triton)
