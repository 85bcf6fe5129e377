"""Counter-based noise: Philox4x32-10 and the Gumbel variates that `sample_logits` and `block_verify` add to logits.

The noise of a token is a pure function of (seed, position, revealed set, vocabulary id), so whoever asks for it, in
whatever batch and on whatever device, gets the same: that is what lets a verifier repeat a sampler's draw.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox, section 4.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# The largest float32 below one. Words from 2**32 - 128 up round to u = 1, whose Gumbel would be -inf.
LARGEST_UNIFORM = 1.0 - 2.0**-24


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counter words and two key words, int64 tensors or ints in [0, 2**32), to four of them."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of constant * word. Half words keep every product below 2**63."""
    low_half = (word & 0xFFFF) * constant
    high_half = (word >> 16) * constant
    return (high_half + (low_half >> 16)) >> 16, (low_half + ((high_half & 0xFFFF) << 16)) & WORD


def words(seed: Tensor, position: Tensor, revealed: Tensor, vocabulary: int) -> Tensor:
    """The noise as integers: int64 [R, V] in [0, 2**32) for seed int64 [R], position int32 [R], revealed int64 [R].

    key = (seed low, seed high); counter = (position, id >> 2, revealed low, revealed high); word number id & 3.
    """
    quads = torch.arange((vocabulary + 3) // 4, device=seed.device)[None, :]
    counter = (position.long() & WORD, quads, revealed & WORD, (revealed >> 32) & WORD)
    key = (seed & WORD, (seed >> 32) & WORD)
    per_row = tuple(part if part is quads else part[:, None] for part in counter)
    lanes = philox4x32(per_row, tuple(part[:, None] for part in key))
    return torch.stack(torch.broadcast_tensors(*lanes), dim=-1).flatten(1)[:, :vocabulary]


def gumbel(word: Tensor) -> Tensor:
    """Standard Gumbel variates, float32 and always finite: u = (word + 0.5) / 2**32, then -log(-log1p(-u)).

    log1p, because -log(-log(u)) is infinite wherever u rounds to one: once in some hundred vocabulary rows.
    """
    uniform = (word.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=LARGEST_UNIFORM)))
