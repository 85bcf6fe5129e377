"""The definition of `add_rms_norm`: the operations of transformers' decoder layers, each rounded as there."""

from __future__ import annotations

from torch import Tensor

from simsd_kernels import dispatch
from simsd_kernels.qk_norm_rope_store.reference import rms_norm


def add_rms_norm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `api.add_rms_norm`."""
    with dispatch.without_autocast(residual.device):
        if x is not None:
            residual.add_(x)
        return rms_norm(residual, weight, eps).contiguous()
