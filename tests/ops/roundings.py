"""What a result may be that is rounded where transformers' modules round, on its way through float32.

In float16 and bfloat16 silu of a gate and a normed value are rounded before they are multiplied, and two ways to
compute them round apart where the value lies next to a boundary. How often that is says nothing of a kernel: a gate of
16 bits comes again and again in a tensor, and its near tie with it. Where it is does: a float32 that is off by some
units in the last place has one rounding nearly everywhere, and next to a boundary two.
"""

from __future__ import annotations

import torch

UNITS = 4  # of float32, that silu or a normed value may be off; test_silu_mul.py holds every gate to it
LEAST = 1e-35  # what an exponential that underflows is off by

Interval = tuple[torch.Tensor, torch.Tensor]  # the least and the largest that a result may be, elementwise


def roundings(exact: torch.Tensor, dtype: torch.dtype) -> Interval:
    """Of float32 values that are as good as `exact`, float64, when rounded to `dtype`."""
    off = UNITS * torch.finfo(torch.float32).eps * exact.abs() + LEAST
    return (exact - off).to(dtype), (exact + off).to(dtype)


def normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D] over its root mean square, in float64."""
    return x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()


def times(interval: Interval, x: torch.Tensor) -> Interval:
    """Rounded to x's dtype; rounding keeps order, so the ends stay ends."""
    a, b = (end * x for end in interval)
    return torch.minimum(a, b), torch.maximum(a, b)


def assert_within(interval: Interval, out: torch.Tensor) -> None:
    """NaN where the interval is NaN, and there alone."""
    least, largest = interval
    assert out.shape == least.shape and out.dtype == least.dtype
    outside = ~((least <= out) & (out <= largest)) & ~(least.isnan() & out.isnan())
    found = [x[outside][:3].tolist() for x in (least, out, largest)]
    assert not outside.any(), f"{int(outside.sum())} of {out.numel()}, such as (least, given, largest) {found}"
