"""`masked_attention` on Triton: few rows split the keys over programs, many rows walk them; both give the same bits."""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from simsd_kernels.masked_attention.triton_kernels import (
    attend_split,
    load_rows,
    merge,
    normalise,
    power_of_two,
    summarise,
    tile_states,
)

# Keys per split, whatever the call: a row's result must not depend on what rides along with it.
SPLIT = 256
# Rows (queries x heads of a group) of one sequence up to which the keys are split over programs. 512 rows are 8 row
# tiles: with 8 KV heads, 64 programs that walk all keys would leave half of a large GPU idle.
SPLIT_ROWS = 512
QUERIES = 32
COMBINED_ROWS = 8
TILES_SCANNED = 128

SIZES = ["n_q", "n_k", "n_padded", "n_group", "n_hkv"]


@triton.jit(do_not_specialize=SIZES)
def attend_few_rows(
    p_q,  # [B, Hq, Lq, D]
    p_k,  # [B, Hkv, Lk, D], or [P, Hkv, PAGE, D]
    p_v,  # like p_k
    p_clock,  # int32 [B, Lq]
    p_keys,  # int32 [B, 2 or 3, padded], see summarise
    p_bounds,  # int32 [B, 4, padded / TILE]
    p_max,  # out: float32 [B, Hkv, splits, G * Lq]
    p_sum,  # out: float32 [B, Hkv, splits, G * Lq]
    p_acc,  # out: float32 [B, Hkv, splits, G * Lq, D]
    scale,
    n_q,
    n_padded,
    n_group,
    n_hkv,
    n_dim: tl.constexpr,
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
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One program per (sequence, KV head, split, row tile, slice of D); a second kernel combines the splits.

    Those that share K and V are neighbours, so that they run together and find them in L2. Writes 4 * D bytes per row
    and split on top of the floor, and repeats q @ k^T for every slice.
    """
    n_rows = n_q * n_group
    n_row_tiles = tl.cdiv(n_rows, ROWS)
    n_splits = n_padded // SPLIT
    i_v = tl.program_id(0) % tl.cdiv(n_dim, BLOCK_V)
    i_rest = tl.program_id(0) // tl.cdiv(n_dim, BLOCK_V)
    i_row = i_rest % n_row_tiles
    i_split = (i_rest // n_row_tiles) % n_splits
    i_bh = (i_rest // n_row_tiles // n_splits).to(tl.int64)
    i_b = i_bh // n_hkv
    i_hkv = i_bh % n_hkv

    b_q, b_clock, first_clock, last_clock, exists, _, _ = load_rows(
        p_q, p_clock, i_b, i_hkv, i_row, n_group, n_q, n_dim, stride_q_b, stride_q_h, stride_q_q, stride_q_d,
        stride_clock_b, stride_clock_q, ROWS, BLOCK_D)  # fmt: skip
    i_k = i_b if PAGE == 0 else 0
    b_max, b_sum, b_acc = attend_split(
        b_q, b_clock, first_clock, last_clock, p_k + i_k * stride_k_b + i_hkv * stride_k_h,
        p_v + i_k * stride_v_b + i_hkv * stride_v_h, p_keys + i_b * (2 if PAGE == 0 else 3) * n_padded,
        p_bounds + i_b * 4 * (n_padded // TILE), i_split, n_padded, n_dim, scale, i_v,
        stride_k_b, stride_k_k, stride_k_d, stride_v_b, stride_v_k, stride_v_d,
        TILE, SPLIT, BLOCK_D, BLOCK_V, PAGE)  # fmt: skip

    o_r = i_row * ROWS + tl.arange(0, ROWS)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    i_partial = (i_bh * n_splits + i_split) * n_rows
    if i_v == 0:
        # [ROWS]
        tl.store(p_max + i_partial + o_r, b_max, exists)
        tl.store(p_sum + i_partial + o_r, b_sum, exists)
    # [ROWS, BLOCK_V]; a row that saw nothing here is neither written nor read
    used = exists & (b_max > float("-inf"))
    tl.store(p_acc + (i_partial + o_r)[:, None] * n_dim + o_v[None, :], b_acc, used[:, None] & (o_v < n_dim)[None, :])


@triton.jit(do_not_specialize=SIZES)
def combine_splits(
    p_max,  # float32 [B, Hkv, splits, G * Lq]
    p_sum,  # float32 [B, Hkv, splits, G * Lq]
    p_acc,  # float32 [B, Hkv, splits, G * Lq, D]
    p_out,  # out: [B, Lq, Hq, D], contiguous
    n_q,
    n_padded,
    n_group,
    n_hkv,
    n_dim: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (sequence, KV head, few rows) adds up the splits in ascending order. Bytes: all partials once."""
    n_rows = n_q * n_group
    n_splits = n_padded // SPLIT
    i_bh = (tl.program_id(0) // tl.cdiv(n_rows, ROWS)).to(tl.int64)
    o_r = (tl.program_id(0) % tl.cdiv(n_rows, ROWS)) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    exists = o_r < n_rows

    # The greatest exponent first: then no iteration below waits for another, and the sums are those of `merge`.
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    for i_split in range(0, n_splits):
        b_max = tl.maximum(b_max, tl.load(p_max + (i_bh * n_splits + i_split) * n_rows + o_r, exists, float("-inf")))
    b_shift = tl.where(b_max == float("-inf"), 0.0, b_max)

    b_sum = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i_split in range(0, n_splits):
        o_partial = (i_bh * n_splits + i_split) * n_rows + o_r
        # [ROWS]
        b_max_2 = tl.load(p_max + o_partial, exists, float("-inf"))
        b_sum_2 = tl.load(p_sum + o_partial, exists, 0.0)
        # [ROWS, BLOCK_D]
        b_acc_2 = tl.load(p_acc + o_partial[:, None] * n_dim + o_d[None, :],
                          (b_max_2 > float("-inf"))[:, None] & (o_d < n_dim)[None, :], 0.0)  # fmt: skip
        b_keep_2 = power_of_two(b_max_2 - b_shift)
        b_sum += b_sum_2 * b_keep_2
        b_acc += b_acc_2 * b_keep_2[:, None]

    i_b = i_bh // n_hkv
    o_h = (i_bh % n_hkv) * n_group + o_r % n_group
    o_out = (i_b * n_q + o_r // n_group) * n_hkv * n_group + o_h
    # [ROWS, BLOCK_D]
    b_out = normalise(b_sum, b_acc).to(p_out.dtype.element_ty)
    tl.store(p_out + o_out[:, None] * n_dim + o_d[None, :], b_out, exists[:, None] & (o_d < n_dim)[None, :])


@triton.jit(do_not_specialize=SIZES)
def attend_many_rows(
    p_q,  # [B, Hq, Lq, D]
    p_k,  # [B, Hkv, Lk, D], or [P, Hkv, PAGE, D]
    p_v,  # like p_k
    p_clock,  # int32 [B, Lq]
    p_keys,  # int32 [B, 2 or 3, padded], see summarise
    p_bounds,  # int32 [B, 4, padded / TILE]
    p_out,  # out: [B, Lq, Hq, D], contiguous
    scale,
    n_q,
    n_padded,
    n_group,
    n_hkv,
    n_dim: tl.constexpr,
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
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Prefill: one program per (sequence, KV head, row tile, slice of D) walks the splits between its first and last
    live tile. It carries two outputs, the split's and the total, to add in the order of `combine_splits`."""
    TILES: tl.constexpr = SPLIT // TILE
    n_row_tiles = tl.cdiv(n_q * n_group, ROWS)
    i_v = tl.program_id(0) % tl.cdiv(n_dim, BLOCK_V)
    i_rest = tl.program_id(0) // tl.cdiv(n_dim, BLOCK_V)
    i_row = i_rest % n_row_tiles
    i_bh = (i_rest // n_row_tiles).to(tl.int64)
    i_b = i_bh // n_hkv
    i_hkv = i_bh % n_hkv
    i_k = i_b if PAGE == 0 else 0
    p_k += i_k * stride_k_b + i_hkv * stride_k_h
    p_v += i_k * stride_v_b + i_hkv * stride_v_h
    p_keys += i_b * (2 if PAGE == 0 else 3) * n_padded
    p_bounds += i_b * 4 * (n_padded // TILE)

    b_q, b_clock, first_clock, last_clock, exists, o_h, o_q = load_rows(
        p_q, p_clock, i_b, i_hkv, i_row, n_group, n_q, n_dim, stride_q_b, stride_q_h, stride_q_q, stride_q_d,
        stride_clock_b, stride_clock_q, ROWS, BLOCK_D)  # fmt: skip

    first = n_padded // SPLIT
    end = 0
    for i_scan in range(0, n_padded // TILE, SCAN):
        o_tile = i_scan + tl.arange(0, SCAN)
        alive = tile_states(p_bounds, o_tile, n_padded // TILE, first_clock, last_clock) > 0
        first = tl.minimum(first, tl.min(tl.where(alive, o_tile // TILES, n_padded // SPLIT)))
        end = tl.maximum(end, tl.max(tl.where(alive, o_tile // TILES + 1, 0)))

    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for i_split in range(first, end):
        b_max_2, b_sum_2, b_acc_2 = attend_split(
            b_q, b_clock, first_clock, last_clock, p_k, p_v, p_keys, p_bounds, i_split, n_padded, n_dim,
            scale, i_v, stride_k_b, stride_k_k, stride_k_d, stride_v_b, stride_v_k, stride_v_d,
            TILE, SPLIT, BLOCK_D, BLOCK_V, PAGE)  # fmt: skip
        b_max, b_sum, b_acc = merge(b_max, b_sum, b_acc, b_max_2, b_sum_2, b_acc_2)

    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    o_out = (i_b * n_q + o_q) * n_hkv * n_group + o_h
    # [ROWS, BLOCK_V]
    b_out = normalise(b_sum, b_acc).to(p_out.dtype.element_ty)
    tl.store(p_out + o_out[:, None] * n_dim + o_v[None, :], b_out, exists[:, None] & (o_v < n_dim)[None, :])


def configuration(dim: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and launch options of the attention kernels: they depend on head size and dtype alone.

    Found by ahead-of-time compilation: the largest without a spilled register on sm_80, 90, 100 and 120 (see
    benchmarks/results/triton_resources.md). float32 has no exact tensor core product, so its tiles are small.
    """
    block_d = max(16, triton.next_power_of_2(dim))
    # Left alone, ptxas would rather spill a little than run fewer programs at a time.
    if dtype == torch.float32:
        rows, tile, options = 16, 32, {"num_warps": 8, "maxnreg": 128}
    elif block_d == 128:
        rows, tile, options = 64, 64, {"num_warps": 4, "maxnreg": 255}
    else:
        rows, tile, options = 64, 32, {"num_warps": 4 if block_d < 128 else 8, "maxnreg": 255}
    tiles = {"ROWS": rows, "TILE": tile, "SPLIT": SPLIT, "BLOCK_D": block_d, "BLOCK_V": min(block_d, 64)}
    return tiles, {**options, "num_stages": 2}


# Without contraction to FMA the same expressions round alike in both attention kernels.
EXACT = {"enable_fp_fusion": False}


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clock: Tensor,
    birth: Tensor,
    death: Tensor,
    kv_len: Tensor | None = None,
    scale: float | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """See `api.masked_attention`, which has checked the arguments."""
    batch, q_heads, q_rows, dim = q.shape
    kv_heads, keys = k.shape[1], birth.shape[1]
    out = q.new_empty((batch, q_rows, q_heads, dim)).transpose(1, 2)
    if out.numel() == 0:
        return out
    if keys == 0:
        return out.zero_()
    group = q_heads // kv_heads
    rows = group * q_rows
    splits = triton.cdiv(keys, SPLIT)
    padded = splits * SPLIT
    tiles, options = configuration(dim, q.dtype)
    scale = (dim**-0.5 if scale is None else scale) * math.log2(math.e)
    slices = triton.cdiv(dim, tiles["BLOCK_V"])
    row_tiles = triton.cdiv(rows, tiles["ROWS"])
    if block_table is not None:
        block_table = block_table.contiguous()
    pages, table = k.shape[0], 0 if block_table is None else block_table.shape[1]
    tiles["PAGE"] = 0 if block_table is None else k.shape[2]

    key_vectors = birth.new_empty((batch, 2 if block_table is None else 3, padded))
    bounds = birth.new_empty((batch, 4, padded // tiles["TILE"]))
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        summarise[(batch * splits,)](
            clock, birth, death, kv_len, block_table, key_vectors, bounds, q_rows, keys, padded, table, pages,
            *clock.stride(), *birth.stride(), *death.stride(), 0 if kv_len is None else kv_len.stride(0),
            TILE=tiles["TILE"], SPLIT=SPLIT, QUERIES=QUERIES, PAGE=tiles["PAGE"], **EXACT,
        )  # fmt: skip
        inputs = (q, k, v, clock, key_vectors, bounds)
        sizes = (q_rows, padded, group, kv_heads, dim)
        strides = (*q.stride(), *k.stride(), *v.stride(), *clock.stride())
        if rows > SPLIT_ROWS:
            attend_many_rows[(batch * kv_heads * slices * row_tiles,)](
                *inputs, out, scale, *sizes, *strides, **tiles, SCAN=TILES_SCANNED, **options, **EXACT
            )
            return out
        maxima, sums = q.new_empty((2, batch, kv_heads, splits, rows), dtype=torch.float32)
        partials = q.new_empty((batch, kv_heads, splits, rows, dim), dtype=torch.float32)
        attend_few_rows[(batch * kv_heads * slices * splits * row_tiles,)](
            *inputs, maxima, sums, partials, scale, *sizes, *strides, **tiles, **options, **EXACT
        )
        combine_splits[(batch * kv_heads * triton.cdiv(rows, COMBINED_ROWS),)](
            maxima, sums, partials, out, *sizes,
            SPLIT=SPLIT, ROWS=COMBINED_ROWS, BLOCK_D=tiles["BLOCK_D"], num_warps=4, **EXACT,
        )  # fmt: skip
    return out
