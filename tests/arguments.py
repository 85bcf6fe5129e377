"""Arguments of control ops, by name: tensors, numbers and None."""

from __future__ import annotations

import torch


def copy_of(case):
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in case.items()}


def strided(case):
    """The same, as columns and rows of buffers twice as large."""
    return {
        name: torch.stack((value, value), dim=-1)[..., 1] if torch.is_tensor(value) else value
        for name, value in case.items()
    }


def same_bits(a, b):
    """NaN equals NaN."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32)) if a.dtype == torch.float32 else torch.equal(a, b)


def signed(bits):
    """A set of 64 as int64 has it."""
    return bits - (1 << 64) if bits >> 63 & 1 else bits
