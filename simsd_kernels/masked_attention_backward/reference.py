"""The definition of `masked_attention_backward`: plain torch, any device, any floating dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch
from simsd_kernels.masked_attention.reference import factor, side_by_side, weighed


def masked_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    clock: Tensor,
    birth: Tensor,
    death: Tensor,
    kv_len: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `api.masked_attention_backward`. Accumulates in float32 (float64 for float64 inputs)."""
    scale = factor(scale, q.shape[3])
    with dispatch.without_autocast(q.device):
        grouped, keys, values, weights, blind = weighed(q, k, v, clock, birth, death, kv_len, scale)
        dout = torch.where(blind, 0, dout).to(grouped.dtype)
        delta = (dout * out).sum(-1).view(*grouped.shape[:3], 1)  # [B, Hkv, G * Lq, 1]
        dout = dout.reshape(grouped.shape)
        dv = weights.transpose(-1, -2) @ dout
        scores = weights * (dout @ values.transpose(-1, -2) - delta) * scale  # their gradient
        dq = (scores @ keys).view(q.shape)
        dk = scores.transpose(-1, -2) @ grouped
    return tuple(side_by_side(x.to(q.dtype)) for x in (dq, dk, dv))
