"""`qk_norm_rope_store` on Triton: one program serves some heads of one row, of q, of k or of v."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from simsd_kernels.triton_arithmetic import rounded

# Without contraction to FMA every product and sum rounds as the modules' do.
OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}
ELEMENTS = 512  # of a program's tile


@triton.jit
def norm_scale(b_x, eps, n_dim: tl.constexpr):
    """[HEADS, BLOCK_D], 0 past D -> [HEADS, 1]"""
    return tl.rsqrt(tl.sum(b_x * b_x, 1) / n_dim + eps)[:, None]


@triton.jit
def norm_turn_store(
    p_from, p_weight, p_cos, p_sin, p_to, eps, o_h, n_heads, stride_h, stride_d, stride_weight_d, stride_cos_d,
    stride_sin_d, stride_to_h, stride_to_d, n_dim: tl.constexpr, n_rotary: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Reads a row's heads twice, the second time as the column that each turns with; that comes from the cache."""
    HALF: tl.constexpr = n_rotary // 2
    dtype: tl.constexpr = p_from.dtype.element_ty
    o_d = tl.arange(0, BLOCK_D)
    o_partner = tl.where(o_d < HALF, o_d + HALF, o_d - HALF)
    turns = o_d < n_rotary
    exists = (o_h < n_heads)[:, None] & (o_d < n_dim)[None, :]
    o_d64 = o_d.to(tl.int64)[None, :]
    o_partner64 = o_partner.to(tl.int64)[None, :]
    p_heads = p_from + o_h.to(tl.int64)[:, None] * stride_h
    # [HEADS, BLOCK_D]
    b_x = tl.load(p_heads + o_d64 * stride_d, exists, 0.0).to(tl.float32)
    b_y = tl.load(p_heads + o_partner64 * stride_d, exists & turns[None, :], 0.0).to(tl.float32)
    if p_weight is not None:
        b_scale = norm_scale(b_x, eps, n_dim)
        # [1, BLOCK_D]
        b_weight = tl.load(p_weight + o_d64 * stride_weight_d, (o_d < n_dim)[None, :], 0.0).to(tl.float32)
        b_other = tl.load(p_weight + o_partner64 * stride_weight_d, turns[None, :], 0.0).to(tl.float32)
        b_x = rounded(b_weight * rounded(b_x * b_scale, dtype), dtype)
        b_y = rounded(b_other * rounded(b_y * b_scale, dtype), dtype)
    # [1, BLOCK_D]
    b_cos = tl.load(p_cos + o_d64 * stride_cos_d, turns[None, :], 0.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_d64 * stride_sin_d, turns[None, :], 0.0).to(tl.float32)
    b_crossed = rounded(b_y * b_sin, dtype)
    b_crossed = tl.where((o_d < HALF)[None, :], -b_crossed, b_crossed)
    b_out = tl.where(turns[None, :], rounded(rounded(b_x * b_cos, dtype) + b_crossed, dtype), b_x)
    p_to += o_h.to(tl.int64)[:, None] * stride_to_h + o_d64 * stride_to_d
    tl.store(p_to, b_out.to(dtype), exists)


@triton.jit(do_not_specialize=["n_rows", "n_q_heads", "n_kv_heads", "n_slots"])
def norm_rope_store(
    p_q,  # [B, R, Hq, D]
    p_k,  # [B, R, Hkv, D]
    p_v,  # [B, R, Hkv, D]
    p_q_weight,  # [D] or None
    p_k_weight,  # [D] or None
    p_cos,  # [B, R, D_rot]
    p_sin,  # [B, R, D_rot]
    p_out,  # out: [B, Hq, R, D], contiguous
    p_k_cache,  # out: [B, Hkv, C, D]
    p_v_cache,  # out: [B, Hkv, C, D]
    p_slots,  # int32 [B, R]
    eps,
    n_rows,
    n_q_heads,
    n_kv_heads,
    n_slots,
    n_dim: tl.constexpr,
    n_rotary: tl.constexpr,
    stride_q_b,
    stride_q_r,
    stride_q_h,
    stride_q_d,
    stride_k_b,
    stride_k_r,
    stride_k_h,
    stride_k_d,
    stride_v_b,
    stride_v_r,
    stride_v_h,
    stride_v_d,
    stride_q_weight_d,
    stride_k_weight_d,
    stride_cos_b,
    stride_cos_r,
    stride_cos_d,
    stride_sin_b,
    stride_sin_r,
    stride_sin_d,
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
    """Grid: (B * R, tiles of heads of q, then of k, then of v). Bytes: every row read once and written once."""
    i_b = (tl.program_id(0) // n_rows).to(tl.int64)
    i_r = (tl.program_id(0) % n_rows).to(tl.int64)
    n_q_tiles = tl.cdiv(n_q_heads, HEADS)
    n_kv_tiles = tl.cdiv(n_kv_heads, HEADS)
    i_tile = tl.program_id(1)
    p_cos += i_b * stride_cos_b + i_r * stride_cos_r
    p_sin += i_b * stride_sin_b + i_r * stride_sin_r
    i_slot = tl.load(p_slots + i_b * stride_slots_b + i_r * stride_slots_r).to(tl.int64)
    # Slots are trusted on a GPU, but one out of range is skipped rather than written elsewhere.
    has_slot = (i_slot >= 0) & (i_slot < n_slots)
    if i_tile < n_q_tiles:
        norm_turn_store(
            p_q + i_b * stride_q_b + i_r * stride_q_r, p_q_weight, p_cos, p_sin,
            p_out + (i_b * n_q_heads * n_rows + i_r) * n_dim, eps, i_tile * HEADS + tl.arange(0, HEADS), n_q_heads,
            stride_q_h, stride_q_d, stride_q_weight_d, stride_cos_d, stride_sin_d, n_rows * n_dim, 1,
            n_dim, n_rotary, HEADS, BLOCK_D)  # fmt: skip
    elif has_slot and i_tile < n_q_tiles + n_kv_tiles:
        norm_turn_store(
            p_k + i_b * stride_k_b + i_r * stride_k_r, p_k_weight, p_cos, p_sin,
            p_k_cache + i_b * stride_k_cache_b + i_slot * stride_k_cache_c, eps,
            (i_tile - n_q_tiles) * HEADS + tl.arange(0, HEADS), n_kv_heads, stride_k_h, stride_k_d, stride_k_weight_d,
            stride_cos_d, stride_sin_d, stride_k_cache_h, stride_k_cache_d,
            n_dim, n_rotary, HEADS, BLOCK_D)  # fmt: skip
    elif has_slot:
        o_h = (i_tile - n_q_tiles - n_kv_tiles) * HEADS + tl.arange(0, HEADS)
        o_d = tl.arange(0, BLOCK_D)
        exists = (o_h < n_kv_heads)[:, None] & (o_d < n_dim)[None, :]
        o_h64 = o_h.to(tl.int64)[:, None]
        o_d64 = o_d.to(tl.int64)[None, :]
        p_v += i_b * stride_v_b + i_r * stride_v_r
        p_v_cache += i_b * stride_v_cache_b + i_slot * stride_v_cache_c
        # [HEADS, BLOCK_D]
        b_v = tl.load(p_v + o_h64 * stride_v_h + o_d64 * stride_v_d, exists)
        tl.store(p_v_cache + o_h64 * stride_v_cache_h + o_d64 * stride_v_cache_d, b_v, exists)


def configuration(dim: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(dim)
    return {"HEADS": max(1, ELEMENTS // block_d), "BLOCK_D": block_d}


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
    eps: float,
) -> Tensor:
    """See `api.qk_norm_rope_store`, which has checked the arguments."""
    batch, rows, q_heads, dim = q.shape
    kv_heads = k.shape[2]
    out = q.new_empty((batch, q_heads, rows, dim))
    if batch * rows * (q_heads + kv_heads) * dim == 0:
        return out
    sizes = configuration(dim)
    tiles = triton.cdiv(q_heads, sizes["HEADS"]) + 2 * triton.cdiv(kv_heads, sizes["HEADS"])
    strides = (
        *q.stride(), *k.stride(), *v.stride(), *(0 if w is None else w.stride(0) for w in (q_weight, k_weight)),
        *cos.stride(), *sin.stride(), *k_cache.stride(), *v_cache.stride(), *slots.stride(),
    )  # fmt: skip
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        norm_rope_store[(batch * rows, tiles)](
            q, k, v, q_weight, k_weight, cos, sin, out, k_cache, v_cache, slots, eps, rows, q_heads, kv_heads,
            k_cache.shape[2], dim, cos.shape[2], *strides, **sizes, **OPTIONS,
        )  # fmt: skip
    return out
