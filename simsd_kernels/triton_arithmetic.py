"""Arithmetic inside Triton kernels whose bits follow from the values alone."""

from __future__ import annotations

import triton
import triton.language as tl

from simsd_kernels import dispatch

# The interpreter cuts bf16 off where the hardware rounds.
INTERPRET = tl.constexpr(dispatch.interpreting())


@triton.jit
def rounded(b_x, dtype: tl.constexpr):
    """To the nearest of the tensors' dtype and back, as if it had been stored between two operations."""
    if INTERPRET and dtype == tl.bfloat16:
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        return b_bits.to(tl.float32, bitcast=True)
    return b_x.to(dtype).to(tl.float32)


@triton.jit
def tree_sum(b_x, LOG_SIZE: tl.constexpr):
    """[2 ** LOG_SIZE] -> [1], neighbours first.

    tl.sum adds in an order that follows from how a tile lies over threads, and that from strides and alignment.
    """
    for level in tl.static_range(LOG_SIZE):
        b_left, b_right = tl.split(tl.reshape(b_x, [1 << (LOG_SIZE - level - 1), 2]))
        b_x = b_left + b_right
    return b_x
