"""The definition of `combine_experts`: plain torch, any device, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch


def combine_experts(y: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """See `api.combine_experts`."""
    with dispatch.without_autocast(y.device):
        terms = y[places.long()] * weights[..., None]  # [M, C, N]
        total = y.new_zeros((len(places), y.shape[1]), dtype=torch.promote_types(y.dtype, torch.float32))
        for choice in range(places.shape[1]):
            total = total + terms[:, choice]
        return total.to(y.dtype)
