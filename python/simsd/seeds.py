"""Seeds: fresh ones, those of several samples of one prompt, and those of rows of a data set."""

from __future__ import annotations

import hashlib
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
    return _derived(seed, (sample, 0, 0))


def row_seed(seed: int, row_id: int | str) -> int:
    """Philox(seed, BLAKE2b(id)): the seed of a row of a data set, by its id alone (7 and "7" are one id).

    As `sample_seed`, with the counter (2**32 - 1, low, high, 1), where low and high are the first two little-endian
    words of BLAKE2b of the id as UTF-8 text.
    """
    digest = hashlib.blake2b(str(row_id).encode(), digest_size=8).digest()
    return _derived(seed, (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"), 1))


def _derived(seed: int, counter: tuple[int, int, int]) -> int:
    low, high, *_ = noise.philox4x32((POSITION, *counter), (seed & noise.WORD, (seed >> 32) & noise.WORD))
    unsigned = high << 32 | low
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned
