"""The noise of noise.py inside Triton kernels: the same integers, and Gumbel variates equal to rounding."""

from __future__ import annotations

import triton
import triton.language as tl

MULTIPLIER_0 = tl.constexpr(0xD2511F53)
MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
WEYL_0 = tl.constexpr(0x9E3779B9)
WEYL_1 = tl.constexpr(0xBB67AE85)
LARGEST_UNIFORM = tl.constexpr(1.0 - 2.0**-24)


@triton.jit
def low_word(value):
    return (value & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def high_word(value):
    return ((value >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def noise_words(seed, position, revealed, b_quad):
    """Philox4x32-10 for one row: uint32 [N, 4], the words of vocabulary ids 4 * quad + 0..3.

    seed and revealed: int64 scalars, position: int32 scalar, b_quad: int32 [N]. See noise.words.
    """
    # [N]
    c0 = tl.zeros_like(b_quad).to(tl.uint32) + low_word(position.to(tl.int64))
    c1 = b_quad.to(tl.uint32)
    c2 = tl.zeros_like(c0) + low_word(revealed)
    c3 = tl.zeros_like(c0) + high_word(revealed)
    k0 = tl.zeros_like(c0) + low_word(seed)
    k1 = tl.zeros_like(c0) + high_word(seed)
    m0 = tl.full(c0.shape, MULTIPLIER_0, tl.uint32)
    m1 = tl.full(c0.shape, MULTIPLIER_1, tl.uint32)
    w0 = tl.full(c0.shape, WEYL_0, tl.uint32)
    w1 = tl.full(c0.shape, WEYL_1, tl.uint32)
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(m0, c0)
        low_0 = m0 * c0
        high_1 = tl.umulhi(m1, c2)
        low_1 = m1 * c2
        c0 = high_1 ^ c1 ^ k0
        c1 = low_1
        c2 = high_0 ^ c3 ^ k1
        c3 = low_0
        k0 += w0
        k1 += w1
    # join puts its arguments along a new last dimension: [N, 2, 2] is (c0, c1), (c2, c3)
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [c0.shape[0], 4])


@triton.jit
def log1p(b_x):
    """log(1 + x) for x > -1, as log(w) * x / (w - 1) with w = 1 + x rounded (Kahan)."""
    b_w = 1.0 + b_x
    exact = b_w == 1.0
    return tl.where(exact, b_x, tl.log(b_w) * tl.div_rn(b_x, tl.where(exact, 1.0, b_w - 1.0)))


@triton.jit
def gumbel(b_word):
    """-log(-log1p(-u)), u = (word + 0.5) / 2**32."""
    b_u = tl.minimum((b_word.to(tl.float32) + 0.5) * (2.0**-32), LARGEST_UNIFORM)
    return -tl.log(-log1p(-b_u))
