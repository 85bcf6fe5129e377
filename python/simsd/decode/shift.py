"""Models whose row predicts the next position: where the logits of a masked position are among a plan's rows.

Within a block they are those of the row before, of the same state. The first position of a block is told by the last
row of the block before: a drafted one's is in the plan; the last token of the text, where its keys and values are kept
already, is computed again. It writes what is there.
"""

from __future__ import annotations

import torch
from torch import Tensor

import simsd_kernels as kernels


def with_last_row(kv_len: Tensor, start: Tensor) -> Tensor:
    """What to tell `plan_block` of the tokens with keys and values (int32 [B]), so that the last one before the block
    at `start` is among its rows."""
    return kv_len.minimum((start - 1).clamp(min=0))


def shifted(plan: kernels.Plan, start: Tensor, kv_len: Tensor, pending: int) -> kernels.Plan:
    """The plan with the logits of the rows before those that it asks for.

    Args:
        start: int32 [B], where the current blocks begin. At 0 there is no row before: the first position has its own.
        kv_len: int32 [B], as the plan was made with: the first pending row is at that position.
        pending: P, blocks of rows before those of the K drafted blocks.
    """
    rows, (_, states, length) = plan.tokens.shape[1], plan.states.shape
    first_state = rows - states * length
    slot, row = plan.logits_index // rows, plan.logits_index % rows
    state = (row - first_state).clamp(min=0) // length
    block = plan.block[slot, state]
    last_token = torch.where(start > 0, start - 1 - kv_len, -1)[slot]
    before = torch.where(block > 0, (pending + block) * length - 1, last_token)
    before = torch.where(row % length > 0, row - 1, before)
    row = torch.where(before >= 0, before, row)
    return plan._replace(logits_index=slot * rows + row)
