"""`thin_linear` on Triton: one program per tile of rows and columns walks K in steps of a constant size.

Bits. However many rows there are, K is cut alike and added, ascending, by the same instruction: rows and columns that
are not there are zeros. For 16 bits that is m16n8k16; a tile of 64 rows would be given to wgmma or tcgen05, whose order
of summation is their own, so none is higher than 32. float32 goes by FMAs, never by tf32. An int8 weight becomes the
dtype of x on its way from shared memory; of its 16 k a product takes others than of a weight of 16 bits.

Floor: the weight once; 4096 x 4096 in bf16 are 33.6 MB, 10 us at 3.35 TB/s. For few rows 128 programs have up to 48 KiB
of it on their way each, which is what that takes. From L2 come the weight once per row tile and x once per column tile:
for many rows 2.4 times less with tiles of 32 x 128 than of 16 x 32.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from simsd_kernels import dispatch

# Interpreted, `tl.dot` is wrong in bf16, and a BLAS, which is not row-independent, in float32.
INTERPRET = tl.constexpr(dispatch.interpreting())
SIZES = ["n_rows", "n_columns"]


@triton.jit
def multiply_tile(
    p_x,  # [rows, K], contiguous
    p_weight,  # [N, K]
    p_scale,  # [N], or None
    p_out,  # out: [rows, N], contiguous
    o_r,
    row_end,
    o_c,
    n_columns,
    n_k,
    stride_weight_n,
    stride_weight_k,
    stride_scale_n,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Rows o_r, those before row_end, by columns o_c, those before n_columns."""
    o_k = tl.arange(0, STEP)
    p_x += o_r.to(tl.int64)[:, None] * n_k
    p_weight += o_c.to(tl.int64)[None, :] * stride_weight_n
    b_out = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i_k in range(0, n_k, STEP):
        b_inside = i_k + o_k < n_k
        # [ROWS, STEP]
        b_x = tl.load(p_x + (i_k + o_k)[None, :], (o_r < row_end)[:, None] & b_inside[None, :], other=0.0)
        # [STEP, COLUMNS]
        o_weight = (i_k + o_k).to(tl.int64)[:, None] * stride_weight_k
        b_weight = tl.load(p_weight + o_weight, b_inside[:, None] & (o_c < n_columns)[None, :], other=0)
        if INTERPRET:
            b_out += tl.sum(b_x.to(tl.float32)[:, :, None] * b_weight.to(tl.float32)[None, :, :], 1)
        else:
            b_out = tl.dot(b_x, b_weight.to(b_x.dtype), b_out, input_precision="ieee")
    if p_scale is not None:
        # [COLUMNS]
        b_scale = tl.load(p_scale + o_c.to(tl.int64) * stride_scale_n, o_c < n_columns, other=0.0)
        b_out *= b_scale.to(tl.float32)[None, :]
    o_out = o_r.to(tl.int64)[:, None] * n_columns + o_c[None, :]
    tl.store(
        p_out + o_out, b_out.to(p_out.dtype.element_ty), (o_r < row_end)[:, None] & (o_c < n_columns)[None, :]
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def multiply(
    p_x,  # [M, K], contiguous
    p_weight,  # [N, K]
    p_scale,  # [N], or None
    p_out,  # out: [M, N], contiguous
    n_rows,
    n_columns,
    n_k,
    stride_weight_n,
    stride_weight_k,
    stride_scale_n,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program per tile of ROWS x COLUMNS. Those that share weights are neighbours, to find them in L2."""
    n_row_tiles = tl.cdiv(n_rows, ROWS)
    o_r = (tl.program_id(0) % n_row_tiles) * ROWS + tl.arange(0, ROWS)
    o_c = (tl.program_id(0) // n_row_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    multiply_tile(
        p_x, p_weight, p_scale, p_out, o_r, n_rows, o_c, n_columns, n_k, stride_weight_n, stride_weight_k,
        stride_scale_n, ROWS, COLUMNS, STEP,
    )  # fmt: skip


ENOUGH_PROGRAMS = 96  # for most multiprocessors of a large GPU to have one


def configuration(
    dtype: torch.dtype, rows: int, columns: int, weight: torch.dtype | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and launch options; `dtype` is that of x, and of the weight unless it is said. STEP and the
    instruction decide the order of summation, so they depend on the dtypes alone."""
    if dtype == torch.float32:
        return {"ROWS": 16, "COLUMNS": 32, "STEP": 64}, {"num_warps": 4, "num_stages": 4}
    few = triton.cdiv(rows, 32) * triton.cdiv(columns, 128) < ENOUGH_PROGRAMS or rows <= 32
    if weight == torch.int8:  # more of it on its way takes more stages, and long steps more registers than there are
        if few:
            return {"ROWS": 16, "COLUMNS": 32, "STEP": 128}, {"num_warps": 4, "num_stages": 10}
        return {"ROWS": 32, "COLUMNS": 128, "STEP": 128}, {"num_warps": 8, "num_stages": 4}
    if few:
        return {"ROWS": 16, "COLUMNS": 32, "STEP": 256}, {"num_warps": 4, "num_stages": 4}
    return {"ROWS": 32, "COLUMNS": 128, "STEP": 256}, {"num_warps": 8, "num_stages": 2}


def thin_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """See `api.thin_linear`, which has checked the arguments."""
    columns, k = weight.shape
    rows = math.prod(x.shape[:-1])
    out = x.new_empty((*x.shape[:-1], columns))
    if out.numel() == 0:
        return out
    tiles, options = configuration(x.dtype, rows, columns, weight.dtype)
    grid = triton.cdiv(rows, tiles["ROWS"]) * triton.cdiv(columns, tiles["COLUMNS"])
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        multiply[(grid,)](
            *(x.contiguous(), weight, scale, out, rows, columns, k, *weight.stride()),
            1 if scale is None else scale.stride(0),
            **tiles,
            **options,
        )
    return out
