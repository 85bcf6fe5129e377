"""States that the target saw in its last forward, visited or not, of the current block and of the next one: what it
would draw in each is the best that is known of the states behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import simsd_kernels as kernels
from simsd.decode.draft import OWN, SEQUENTIAL
from simsd.decode.exchange import LOOKUP_DRAFT, SELF_DRAFT, Commands, Report
from simsd.decode.slots import Slots
from simsd.models.attention import unchecked
from simsd.models.runner import ModelRunner

if TYPE_CHECKING:
    from simsd.decode.iteration import Shape

NO_STATE = -1  # a set of everything


class Seen(NamedTuple):
    """M states of each slot as `plan_block` takes them: block, exact, revealed [B, M], the others [B, M, L] but
    sharpness [B]; with noise, rows of logits [N, V]; of an order head, shift and pair [B, M, L, L]."""

    block: Tensor
    exact: Tensor
    revealed: Tensor
    tokens: Tensor
    prob: Tensor
    log_odds: Tensor
    entropy: Tensor
    sharpness: Tensor
    rows: Tensor | None = None
    logits: Tensor | None = None
    shift: Tensor | None = None
    pair: Tensor | None = None


def keep(slots: Slots, commands: Commands, plan: kernels.Plan, report: Report) -> None:
    """Notes which states of a forward are of the blocks that are now current, or of later ones; to be called when the
    slots have gone on, where the target keeps that forward's logits."""
    ran, finished = (commands.runs > 0)[:, None], report.finished[:, None]
    # Where a slot sat out, its rows are those of other logits.
    slots.last_rows.masked_fill_(~ran, -1)
    # The walk has ended within the block: the text before it is then what it was in the rows.
    inside = (slots.last_rows >= 0).any(1, keepdim=True)
    ahead = plan.block - finished  # [B, C]
    count, live = plan.block.shape[1], ran & (ahead >= 0)
    slots.seen_revealed[:, count:].fill_(NO_STATE)
    slots.seen_rows[:, count:].fill_(-1)
    slots.seen_revealed[:, :count] = torch.where(live, plan.state_revealed, NO_STATE)
    slots.seen_block[:, :count] = ahead
    slots.seen_exact[:, :count] = inside & (ahead == 0)
    slots.seen_rows[:, :count] = plan.state_rows
    slots.seen_tokens[:, :count] = plan.states
    if count > 1:
        # A block that the walk has just come to was seen behind what was drafted: nearly what is there now.
        fresh = live & (ahead == 0) & (plan.state_revealed == 0)
        rows = plan.state_rows[slots.index, fresh.int().argmax(1)]
        slots.last_rows.copy_(torch.where(~inside & fresh.any(1, keepdim=True), rows, slots.last_rows))
    report.self_draftable.copy_((slots.last_rows >= 0).sum(1))


def seen_states(slots: Slots, commands: Commands, target: ModelRunner, shape: Shape) -> Seen | None:
    """What the target's last logits say of each state, in slots of which the target itself proposes the current block;
    None where nothing of that is known. With noise each state draws its own from them, except where a strategy has the
    same noise in all: there nothing is made of them."""
    if not shape.self_draft:
        return None
    logits, device = target.last_logits, slots.device

    def every(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((len(logits),), value, dtype=dtype, device=device)

    drawn = unchecked(kernels.sample_logits, device, logits.dtype)(
        *(logits, every(0, torch.float32), every(0, torch.int32), every(1, torch.float32)),
        *(every(0, torch.int64), every(0, torch.int32), every(0, torch.int64)),
        slots.banned(shape.allowed_ids),
    )
    row = slots.seen_rows.clamp(min=0).long()
    token, prob, log_odds, entropy = (x[row] for x in drawn[:4])
    own = (commands.mode == SELF_DRAFT) | (commands.mode == LOOKUP_DRAFT)
    own &= (slots.strategy != SEQUENTIAL) | (slots.temperature == 0)
    revealed, sharpness = slots.bits_in(slots.seen_revealed), slots.order_sharpness[:, OWN]
    seen = Seen(
        *(slots.seen_block, slots.seen_exact),
        torch.where(own[:, None], slots.seen_revealed, NO_STATE),
        torch.where(revealed, slots.seen_tokens, token),
        *(prob, log_odds, entropy, sharpness),
    )
    if shape.noise:
        seen = seen._replace(rows=slots.seen_rows, logits=logits.to(slots.draft_logits.dtype))
    head, asked = target.order_head, commands.head > 0
    if head is None or (target.packed and not asked.any()):
        return seen
    if not target.packed:
        shift, pair = head(revealed, prob, log_odds, entropy)
        shift = torch.where(asked[:, None, None], shift, 0)
        pair = torch.where(asked[:, None, None, None], pair, 0)
    else:  # the host may look: only where there is a state
        live = ((seen.revealed != NO_STATE) & asked[:, None]).nonzero(as_tuple=True)
        shift, pair = torch.zeros_like(prob), prob.new_zeros((*prob.shape, slots.length))
        shift[live], pair[live] = head(*(x[live] for x in (revealed, prob, log_odds, entropy)))
    sharpness = torch.where(asked, sharpness * head.sharpness, sharpness)
    return seen._replace(sharpness=sharpness, shift=shift, pair=pair)
