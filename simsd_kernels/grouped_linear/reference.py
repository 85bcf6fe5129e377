"""The definition of `grouped_linear`: plain torch, any device, no host sync.

Every row gets its expert's weight, and then its sums as `thin_linear`'s reference forms them: the bits are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels.thin_linear.reference import MAX_PRODUCTS, sum_of_products


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, scale: Tensor | None = None) -> Tensor:
    """See `api.grouped_linear`. Computes in float32 (float64 for float64)."""
    (count, k), columns = x.shape, weight.shape[1]
    if count * columns == 0:
        return x.new_empty(count, columns)
    rows = x[:, None].to(torch.promote_types(x.dtype, torch.float32))  # [M, 1, K]
    numbers = torch.arange(count, device=x.device, dtype=torch.int32)
    expert = torch.searchsorted(offsets[1:].contiguous(), numbers, right=True)  # [M]
    expert = expert.clamp(max=weight.shape[0] - 1)  # behind the last offset there is none, and nothing is promised
    at_a_time = max(1, MAX_PRODUCTS // max(1, count * k))
    parts = weight.split(at_a_time, dim=1)
    out = torch.cat([sum_of_products(rows, part[expert].to(rows.dtype)) for part in parts], dim=1)
    if scale is not None:
        out = out * scale[expert].to(out.dtype)
    return out.to(x.dtype)
