"""A forward that only computes keys and values of clean tokens: the chunks of long prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simsd.decode.rows import key_lifetimes, pending_rows
from simsd.decode.slots import Slots
from simsd.models.runner import ModelRunner


@torch.inference_mode()
def prefill(slots: Slots, model: ModelRunner, kv_len: Tensor, members: Sequence[int], blocks: int) -> None:
    """Brings `kv_len` (a field of `slots`) of some slots up to `blocks` blocks further, as far as their texts go."""
    width = blocks * slots.length
    index = torch.tensor(members).to(slots.device, non_blocking=True)
    text, start, done = (x.index_select(0, index) for x in (slots.text, slots.start, kv_len))
    end = torch.where(start >= 0, start.minimum(done + width), done)
    rows = pending_rows(text, done, end, width, slots.length)
    birth, death = key_lifetimes(rows, end, slots.length, model.kv_slots)
    model.forward(rows.tokens, rows.positions, rows.slots, rows.clock, birth, death, None, members=index)
    kv_len.index_copy_(0, index, end)
