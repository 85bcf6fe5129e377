"""`combine_experts` on Triton: one program per piece of a token's output adds its rows in the order of its choices."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from simsd_kernels.triton_arithmetic import rounded

# Without contraction to FMA a product is rounded before it is added.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
BLOCK = 1024


@triton.jit(do_not_specialize=["n_choices"])
def add_choices(
    p_y,  # [S, N]
    p_weights,  # [M, C]
    p_places,  # [M, C]
    p_out,  # out: [M, N], contiguous
    n_choices,
    n_size,
    stride_y_s,
    stride_y_n,
    stride_weights_m,
    stride_weights_c,
    stride_places_m,
    stride_places_c,
    BLOCK: tl.constexpr,
):
    """Grid: (tokens, pieces of N). Bytes: every row once."""
    dtype: tl.constexpr = p_out.dtype.element_ty
    i_m = tl.program_id(0).to(tl.int64)
    # [BLOCK]
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = o_n < n_size
    b_total = tl.zeros([BLOCK], tl.float32)
    for i_c in range(n_choices):
        place = tl.load(p_places + i_m * stride_places_m + i_c * stride_places_c).to(tl.int64)
        weight = tl.load(p_weights + i_m * stride_weights_m + i_c * stride_weights_c).to(tl.float32)
        b_y = tl.load(p_y + place * stride_y_s + o_n.to(tl.int64) * stride_y_n, exists, 0.0).to(tl.float32)
        b_total += rounded(b_y * weight, dtype)
    tl.store(p_out + i_m * n_size + o_n, rounded(b_total, dtype).to(dtype), exists)


def combine_experts(y: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """See `api.combine_experts`, which has checked the arguments."""
    tokens, choices = places.shape
    size = y.shape[1]
    out = y.new_empty(tokens, size)
    if out.numel() == 0:
        return out
    strides = (*y.stride(), *weights.stride(), *places.stride())
    with torch.cuda.device(y.device) if y.is_cuda else contextlib.nullcontext():
        add_choices[(tokens, triton.cdiv(size, BLOCK))](
            y, weights, places, out, choices, size, *strides, BLOCK=BLOCK, **OPTIONS
        )
    return out
