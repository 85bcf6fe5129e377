"""`add_rms_norm` on Triton: one program per row, which it holds in registers up to 4096 elements."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from simsd_kernels.triton_arithmetic import rounded, tree_sum

LARGEST_BLOCK = 4096
ELEMENTS_PER_WARP = 512


@triton.jit
def sum_block(p_x, p_residual, o_d, exists, stride_x_d, stride_residual_d):
    """[BLOCK]: the residual, to which x has been added, 0 past D."""
    dtype: tl.constexpr = p_residual.dtype.element_ty
    p_residual += o_d.to(tl.int64) * stride_residual_d
    b_sum = tl.load(p_residual, exists, 0.0).to(tl.float32)
    if p_x is not None:
        b_x = tl.load(p_x + o_d.to(tl.int64) * stride_x_d, exists, 0.0).to(tl.float32)
        b_sum = rounded(b_sum + b_x, dtype)
        tl.store(p_residual, b_sum.to(dtype), exists)
    return b_sum


@triton.jit
def norm_block(b_sum, b_scale, p_weight, p_out, o_d, exists, stride_weight_d):
    dtype: tl.constexpr = p_out.dtype.element_ty
    b_weight = tl.load(p_weight + o_d.to(tl.int64) * stride_weight_d, exists, 0.0).to(tl.float32)
    b_out = rounded(b_weight * rounded(b_sum * b_scale, dtype), dtype)
    tl.store(p_out + o_d, b_out.to(dtype), exists)


@triton.jit(do_not_specialize=["n_middle", "n_inner"])
def add_norm(
    p_x,  # [outer, middle, inner, D] or None
    p_residual,  # in and out: [outer, middle, inner, D]
    p_weight,  # [D]
    p_out,  # out: [outer * middle * inner, D], contiguous
    eps,
    n_middle,
    n_inner,
    n_dim: tl.constexpr,
    stride_x_outer,
    stride_x_middle,
    stride_x_inner,
    stride_x_d,
    stride_residual_outer,
    stride_residual_middle,
    stride_residual_inner,
    stride_residual_d,
    stride_weight_d,
    LOG_BLOCK: tl.constexpr,
):
    """Grid: (rows,). Bytes: x and the residual read once, the residual and the output written once."""
    BLOCK: tl.constexpr = 1 << LOG_BLOCK
    i_row = tl.program_id(0)
    i_inner = (i_row % n_inner).to(tl.int64)
    i_middle = (i_row // n_inner % n_middle).to(tl.int64)
    i_outer = (i_row // n_inner // n_middle).to(tl.int64)
    p_residual += i_outer * stride_residual_outer + i_middle * stride_residual_middle + i_inner * stride_residual_inner
    if p_x is not None:
        p_x += i_outer * stride_x_outer + i_middle * stride_x_middle + i_inner * stride_x_inner
    p_out += i_row.to(tl.int64) * n_dim
    o_d = tl.arange(0, BLOCK)
    if n_dim <= BLOCK:
        b_sum = sum_block(p_x, p_residual, o_d, o_d < n_dim, stride_x_d, stride_residual_d)
        b_scale = tl.rsqrt(tree_sum(b_sum * b_sum, LOG_BLOCK) / n_dim + eps)
        norm_block(b_sum, b_scale, p_weight, p_out, o_d, o_d < n_dim, stride_weight_d)
    else:
        b_squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n_dim, BLOCK):
            o_block = start + o_d
            b_sum = sum_block(p_x, p_residual, o_block, o_block < n_dim, stride_x_d, stride_residual_d)
            b_squares += b_sum * b_sum
        b_scale = tl.rsqrt(tree_sum(b_squares, LOG_BLOCK) / n_dim + eps)
        tl.debug_barrier()  # the sums may be read by other threads than wrote them
        for start in range(0, n_dim, BLOCK):
            o_block = start + o_d
            b_sum = sum_block(None, p_residual, o_block, o_block < n_dim, 0, stride_residual_d)
            norm_block(b_sum, b_scale, p_weight, p_out, o_block, o_block < n_dim, stride_weight_d)


def configuration(dim: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants and options; both follow from D alone, and with them the order of the sum."""
    block = min(LARGEST_BLOCK, triton.next_power_of_2(dim))
    # Without contraction to FMA every product and sum rounds as the modules' do.
    options = {"num_warps": max(1, block // ELEMENTS_PER_WARP), "enable_fp_fusion": False}
    return {"LOG_BLOCK": block.bit_length() - 1}, options


def add_rms_norm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `api.add_rms_norm`, which has checked the arguments."""
    dim = residual.shape[-1]
    out = residual.new_empty(residual.shape)
    if out.numel() == 0:
        return out
    leading = (None,) * (4 - residual.dim())
    residual = residual[leading]  # [outer, middle, inner, D]
    if x is not None:
        x = x[leading]
    strides = (*((0,) * 4 if x is None else x.stride()), *residual.stride(), weight.stride(0))
    constants, options = configuration(dim)
    rows = out.numel() // dim
    with torch.cuda.device(residual.device) if residual.is_cuda else contextlib.nullcontext():
        add_norm[(rows,)](
            x, residual, weight, out, eps, *residual.shape[1:3], dim, *strides, **constants, **options
        )  # fmt: skip
    return out
