"""The definition of `qk_norm_rope_store`: the operations of transformers' Qwen3Attention, each rounded as there."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch
from simsd_kernels.store_kv import reference as store_kv


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., D] normalised in float32 (float64 for float64), rounded to its dtype, then scaled in it."""
    if weight is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, R, H, D] with columns i and i + D_rot / 2 turned by the angle of row r; columns from D_rot on stay."""
    rotary = cos.shape[-1]
    turned, kept = x[..., :rotary], x[..., rotary:]
    crossed = torch.cat((-turned[..., rotary // 2 :], turned[..., : rotary // 2]), dim=-1)
    return torch.cat((turned * cos[:, :, None] + crossed * sin[:, :, None], kept), dim=-1)


def qk_norm_rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    eps: float,
) -> Tensor:
    """See `api.qk_norm_rope_store`."""
    with dispatch.without_autocast(q.device):
        keys = rotate(rms_norm(k, k_weight, eps), cos, sin)
        store_kv.store_kv(keys.transpose(1, 2), v.transpose(1, 2), k_cache, v_cache, slots)
        return rotate(rms_norm(q, q_weight, eps), cos, sin).transpose(1, 2).contiguous()
