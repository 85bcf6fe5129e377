"""Arguments of ops, by name: tensors, numbers and None."""

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


def alike(a, b):
    """Equal, with NaN in the same places."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])


def signed(bits):
    """A set of 64 as int64 has it."""
    return bits - (1 << 64) if bits >> 63 & 1 else bits


class Pick:
    """pick(*choices), the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *choices):
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def each(self, count: int, *choices):
        return torch.tensor([self(*choices) for _ in range(count)])

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.generator)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def integers(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)


def relaid(x: torch.Tensor, pick: Pick) -> torch.Tensor:
    """The same values, often lying otherwise in memory, and not in memory of their own: around them is garbage."""
    garbage = float("nan") if x.is_floating_point() else -99
    match pick("plain", "plain", "swapped", "columns", "off by one", "padded", "every other") if x.dim() else "plain":
        case "swapped":  # the leading dimensions
            return x.movedim(0, -2).contiguous().movedim(-2, 0) if x.dim() > 2 else x.clone()
        case "columns":  # the last dimension outermost
            return x.movedim(-1, 0).contiguous().movedim(0, -1)
        case "off by one":  # rows that begin 2 or 4 bytes past a multiple of 16
            return torch.nn.functional.pad(x, (1, 0), value=garbage)[..., 1:]
        case "padded":  # rows that are aligned, but not packed
            return torch.nn.functional.pad(x, (0, 16), value=garbage)[..., : x.shape[-1]]
        case "every other":
            return torch.stack((x, torch.full_like(x, garbage)), dim=-1)[..., 0]
    return x.clone()
