"""Rows of one forward for a batch: which tokens, at which positions and cache slots, alive when (DESIGN's tables).

A committed token at position p lives in KV slot p; every other row writes to the scratch region behind the sequence's
last one. Clocks of block b are `b * STRIDE + moment`, so that no moment of one block reaches into the next. The rows
of the exact verifier come from `simsd_kernels.plan_block`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from simsd_kernels import rows as lifetimes
from simsd_kernels.masked_attention.api import summed_keys
from simsd_kernels.plan_block.reference import copy_stride

STRIDE = 1024


@dataclasses.dataclass(frozen=True)
class Rows:
    """R rows for each of B sequences, [B, R] each: tokens int64, the others int32. A dead row has clock -1; one that
    nobody sees, as a dead one, slot -1."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    clock: Tensor
    birth: Tensor
    death: Tensor

    def only(self, live: Tensor) -> Rows:
        """The same with the sequences where `live` (bool [B]) does not hold dead."""
        live = live[:, None]
        return Rows(
            self.tokens,
            self.positions,
            torch.where(live, self.slots, -1),
            torch.where(live, self.clock, -1),
            torch.where(live, self.birth, lifetimes.INF),
            self.death,
        )

    def followed_by(self, other: Rows) -> Rows:
        """These rows of each sequence, then the other's."""
        return Rows(*(torch.cat(pair, 1) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))


def temporal_rows(
    tokens: Tensor,
    reveal_step: Tensor,
    known: Tensor,
    start: Tensor,
    scratch: int,
    mask_id: int,
    last: Tensor | None = None,
) -> Rows:
    """SimSD's verification rows (arXiv 2606.02544, temporal mask): known and reference tokens, then mask tokens.

    Args:
        tokens: int64 [B, L], the drafted blocks, the mask token where nothing was drafted; the first `known` (int32
            [B]) of each are committed.
        reveal_step: int32 [B, L], the step t(i) in 1..T at which the draft revealed position i; 0 where it never did,
            for positions past `known`. Such a position has a dead reference row and is judged last.
        start: int32 [B], positions of the blocks' first tokens. scratch: first free slot.
        last: of a model whose row predicts the next position, the tokens before the blocks, int64 [B]; anything where
            start is 0.

    Returns:
        2L rows, or 3L with `last`. Position i is judged at the i-th of the last L; where it is known that row is dead,
        and nobody needs its logits.
    """
    length = tokens.shape[1]
    positions = span(start, length)
    is_known = torch.arange(length, device=tokens.device) < known[:, None]  # [B, L]
    drafted = torch.where(reveal_step > 0, reveal_step, lifetimes.NEVER)
    steps = torch.where(is_known, lifetimes.KNOWN, drafted)
    reference, mask = lifetimes.temporal_rows(steps, positions // length, STRIDE)
    clock, birth, death = lifetimes.concatenate(reference, mask)
    rows = Rows(
        torch.cat([tokens, torch.full_like(tokens, mask_id)], 1),
        positions.repeat(1, 2),
        _scratch(torch.cat([positions, positions], 1), scratch).masked_fill(clock < 0, -1),
        clock,
        birth,
        death,
    )
    if last is None:
        return rows
    steps = torch.where(steps == lifetimes.NEVER, STRIDE, steps)
    return rows.followed_by(_rows_before(tokens, steps, start, mask[0], last, mask_id))


def _rows_before(tokens: Tensor, steps: Tensor, start: Tensor, moments: Tensor, last: Tensor, mask_id: int) -> Rows:
    """The rows that tell of each position of a drafted block where a row predicts the next position: that of the
    position before, holding what the draft had there when it revealed this one, at the same moment. It sees, and nobody
    sees it. A block's first position has the clean row of the token before; a text's, which has none, its own mask.

    Args:
        steps: int [B, L], when each position was revealed. moments: int32 [B, L], clocks of the mask rows, -1 in dead
            ones.
    """
    length, has_last = tokens.shape[1], start > 0
    inside = torch.where(steps[:, :-1] < steps[:, 1:], tokens[:, :-1], mask_id)
    first = torch.where(has_last, last, mask_id)
    committed = (start.div(length, rounding_mode="floor") - 1) * STRIDE
    clock = moments.clone()
    clock[:, 0] = torch.where(has_last & (moments[:, 0] >= 0), committed, moments[:, 0])
    unseen = torch.full_like(moments, lifetimes.INF)
    positions = span(start - 1, length).clamp(min=0)
    return Rows(torch.cat([first[:, None], inside], 1), positions, torch.full_like(moments, -1), clock, unseen, unseen)


def pending_rows(text: Tensor, committed: Tensor, end: Tensor, count: int, block_length: int) -> Rows:
    """The tokens `committed[b] .. end[b] - 1` of text [B, capacity] as clean rows, at most `count` of them:
    block-causal, alive for good, K/V into their final slots."""
    positions = span(committed, count)
    live = positions < end[:, None]
    index = positions.clamp(0, text.shape[1] - 1).long()
    clock, birth, death = lifetimes.clean_rows(positions // block_length, STRIDE)
    return Rows(
        text.gather(1, index),
        positions.clamp(min=0),
        torch.where(live, positions, -1),
        torch.where(live, clock, -1),
        torch.where(live, birth, lifetimes.INF),
        death,
    )


def key_lifetimes(rows: Rows, end: Tensor, block_length: int, slots: int) -> tuple[Tensor, Tensor]:
    """birth and death, int32 [B, slots], of every cache slot during a forward of `rows` behind `end[b]` clean tokens,
    committed ones and pending ones alike. The last slot must be nobody's."""
    position = torch.arange(slots, dtype=torch.int32, device=rows.slots.device)
    birth = torch.where(position < end[:, None], position // block_length * STRIDE, lifetimes.INF)
    death = torch.full_like(birth, lifetimes.INF)
    index = torch.where(rows.slots >= 0, rows.slots, slots - 1).long()  # dead rows are born never, in the last slot
    return birth.scatter_(1, index, rows.birth), death.scatter_(1, index, rows.death)


def scratch_behind(capacity: int, *devices: torch.device) -> int:
    """The first slot of what is not committed, behind slots for `capacity` positions, in caches on these devices.

    No keys of it are summed together with committed ones, so that a row's sums are grouped alike wherever its copy lies
    and however long the cache is."""
    return aligned(capacity, max(map(summed_keys, devices)))


def aligned(slot: int, alignment: int) -> int:
    """The first slot >= `slot` on an `alignment` boundary."""
    return -(-slot // alignment) * alignment


def span(first: Tensor, length: int) -> Tensor:
    """int32 [B, length]: first[b], first[b] + 1, ..."""
    return first[:, None] + torch.arange(length, dtype=torch.int32, device=first.device)


def state_stride(length: int) -> int:
    """KV slots of scratch that a state of a block takes."""
    return copy_stride(length)


def _scratch(positions: Tensor, scratch: int) -> Tensor:
    count = torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device)
    return (scratch + count).expand_as(positions)
