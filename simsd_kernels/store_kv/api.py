"""Scatter of a forward's keys and values into cache slots."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.store_kv import reference

OP = "store_kv"


def store_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, *, backend: str | None = None
) -> None:
    """Writes `k_cache[b, :, slots[b, r]] = k[b, :, r]`, and v alike, in place; rows with slot -1 are skipped.

    Args:
        k, v: [B, Hkv, R, D], float32, bfloat16 or float16 (`reference` also takes float64); any strides.
        k_cache, v_cache: [B, Hkv, C, D], the dtype of k; any strides; written in place.
        slots: int32 [B, R], each -1 or in [0, C). No slot may occur twice in a batch element: which row would stay
            is undefined.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or slot, naming what was given; nothing is written then.
            On CUDA tensors slots are trusted (looking at them would make the host wait).
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.
    """
    check(k, v, k_cache, v_cache, slots)
    refuse_gradients(OP, k, v, k_cache, v_cache, slots)
    match dispatch.choose(OP, backend, k.device, lambda name: obstacle(name, k)):
        case "reference":
            reference.store_kv(k, v, k_cache, v_cache, slots)
        case "triton":
            from simsd_kernels.store_kv import triton

            triton.store_kv(k, v, k_cache, v_cache, slots)
        case compiled:
            dispatch.operator(OP, compiled)(k, v, k_cache, v_cache, slots)


def check(k, v, k_cache, v_cache, slots) -> None:
    for name, value in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache), ("slots", slots)):
        validate.tensor(OP, name, value)
    validate.shape(OP, "k", k, (None,) * 4, "[B, Hkv, R, D]")
    batch, heads, rows, dim = k.shape
    validate.shape(OP, "v", v, k.shape, "[B, Hkv, R, D]")
    validate.shape(OP, "k_cache", k_cache, (batch, heads, None, dim), "[B, Hkv, C, D]")
    validate.shape(OP, "v_cache", v_cache, k_cache.shape, "[B, Hkv, C, D]")
    validate.shape(OP, "slots", slots, (batch, rows), "[B, R]")
    validate.dtype(OP, "k", k, (*validate.FLOATS, torch.float64))
    for name, value in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        validate.dtype(OP, name, value, k.dtype)
    validate.dtype(OP, "slots", slots, torch.int32)
    validate.same_device(OP, k=k, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots)
    capacity = k_cache.shape[2]
    validate.within(OP, "slots", slots, -1, capacity - 1, f"-1 or in [0, {capacity})")


def obstacle(backend: str, k: Tensor) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend != "reference" and k.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got {k.dtype}"
    return None


def _reference(k, v, k_cache, v_cache, slots) -> None:
    check(k, v, k_cache, v_cache, slots)
    reference.store_kv(k, v, k_cache, v_cache, slots)


def _triton(k, v, k_cache, v_cache, slots) -> None:
    from simsd_kernels.store_kv import triton

    check(k, v, k_cache, v_cache, slots)
    triton.store_kv(k, v, k_cache, v_cache, slots)


def _why_not_triton(k, *_) -> str | None:
    return obstacle("triton", k)


implement(OP, _reference, _triton, _why_not_triton)
