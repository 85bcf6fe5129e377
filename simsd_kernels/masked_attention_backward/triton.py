"""`masked_attention_backward` on Triton: one kernel goes by rows (dq), one by keys (dk, dv); neither needs an atomic.

Data path. `summarise` and the packing of rows are the forward's (see masked_attention/triton_kernels.py).
`row_gradients` walks the key tiles of a row tile twice, for the sums of its weights, then for dq; it keeps, per row,
log2 of the sum (infinite where the row sees nothing) and delta = sum(dout * out). `key_gradients` walks the row tiles
of a key tile with those. Tiles that see nothing of each other are passed over in both.

Bits. Every sum runs in one order, over a sequence's own rows and keys: tiles are constants in rows and keys.

Floor. Eight products of 2 * rows * Lk * D flops per head; bytes: K and V twice per row tile, q and dout once per key
tile. Nothing of the size of the scores is written.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from simsd_kernels.masked_attention.reference import factor
from simsd_kernels.masked_attention.triton import EXACT, QUERIES, SPLIT
from simsd_kernels.masked_attention.triton_kernels import UNSEEN, dot, load_rows, summarise, tile_states

SIZES = ["n_q", "n_k", "n_padded", "n_group", "n_hkv"]


@triton.jit
def load_tile(p_x, o_l, exists, n_dim, stride_l, stride_d, BLOCK_D: tl.constexpr):
    """Rows o_l of a head, 0 where they do not exist. [len(o_l), BLOCK_D]"""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_x + o_l.to(tl.int64)[:, None] * stride_l + o_d.to(tl.int64)[None, :] * stride_d
    return tl.load(p_rows, exists[:, None] & (o_d < n_dim)[None, :], 0.0)


@triton.jit
def load_heads(p_x, o_h, o_q, exists, n_dim, stride_h, stride_q, stride_d, BLOCK_D: tl.constexpr):
    """Query o_q of head o_h, row by row, 0 where it does not exist. [len(o_h), BLOCK_D]"""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = (p_x + o_h * stride_h + o_q * stride_q)[:, None] + o_d.to(tl.int64)[None, :] * stride_d
    return tl.load(p_rows, exists[:, None] & (o_d < n_dim)[None, :], 0.0)


@triton.jit
def visible(b_clock, b_birth, b_death):
    """Both arguments broadcast: [ROWS, 1] with [1, TILE], or [1, ROWS] with [TILE, 1]."""
    return (b_birth <= b_clock) & (b_clock <= b_death)


@triton.jit(do_not_specialize=SIZES)
def row_gradients(
    p_dout,  # [B, Hq, Lq, D]
    p_q,  # [B, Hq, Lq, D]
    p_k,  # [B, Hkv, Lk, D]
    p_v,  # [B, Hkv, Lk, D]
    p_out,  # [B, Hq, Lq, D]
    p_clock,  # int32 [B, Lq]
    p_keys,  # int32 [B, 2, padded], see summarise
    p_bounds,  # int32 [B, 4, padded / TILE]
    p_log_sum,  # out: float32 [B, Hkv, G * Lq]
    p_delta,  # out: float32 [B, Hkv, G * Lq]
    p_dq,  # out: [B, Lq, Hq, D], contiguous
    scale,
    n_q,
    n_padded,
    n_group,
    n_hkv,
    n_dim: tl.constexpr,
    stride_dout_b,
    stride_dout_h,
    stride_dout_q,
    stride_dout_d,
    stride_q_b,
    stride_q_h,
    stride_q_q,
    stride_q_d,
    stride_k_b,
    stride_k_h,
    stride_k_k,
    stride_k_d,
    stride_v_b,
    stride_v_h,
    stride_v_k,
    stride_v_d,
    stride_out_b,
    stride_out_h,
    stride_out_q,
    stride_out_d,
    stride_clock_b,
    stride_clock_q,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (sequence, KV head, row tile). `scale` is without log2(e)."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    n_rows = n_q * n_group
    n_row_tiles = tl.cdiv(n_rows, ROWS)
    n_tiles = n_padded // TILE
    i_row = tl.program_id(0) % n_row_tiles
    i_bh = (tl.program_id(0) // n_row_tiles).to(tl.int64)
    i_b = i_bh // n_hkv
    i_hkv = i_bh % n_hkv
    p_k += i_b * stride_k_b + i_hkv * stride_k_h
    p_v += i_b * stride_v_b + i_hkv * stride_v_h
    p_keys += i_b * 2 * n_padded
    p_bounds += i_b * 4 * n_tiles

    b_q, b_clock, first_clock, last_clock, exists, o_h, o_q = load_rows(
        p_q, p_clock, i_b, i_hkv, i_row, n_group, n_q, n_dim, stride_q_b, stride_q_h, stride_q_q, stride_q_d,
        stride_clock_b, stride_clock_q, ROWS, BLOCK_D)  # fmt: skip
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    for i_tile in range(0, n_tiles):
        if tile_states(p_bounds, i_tile, n_tiles, first_clock, last_clock) > 0:
            o_k = i_tile * TILE + tl.arange(0, TILE)
            # [TILE], [TILE, BLOCK_D]
            b_birth = tl.load(p_keys + o_k)
            b_death = tl.load(p_keys + n_padded + o_k)
            b_k = load_tile(p_k, o_k, b_birth < UNSEEN, n_dim, stride_k_k, stride_k_d, BLOCK_D)
            # [ROWS, TILE]
            b_s = dot(b_q, tl.trans(b_k), tl.zeros([ROWS, TILE], tl.float32)) * (scale * LOG2_E)
            b_s = tl.where(visible(b_clock[:, None], b_birth[None, :], b_death[None, :]), b_s, float("-inf"))
            b_next = tl.maximum(b_max, tl.max(b_s, 1))
            b_shift = tl.where(b_next == float("-inf"), 0.0, b_next)
            b_sum = b_sum * tl.exp2(b_max - b_shift) + tl.sum(tl.exp2(b_s - b_shift[:, None]), 1)
            b_max = b_next
    # A row that sees nothing has weights 0 = 2 ** (score - inf), and may hold anything.
    seeing = exists & (b_max > float("-inf"))
    b_log_sum = tl.where(seeing, b_max + tl.log2(tl.where(seeing, b_sum, 1.0)), float("inf"))
    if p_q.dtype.element_ty == tl.float32:
        # Kept from the first loop to the second, as an operand of products that no tensor core does, it would not fit
        # the registers.
        b_q = load_heads(p_q + i_b * stride_q_b, o_h, o_q, seeing, n_dim, stride_q_h, stride_q_q, stride_q_d, BLOCK_D)
    # [ROWS, BLOCK_D]
    b_dout = load_heads(p_dout + i_b * stride_dout_b, o_h, o_q, seeing, n_dim, stride_dout_h, stride_dout_q,
                        stride_dout_d, BLOCK_D)  # fmt: skip
    b_out = load_heads(p_out + i_b * stride_out_b, o_h, o_q, seeing, n_dim, stride_out_h, stride_out_q,
                       stride_out_d, BLOCK_D)  # fmt: skip
    b_delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
    o_r = i_row * ROWS + tl.arange(0, ROWS)
    tl.store(p_log_sum + i_bh * n_rows + o_r, b_log_sum, exists)
    tl.store(p_delta + i_bh * n_rows + o_r, b_delta, exists)

    b_dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i_tile in range(0, n_tiles):
        if tile_states(p_bounds, i_tile, n_tiles, first_clock, last_clock) > 0:
            o_k = i_tile * TILE + tl.arange(0, TILE)
            b_birth = tl.load(p_keys + o_k)
            b_death = tl.load(p_keys + n_padded + o_k)
            b_k = load_tile(p_k, o_k, b_birth < UNSEEN, n_dim, stride_k_k, stride_k_d, BLOCK_D)
            b_v = load_tile(p_v, o_k, b_birth < UNSEEN, n_dim, stride_v_k, stride_v_d, BLOCK_D)
            b_s = dot(b_q, tl.trans(b_k), tl.zeros([ROWS, TILE], tl.float32)) * (scale * LOG2_E)
            b_sees = visible(b_clock[:, None], b_birth[None, :], b_death[None, :])
            b_p = tl.where(b_sees, tl.exp2(b_s - b_log_sum[:, None]), 0.0)
            b_dp = dot(b_dout, tl.trans(b_v), tl.zeros([ROWS, TILE], tl.float32))
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
    o_d = tl.arange(0, BLOCK_D)
    o_row = (i_b * n_q + o_q) * n_hkv * n_group + o_h
    p_rows = p_dq + o_row[:, None] * n_dim + o_d[None, :]
    tl.store(p_rows, (b_dq * scale).to(p_dq.dtype.element_ty), exists[:, None] & (o_d < n_dim)[None, :])


@triton.jit(do_not_specialize=SIZES)
def key_gradients(
    p_dout,  # [B, Hq, Lq, D]
    p_q,  # [B, Hq, Lq, D]
    p_k,  # [B, Hkv, Lk, D]
    p_v,  # [B, Hkv, Lk, D]
    p_clock,  # int32 [B, Lq]
    p_keys,  # int32 [B, 2, padded], see summarise
    p_bounds,  # int32 [B, 4, padded / TILE]
    p_log_sum,  # float32 [B, Hkv, G * Lq], see row_gradients
    p_delta,  # float32 [B, Hkv, G * Lq]
    p_dk,  # out: [B, Lk, Hkv, D], contiguous
    p_dv,  # out: [B, Lk, Hkv, D], contiguous
    scale,
    n_q,
    n_k,
    n_padded,
    n_group,
    n_hkv,
    n_dim: tl.constexpr,
    stride_dout_b,
    stride_dout_h,
    stride_dout_q,
    stride_dout_d,
    stride_q_b,
    stride_q_h,
    stride_q_q,
    stride_q_d,
    stride_k_b,
    stride_k_h,
    stride_k_k,
    stride_k_d,
    stride_v_b,
    stride_v_h,
    stride_v_k,
    stride_v_d,
    stride_clock_b,
    stride_clock_q,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (sequence, KV head, key tile). `scale` is without log2(e)."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    n_rows = n_q * n_group
    n_tiles = n_padded // TILE
    n_key_tiles = tl.cdiv(n_k, TILE)
    i_tile = tl.program_id(0) % n_key_tiles
    i_bh = (tl.program_id(0) // n_key_tiles).to(tl.int64)
    i_b = i_bh // n_hkv
    i_hkv = i_bh % n_hkv
    p_keys += i_b * 2 * n_padded
    p_bounds += i_b * 4 * n_tiles
    p_clock += i_b * stride_clock_b
    o_k = i_tile * TILE + tl.arange(0, TILE)
    b_birth = tl.load(p_keys + o_k)
    b_death = tl.load(p_keys + n_padded + o_k)
    # [TILE, BLOCK_D]
    b_k = load_tile(p_k + i_b * stride_k_b + i_hkv * stride_k_h, o_k, b_birth < UNSEEN, n_dim,
                    stride_k_k, stride_k_d, BLOCK_D)  # fmt: skip
    b_v = load_tile(p_v + i_b * stride_v_b + i_hkv * stride_v_h, o_k, b_birth < UNSEEN, n_dim,
                    stride_v_k, stride_v_d, BLOCK_D)  # fmt: skip
    b_dk = tl.zeros([TILE, BLOCK_D], tl.float32)
    b_dv = tl.zeros([TILE, BLOCK_D], tl.float32)
    for i_row in range(0, tl.cdiv(n_rows, ROWS)):
        o_r = i_row * ROWS + tl.arange(0, ROWS)
        o_q = (o_r // n_group).to(tl.int64)
        o_h = (i_hkv * n_group + o_r % n_group).to(tl.int64)
        exists = o_r < n_rows
        # [ROWS]; below UNSEEN, so that no row can see an unseen key
        b_clock = tl.minimum(tl.load(p_clock + o_q * stride_clock_q, exists, other=UNSEEN), UNSEEN - 1)
        first_clock = tl.min(b_clock)
        last_clock = tl.max(tl.where(exists, b_clock, first_clock))
        if tile_states(p_bounds, i_tile, n_tiles, first_clock, last_clock) > 0:
            b_log_sum = tl.load(p_log_sum + i_bh * n_rows + o_r, exists, float("inf"))
            b_delta = tl.load(p_delta + i_bh * n_rows + o_r, exists, 0.0)
            seeing = b_log_sum < float("inf")
            # [ROWS, BLOCK_D], [ROWS, TILE]
            b_q = load_heads(p_q + i_b * stride_q_b, o_h, o_q, seeing, n_dim, stride_q_h, stride_q_q, stride_q_d,
                             BLOCK_D)  # fmt: skip
            b_dout = load_heads(p_dout + i_b * stride_dout_b, o_h, o_q, seeing, n_dim, stride_dout_h, stride_dout_q,
                                stride_dout_d, BLOCK_D)  # fmt: skip
            b_s = dot(b_q, tl.trans(b_k), tl.zeros([ROWS, TILE], tl.float32)) * (scale * LOG2_E)
            b_sees = visible(b_clock[:, None], b_birth[None, :], b_death[None, :])
            b_p = tl.where(b_sees, tl.exp2(b_s - b_log_sum[:, None]), 0.0)
            b_dv = dot(tl.trans(b_p.to(b_dout.dtype)), b_dout, b_dv)
            b_dp = dot(b_dout, tl.trans(b_v), tl.zeros([ROWS, TILE], tl.float32))
            b_ds = b_p * (b_dp - b_delta[:, None])
            b_dk = dot(tl.trans(b_ds.to(b_q.dtype)), b_q, b_dk)
    o_d = tl.arange(0, BLOCK_D)
    o_row = (i_b * n_k + o_k) * n_hkv + i_hkv
    inside = (o_k < n_k)[:, None] & (o_d < n_dim)[None, :]
    o_out = o_row[:, None] * n_dim + o_d[None, :]
    tl.store(p_dk + o_out, (b_dk * scale).to(p_dk.dtype.element_ty), inside)
    tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), inside)


def configuration(dim: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and launch options of both kernels: they depend on head size and dtype alone.

    Found by ahead-of-time compilation: without a spilled register on sm_80, 90, 100 and 120 (see
    benchmarks/results/triton_resources.md). How fast they are has not been measured on any GPU.
    """
    block_d = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32:
        rows, tile = 16, 16
    else:
        rows, tile = 64 if block_d <= 64 else 32, 32
    options = {"num_warps": 4 if block_d <= 128 else 8, "num_stages": 1, "enable_fp_fusion": True}
    return {"ROWS": rows, "TILE": tile, "BLOCK_D": block_d}, options


KEY_OPTIONS = {
    "maxnreg": 255
}  # of key_gradients: left alone, ptxas would rather spill a little than run fewer programs


def masked_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    clock: Tensor,
    birth: Tensor,
    death: Tensor,
    kv_len: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `api.masked_attention_backward`, which has checked the arguments."""
    batch, q_heads, q_rows, dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    found = dq, dk, dv = tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return tuple(x.zero_() for x in found)
    rows = q_heads // kv_heads * q_rows
    padded = triton.cdiv(keys, SPLIT) * SPLIT
    tiles, options = configuration(dim, q.dtype)
    scale = factor(scale, dim)
    key_vectors = birth.new_empty((batch, 2, padded))
    bounds = birth.new_empty((batch, 4, padded // tiles["TILE"]))
    log_sum, delta = q.new_empty((2, batch, kv_heads, rows), dtype=torch.float32)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        summarise[(batch * padded // SPLIT,)](
            clock, birth, death, kv_len, None, key_vectors, bounds, q_rows, keys, padded, 0, batch,
            *clock.stride(), *birth.stride(), *death.stride(), 0 if kv_len is None else kv_len.stride(0),
            TILE=tiles["TILE"], SPLIT=SPLIT, QUERIES=QUERIES, PAGE=0, **EXACT,
        )  # fmt: skip
        group = q_heads // kv_heads
        row_gradients[(batch * kv_heads * triton.cdiv(rows, tiles["ROWS"]),)](
            dout, q, k, v, out, clock, key_vectors, bounds, log_sum, delta, dq, scale,
            q_rows, padded, group, kv_heads, dim,
            *dout.stride(), *q.stride(), *k.stride(), *v.stride(), *out.stride(), *clock.stride(), **tiles, **options,
        )  # fmt: skip
        key_gradients[(batch * kv_heads * triton.cdiv(keys, tiles["TILE"]),)](
            dout, q, k, v, clock, key_vectors, bounds, log_sum, delta, dk, dv, scale,
            q_rows, keys, padded, group, kv_heads, dim,
            *dout.stride(), *q.stride(), *k.stride(), *v.stride(), *clock.stride(), **tiles, **options, **KEY_OPTIONS,
        )  # fmt: skip
    return found
