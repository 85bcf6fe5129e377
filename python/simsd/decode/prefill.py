"""A forward that only computes keys and values of clean tokens: the chunks of long prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd.decode.rows import key_lifetimes, pending_rows
from simsd.decode.slots import Slots
from simsd.models.runner import ModelRunner


@torch.inference_mode()
def prefill(slots: Slots, model: ModelRunner, kv_len: Tensor, blocks: int) -> None:
    """Brings `kv_len` (a field of `slots`) up to `blocks` blocks further, in each slot as far as its text goes."""
    width = blocks * slots.length
    end = torch.where(slots.start >= 0, slots.start.minimum(kv_len + width), kv_len)
    rows = pending_rows(slots.text, kv_len, end, width, slots.length)
    birth, death = key_lifetimes(rows, end, slots.length, model.kv_slots)
    model.forward(rows.tokens, rows.positions, rows.slots, rows.clock, birth, death, None)
    kv_len.copy_(end)
