"""The definition of `store_kv`: plain torch, any device, no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """See `api.store_kv`."""
    if k.numel() == 0 or k_cache.numel() == 0:
        return
    batch = torch.arange(slots.shape[0], device=slots.device)[:, None]  # [B, 1]
    rows = torch.arange(slots.shape[1], device=slots.device)
    valid = slots >= 0  # [B, R]
    # Dropping the skipped rows would need their number on the host. They repeat the batch element's first valid row
    # instead, which writes the same values twice; where there is none, slot 0 keeps what it holds.
    row = torch.where(valid, rows, valid.int().argmax(dim=1, keepdim=True))
    slot = slots.gather(1, row).clamp(min=0).long()
    any_valid = valid.any(dim=1)[:, None, None, None]
    with dispatch.without_autocast(k.device):  # CUDA's refuses to assign bfloat16 while it casts to float16
        for new, cache in ((k, k_cache), (v, v_cache)):
            held = cache[batch, :, slot]  # [B, R, Hkv, D]
            cache[batch, :, slot] = torch.where(any_valid, new[batch, :, row], held)
