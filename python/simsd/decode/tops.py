"""The ids that the target found most probable where it revealed a token, by plain torch of static shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import simsd_kernels as kernels
from simsd_kernels.banned import is_banned
from simsd_kernels.sample_logits.reference import scale

if TYPE_CHECKING:
    from simsd.decode.slots import Slots

WORD = 2**32 - 1
ROWS_AT_A_TIME = 128  # a row takes 8 bytes an id, which for all rows of a large batch would be gigabytes


class Tops(NamedTuple):
    """The N most probable ids, best first, equals by the lower id: ids int32, margin float32 [..., N], by how much each
    one's log-probability is above the revealed token's. A margin is a difference of two logits, so that its bits do not
    depend on how many rows there are."""

    ids: Tensor
    margin: Tensor


def rank(logits: Tensor, tokens: Tensor, temperature: Tensor, banned: Tensor | None, count: int) -> Tops:
    """The `count` most probable ids of each row: of softmax(logits / temperature), at temperature 0 softmax(logits),
    over all ids but the banned.

    Args:
        logits: [M, V]. tokens: integers [M], revealed there. temperature: float32 [M]. banned: a mask, or None.
    """
    x = scale(logits, temperature, is_banned(banned, logits.shape[1], logits.device))
    # Floats in order as integers; `topk` itself breaks ties as it likes.
    bits = (x + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    reversed_ids = WORD - torch.arange(x.shape[1], device=x.device)
    best = ((ordered.long() << 32) + reversed_ids).topk(count).values
    ids = WORD - (best & WORD)
    return Tops(ids.int(), x.gather(1, ids) - x.gather(1, tokens.long()[:, None]))


def _rank_rows(
    logits: Tensor, rows: Tensor, tokens: Tensor, temperature: Tensor, banned: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """`rank` of the given rows of logits."""
    columns = (x.split(ROWS_AT_A_TIME) for x in (rows, tokens, temperature))
    parts = [rank(logits[row], *others, banned, count) for row, *others in zip(*columns, strict=True)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def of_block(slots: Slots, logits: Tensor, tokens: Tensor, allowed_ids: tuple[int, ...]) -> Tops:
    """[B, L, N] of blocks: logits [B, L, V], tokens [B, L]."""
    heat = slots.temperature[:, None].expand_as(tokens).flatten()
    rows = torch.arange(tokens.numel(), device=tokens.device)
    found = _rank_rows(
        logits.flatten(0, 1), rows, tokens.flatten(), heat, slots.banned(allowed_ids), slots.top_logprobs
    )
    return Tops(*(x.view(*tokens.shape, -1) for x in found))


def of_walk(
    slots: Slots, logits: Tensor, plan: kernels.Plan, walk: kernels.Walk, allowed_ids: tuple[int, ...], packed: bool
) -> Tops:
    """[B, K + 2, L, N] of the blocks of a walk, each position at the state at which it was revealed; those that were
    revealed before have what `slots` keeps. To be called before the slots go on.

    Args:
        packed: whether the host may look, and positions at which nothing was revealed are left out.
    """
    rows = _rows_of(slots, plan, walk)  # [B, K + 2, L]
    flat, shape = rows.flatten(), (*rows.shape, slots.top_logprobs)
    tokens = walk.tokens.flatten()
    heat = slots.temperature[:, None, None].expand_as(rows).flatten()
    given = flat.clamp(min=0), tokens, heat
    banned = slots.banned(allowed_ids)
    if packed:
        live = (flat >= 0).nonzero().squeeze(1)
        ids = slots.top_ids.new_zeros((len(flat), shape[-1]))
        margin = slots.top_margin.new_zeros(ids.shape)
        if len(live):
            found = _rank_rows(logits, *(x[live] for x in given), banned, shape[-1])
            ids[live], margin[live] = found
    else:
        ids, margin = _rank_rows(logits, *given, banned, shape[-1])
    tops = Tops(ids.view(shape), margin.view(shape))
    before = slots.bits_in(slots.revealed)[:, :, None]
    for new, kept in zip(tops, (slots.top_ids, slots.top_margin), strict=True):
        new[:, 0] = torch.where(before, kept, new[:, 0])
    return tops


def keep(slots: Slots, tops: Tops, finished: Tensor) -> None:
    """Those of the block that is now current, number finished[b] of the walk."""
    slots.top_ids.copy_(tops.ids[slots.index, finished])
    slots.top_margin.copy_(tops.margin[slots.index, finished])


def _rows_of(slots: Slots, plan: kernels.Plan, walk: kernels.Walk) -> Tensor:
    """int32 [B, K + 2, L]: where in the logits a position was revealed in this walk; -1 elsewhere.

    The walk tells when each position was revealed, and with that the state: the one with the positions that were
    revealed before it, and their tokens.
    """
    number = torch.arange(walk.tokens.shape[1], device=slots.device)
    finished = walk.progress[:, :1]  # [B, 1]
    current = (number == finished)[:, :, None] & slots.bits_in(walk.revealed)[:, None]
    shown = (number < finished)[:, :, None] | current  # [B, K + 2, L]
    before = (number == 0)[:, None] & slots.bits_in(slots.revealed)[:, None]
    earlier = shown[:, :, None] & (walk.step_map[:, :, None] < walk.step_map[..., None])  # [B, K + 2, L, L]
    under = (earlier.long() << slots.offsets).sum(3)
    # [B, K + 2, C]: whether a state is of the block, and has its tokens.
    same = (walk.tokens[:, :, None] == plan.states[:, None]) | ~slots.bits_in(plan.state_revealed)[:, None]
    same = same.all(3) & (plan.block[:, None] == number[:, None])
    fits = same[:, :, None] & (plan.state_revealed[:, None, None] == under[..., None])  # [B, K + 2, L, C]
    state = fits.int().argmax(3)  # the first, as the walk takes it
    rows = plan.state_rows[slots.index[:, None, None], state, slots.offsets]
    return torch.where(shown & ~before & fits.any(3), rows, -1)
