"""`grouped_linear` on Triton: `thin_linear`'s tiles over every expert's rows in turn, so a row's bits are the same.

The grid has room for any partition of the rows; a program finds its expert from the offsets, and one that finds none
reads and writes nothing. Floor: the weights of the experts that have rows, once, and from L2 for every other row tile.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from simsd_kernels.thin_linear.triton import SIZES, configuration, multiply_tile


@triton.jit(do_not_specialize=[*SIZES, "n_row_tiles", "n_experts"])
def multiply_groups(
    p_x,  # [M, K], contiguous
    p_weight,  # [E, N, K]
    p_scale,  # [E, N], or None
    p_offsets,  # [E + 1]
    p_out,  # out: [M, N], contiguous
    n_row_tiles,
    n_experts,
    n_columns,
    n_k,
    stride_offsets_e,
    stride_weight_e,
    stride_weight_n,
    stride_weight_k,
    stride_scale_e,
    stride_scale_n,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program per tile of ROWS x COLUMNS. Those that share weights are neighbours, to find them in L2.

    EXPERTS: a power of two, at least E."""
    i_tile = tl.program_id(0) % n_row_tiles
    # [EXPERTS]
    o_e = tl.arange(0, EXPERTS)
    p_first = p_offsets + o_e * stride_offsets_e
    b_first = tl.load(p_first, o_e < n_experts, 0)
    b_end = tl.load(p_first + stride_offsets_e, o_e < n_experts, 0)
    b_tiles = tl.cdiv(b_end - b_first, ROWS)
    b_until = tl.cumsum(b_tiles, 0)  # of this expert and all before it
    b_own = (b_until > i_tile) & (b_until - b_tiles <= i_tile)  # one expert, or none
    i_expert = tl.sum(tl.where(b_own, o_e, 0))
    row = tl.sum(tl.where(b_own, b_first + (i_tile - b_until + b_tiles) * ROWS, 0))
    row_end = tl.sum(tl.where(b_own, b_end, 0))
    o_r = row + tl.arange(0, ROWS)
    o_c = (tl.program_id(0) // n_row_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    p_weight += i_expert.to(tl.int64) * stride_weight_e
    if p_scale is not None:
        p_scale += i_expert.to(tl.int64) * stride_scale_e
    if row < row_end:
        multiply_tile(
            p_x, p_weight, p_scale, p_out, o_r, row_end, o_c, n_columns, n_k, stride_weight_n, stride_weight_k,
            stride_scale_n, ROWS, COLUMNS, STEP,
        )  # fmt: skip


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, scale: Tensor | None = None) -> Tensor:
    """See `api.grouped_linear`, which has checked the arguments."""
    experts, columns, k = weight.shape
    rows = x.shape[0]
    out = x.new_empty(rows, columns)
    if out.numel() == 0 or experts == 0:
        return out
    groups = min(rows, experts)
    # Twice the rows that an expert has on average fit a tile: few experts need a second.
    tiles, options = configuration(x.dtype, triton.cdiv(2 * rows, experts), columns * groups, weight.dtype)
    row_tiles = groups + (rows - groups) // tiles["ROWS"]  # every expert may have one that is not full
    grid = row_tiles * triton.cdiv(columns, tiles["COLUMNS"])
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        multiply_groups[(grid,)](
            *(x.contiguous(), weight, scale, offsets, out, row_tiles, experts, columns, k, offsets.stride(0)),
            *weight.stride(),
            *((1, 1) if scale is None else scale.stride()),
            EXPERTS=triton.next_power_of_2(experts),
            **tiles,
            **options,
        )
    return out
