"""`silu_mul` on Triton: one program per piece of a row."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from simsd_kernels.triton_arithmetic import rounded

# Without contraction to FMA every product rounds as the module's do, and ln 2 in two parts keeps its point.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
BLOCK = 1024
LOWEST_EXPONENT = tl.constexpr(-86.643)  # powers of e under 2^-125 are flushed to zero
LOG2_E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # times an integer up to 2^11 exact
LN2_LOW = tl.constexpr(-2.12194440e-4)


@triton.jit
def exponential(b_x):
    """e^x for x <= 0, to some units in the last place; tl.exp alone is off by |x| of them."""
    b_whole = tl.floor(b_x * LOG2_E + 0.5)
    b_rest = (b_x - b_whole * LN2_HIGH) - b_whole * LN2_LOW
    b_power = ((b_whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(b_x < LOWEST_EXPONENT, 0.0, tl.exp(b_rest) * b_power)


@triton.jit
def silu(b_x):
    """x / (1 + e^-x) with an exponential that cannot overflow; -inf gives -0."""
    b_bounded = tl.where(b_x < -104.0, -104.0, b_x)
    b_e = exponential(-tl.minimum(tl.abs(b_bounded), 104.0))
    return tl.div_rn(tl.where(b_bounded < 0.0, b_bounded * b_e, b_bounded), 1.0 + b_e)


@triton.jit(do_not_specialize=["n_middle", "n_inner"])
def silu_times(
    p_gate_up,  # [outer, middle, inner, 2 * I]
    p_out,  # out: [outer * middle * inner, I], contiguous
    n_middle,
    n_inner,
    n_size,
    stride_gate_up_outer,
    stride_gate_up_middle,
    stride_gate_up_inner,
    stride_gate_up_d,
    BLOCK: tl.constexpr,
):
    """Grid: (rows, pieces of I). Bytes: everything read once and written once."""
    dtype: tl.constexpr = p_out.dtype.element_ty
    i_row = tl.program_id(0)
    p_gate_up += (i_row % n_inner).to(tl.int64) * stride_gate_up_inner
    p_gate_up += (i_row // n_inner % n_middle).to(tl.int64) * stride_gate_up_middle
    p_gate_up += (i_row // n_inner // n_middle).to(tl.int64) * stride_gate_up_outer
    # [BLOCK]
    o_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = o_i < n_size
    o_i = o_i.to(tl.int64)
    b_gate = tl.load(p_gate_up + o_i * stride_gate_up_d, exists, 0.0).to(tl.float32)
    b_up = tl.load(p_gate_up + (n_size + o_i) * stride_gate_up_d, exists, 0.0).to(tl.float32)
    b_out = rounded(rounded(silu(b_gate), dtype) * b_up, dtype)
    tl.store(p_out + i_row.to(tl.int64) * n_size + o_i, b_out.to(dtype), exists)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `api.silu_mul`, which has checked the arguments."""
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], size))
    if out.numel() == 0:
        return out
    gate_up = gate_up[(None,) * (4 - gate_up.dim())]  # [outer, middle, inner, 2 * I]
    rows, pieces = out.numel() // size, triton.cdiv(size, BLOCK)
    with torch.cuda.device(gate_up.device) if gate_up.is_cuda else contextlib.nullcontext():
        silu_times[(rows, pieces)](
            gate_up, out, *gate_up.shape[1:3], size, *gate_up.stride(), BLOCK=BLOCK, **OPTIONS
        )  # fmt: skip
    return out
