"""The Triton kernels' noise against the integers that every backend has."""

from __future__ import annotations

import pytest
import torch

from backends import backends, device_of
from simsd_kernels import noise

pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from simsd_kernels.triton_noise import gumbel, noise_words  # noqa: E402

OP = "sample_logits"
pytestmark = backends("triton")
DEVICE = device_of("triton")


@triton.jit
def write_noise(p_seed, p_position, p_revealed, p_word, p_gumbel, QUADS: tl.constexpr):
    i_row = tl.program_id(0)
    b_word = noise_words(
        tl.load(p_seed + i_row), tl.load(p_position + i_row), tl.load(p_revealed + i_row), tl.arange(0, QUADS)
    )
    o_v = i_row * QUADS * 4 + tl.arange(0, QUADS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(p_word + o_v, b_word.to(tl.int64))
    tl.store(p_gumbel + o_v, gumbel(b_word))


def test_noise_is_that_of_every_backend_bit_for_bit():
    seed = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
    position = torch.tensor([0, -1, 2**31 - 1, 7, 40000, 12], dtype=torch.int32)
    revealed = torch.tensor([0, -1, 2**62 + 3, -(2**63), 0b1011, 1 << 40])
    word, variate = torch.empty(6, 1024, dtype=torch.int64), torch.empty(6, 1024)
    given = [x.to(DEVICE) for x in (seed, position, revealed, word, variate)]
    write_noise[(6,)](*given, QUADS=256)
    word, variate = (x.cpu() for x in given[3:])
    expected = noise.words(seed, position, revealed, 1024)
    assert torch.equal(word, expected)
    torch.testing.assert_close(variate, noise.gumbel(expected), rtol=4e-7, atol=4e-7)


@triton.jit
def write_gumbel(p_word, p_gumbel, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_gumbel + o, gumbel(tl.load(p_word + o).to(tl.uint32)))


def test_gumbel_is_accurate_in_both_tails():
    word = torch.tensor(
        [0, 1, 2, 3, 100, 5000, 1 << 20, 1 << 31, 2**32 - 129, 2**32 - 128, 2**32 - 2, 2**32 - 1] + [9] * 4
    )
    variate = torch.empty(16, device=DEVICE)
    write_gumbel[(1,)](word.to(DEVICE), variate, N=16)
    u = ((word.double().float() + 0.5) * 2.0**-32).clamp(max=noise.LARGEST_UNIFORM).double()
    torch.testing.assert_close(variate.cpu().double(), -torch.log(-torch.log1p(-u)), rtol=1e-6, atol=1e-6)
