"""`store_kv` on Triton: one program moves some heads of one row, keys and values, to the row's slot."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_warps": 2}
ELEMENTS = 1024  # of one side, per program: 16 bytes per thread and step in 16-bit types


@triton.jit(do_not_specialize=["n_rows", "n_heads", "n_slots"])
def scatter_rows(
    p_k,  # [B, Hkv, R, D]
    p_v,  # [B, Hkv, R, D]
    p_k_cache,  # out: [B, Hkv, C, D]
    p_v_cache,  # out: [B, Hkv, C, D]
    p_slots,  # int32 [B, R]
    n_rows,
    n_heads,
    n_slots,
    n_dim: tl.constexpr,
    stride_k_b,
    stride_k_h,
    stride_k_r,
    stride_k_d,
    stride_v_b,
    stride_v_h,
    stride_v_r,
    stride_v_d,
    stride_k_cache_b,
    stride_k_cache_h,
    stride_k_cache_c,
    stride_k_cache_d,
    stride_v_cache_b,
    stride_v_cache_h,
    stride_v_cache_c,
    stride_v_cache_d,
    stride_slots_b,
    stride_slots_r,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Bytes: every row with a slot read once and written once; one without is not read."""
    i_b = (tl.program_id(0) // n_rows).to(tl.int64)
    i_r = (tl.program_id(0) % n_rows).to(tl.int64)
    i_slot = tl.load(p_slots + i_b * stride_slots_b + i_r * stride_slots_r).to(tl.int64)
    o_h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    exists = (o_h < n_heads) & (o_d < n_dim)
    # Slots are trusted on a GPU, but one out of range is skipped rather than written elsewhere.
    if i_slot >= 0 and i_slot < n_slots:
        # [HEADS, BLOCK_D]
        b_k = tl.load(p_k + i_b * stride_k_b + i_r * stride_k_r + o_h * stride_k_h + o_d * stride_k_d, exists)
        b_v = tl.load(p_v + i_b * stride_v_b + i_r * stride_v_r + o_h * stride_v_h + o_d * stride_v_d, exists)
        p_k_cache += i_b * stride_k_cache_b + i_slot * stride_k_cache_c
        p_v_cache += i_b * stride_v_cache_b + i_slot * stride_v_cache_c
        tl.store(p_k_cache + o_h * stride_k_cache_h + o_d * stride_k_cache_d, b_k, exists)
        tl.store(p_v_cache + o_h * stride_v_cache_h + o_d * stride_v_cache_d, b_v, exists)


def configuration(dim: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(dim)
    return {"HEADS": max(1, ELEMENTS // block_d), "BLOCK_D": block_d}


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """See `api.store_kv`, which has checked the arguments."""
    if k.numel() == 0:
        return
    batch, heads, rows, dim = k.shape
    sizes = configuration(dim)
    strides = (*k.stride(), *v.stride(), *k_cache.stride(), *v_cache.stride(), *slots.stride())
    with torch.cuda.device(k.device) if k.is_cuda else contextlib.nullcontext():
        scatter_rows[(batch * rows, triton.cdiv(heads, sizes["HEADS"]))](
            k, v, k_cache, v_cache, slots, rows, heads, k_cache.shape[2], dim, *strides, **sizes, **OPTIONS
        )
