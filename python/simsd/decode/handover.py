"""Between the target and a draft model that drafts meanwhile, from slots of its own.

The draft's slots are a copy of the target's as they were when it began, which is the stamp of what it proposes: which
sequence, where its current block began, and the tokens that it took for granted. What the target has committed since
either agrees with them, and the proposal moves along with the text, or it is dropped. Functions of static shape, as an
iteration is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simsd.decode.exchange import Commands
from simsd.decode.lookup import draft_without_model
from simsd.decode.slots import Slots
from simsd.models.runner import ModelRunner
from simsd_kernels.advance_slots.api import NO_END

if TYPE_CHECKING:
    from simsd.decode.iteration import Shape


def adopt(slots: Slots, drafted: Slots, noise: bool) -> None:
    """Takes over what the draft has proposed since `drafted` (on the same device) was a copy of `slots`.

    A proposal stands where the slot has the sequence of that time, has not gone beyond what was proposed, and has
    revealed nothing since that differs from it. Where it does not, the slot's own one stays as it is.
    """
    length, blocks, begin = slots.length, slots.lookahead, drafted.start
    passed = (slots.start - begin).div(length, rounding_mode="floor")  # blocks finished since
    same_sequence = (slots.request_epoch == drafted.request_epoch) & (begin >= 0) & (slots.start >= 0) & (passed >= 0)
    number = torch.arange(blocks, device=slots.device)
    places = begin.clamp(min=0)[:, None] + torch.arange(blocks * length, device=slots.device)  # [B, K * L], in the text
    text = slots.text.gather(1, places).view(-1, blocks, length)
    finished = (number < passed[:, None])[..., None]
    known = finished | ((number == passed[:, None])[..., None] & slots.bits_in(slots.revealed)[:, None])  # [B, K, L]
    agrees = ((text == drafted.draft_tokens) | ~known).all(2)
    stands = same_sequence & (passed < drafted.proposal_depth) & agrees.all(1)

    source = (passed.clamp(min=0)[:, None] + number).clamp(max=blocks - 1)

    def move(mine: Tensor, drafted: Tensor) -> None:
        where = stands.view(-1, *[1] * (mine.dim() - 1))
        mine.copy_(torch.where(where, drafted[slots.index[:, None], source], mine))

    for mine, proposed in zip(slots.proposal(blocks), drafted.proposal(blocks), strict=True):
        move(mine, proposed)
    if noise:
        move(slots.draft_logits, drafted.draft_logits)
    # The draft reads the blocks that it goes on behind from the text.
    ahead = stands[:, None, None] & (number < drafted.proposal_depth[:, None])[..., None] & ~known
    slots.text.scatter_(1, places, torch.where(ahead, drafted.draft_tokens, text).flatten(1))
    end = torch.where(drafted.draft_end < NO_END, drafted.draft_end - passed, NO_END)
    slots.draft_end.copy_(torch.where(stands, end, slots.draft_end))
    slots.proposal_depth.copy_(torch.where(stands, drafted.proposal_depth - passed, slots.proposal_depth))
    # Keys and values are those of the text up to where the two part.
    same = (agrees & finished[..., 0]).int().cumprod(1).sum(1, dtype=torch.int32)
    agreed = drafted.draft_kv_len.minimum(begin + same * length)
    written = torch.where(stands, drafted.draft_kv_len, agreed)
    slots.draft_kv_len.copy_(torch.where(same_sequence, written, slots.draft_kv_len))
    slots.draft_forwards.copy_(torch.where(same_sequence, drafted.draft_forwards, slots.draft_forwards))


def draft_for_itself(slots: Slots, commands: Commands, target: ModelRunner, shape: Shape) -> None:
    """`draft_without_model`, behind `adopt`: where all that it proposes was proposed likewise, what the draft has
    proposed behind it stays."""
    tokens, depth, end = slots.draft_tokens.clone(), slots.proposal_depth.clone(), slots.draft_end.clone()
    draft_without_model(slots, commands, target, shape)
    number = torch.arange(slots.lookahead, device=slots.device)
    same = (slots.draft_tokens == tokens).all(2) & (number < depth[:, None])
    agreed = same.int().cumprod(1).sum(1, dtype=torch.int32)  # blocks
    otherwise = agreed < slots.proposal_depth
    slots.proposal_depth.copy_(torch.where(otherwise, slots.proposal_depth, depth))
    slots.draft_end.copy_(torch.where(otherwise, slots.draft_end, end))
    agreed = slots.draft_kv_len.minimum(slots.start + agreed * slots.length)
    slots.draft_kv_len.copy_(torch.where(otherwise, agreed, slots.draft_kv_len))
