"""Seeds: fresh ones, and those of several samples of one prompt."""

from __future__ import annotations

import secrets

from simsd_kernels import noise

# The counter's position of derived seeds. Tokens have positions from 0 on: no noise of a text is drawn there.
POSITION = noise.WORD


def fresh_seed() -> int:
    """A seed from the operating system, in [0, 2**63): independent of torch's, numpy's and Python's generators."""
    return secrets.randbits(63)


def sample_seed(seed: int, sample: int) -> int:
    """Philox(seed, sample): the seed of a prompt's sample number `sample`, which is `seed` itself for sample 0.

    For the others the first two words, low and high, of Philox4x32-10 with the key (seed low, seed high) and the
    counter (2**32 - 1, sample, 0, 0), as an int64.
    """
    if sample == 0:
        return seed
    low, high, *_ = noise.philox4x32((POSITION, sample, 0, 0), (seed & noise.WORD, (seed >> 32) & noise.WORD))
    unsigned = high << 32 | low
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned
