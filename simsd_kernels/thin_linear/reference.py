"""The definition of `thin_linear`: plain torch, any device, no host sync.

Row-independent by construction, not by measurement: products and sums are separate elementwise operations, each rounded
as IEEE 754 says, added as a tree that depends on K alone. So a row's bits cannot depend on what else is computed. The
compiled backend adds in another order: the two agree to rounding, not bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_PRODUCTS = 1 << 24  # that are held at a time


def thin_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """See `api.thin_linear`. Computes in float32 (float64 for float64)."""
    columns, k = weight.shape
    rows = x.reshape(math.prod(x.shape[:-1]), 1, k).to(torch.promote_types(x.dtype, torch.float32))  # [M, 1, K]
    at_a_time = max(1, MAX_PRODUCTS // max(1, rows.shape[0] * k))
    parts = [sum_of_products(rows, part.to(rows.dtype)) for part in weight.split(at_a_time)] if columns else []
    out = torch.cat(parts, dim=1) if parts else rows.new_empty(rows.shape[0], 0)
    if scale is not None:
        out = out * scale.to(out.dtype)
    return out.to(x.dtype).reshape(*x.shape[:-1], columns)


def sum_of_products(rows: Tensor, weight: Tensor) -> Tensor:
    """[M, 1, K] and [N, K], or [M, N, K], to [M, N]."""
    terms = rows * weight  # [M, N, K]
    if terms.shape[-1] == 0:
        return terms.sum(-1)
    while (count := terms.shape[-1]) > 1:
        half = (count + 1) // 2
        pairs = terms[..., : count - half] + terms[..., half:]
        terms = torch.cat((pairs, terms[..., count - half : half]), dim=-1)
    return terms[..., 0]
