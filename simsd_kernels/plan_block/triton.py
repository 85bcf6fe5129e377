"""`plan_block` on Triton: triton_kernels.py grows the graphs and lays them out, torch cuts them to the row budget."""

from __future__ import annotations

import contextlib
import math

import torch
import triton
from torch import Tensor

from simsd_kernels.plan_block.reference import copy_stride
from simsd_kernels.plan_block.triton_kernels import MAX_CHILDREN, grow, lay_out
from simsd_kernels.rows import INF

LAYOUT_OPTIONS = {"num_warps": 1}


def configuration(length: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of `grow` for blocks of `length`, and its launch options."""
    padded = triton.next_power_of_2(length)
    # The base, the swaps, and every position once in addition and once away.
    entries = triton.next_power_of_2(1 + padded * padded // 4 + 2 * padded)
    constants = {"LENGTH": padded, "ENTRIES": entries, "CHILDREN": min(MAX_CHILDREN, entries), "AT_ONCE": 32}
    # [64, 64] comparisons of doubles are too much for the registers of four warps.
    warps = 4 if padded <= 16 else 8
    return constants, {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False, "maxnreg": 255}


def plan_block(
    tokens: Tensor,
    revealed: Tensor,
    start: Tensor,
    step: Tensor,
    blocks_left: Tensor,
    clean: Tensor,
    depth: Tensor,
    prob: Tensor,
    log_odds: Tensor,
    entropy: Tensor,
    trust: Tensor,
    power: Tensor,
    draft_logits: Tensor | None,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seed: Tensor | None,
    banned_ids: Tensor | None,
    schedule: Tensor,
    strategy: str,
    threshold: float,
    floor: float,
    mask_id: int,
    max_copies: int,
    max_rows: int,
    scratch: int,
    slots: int,
    stride: int,
) -> tuple[Tensor, ...]:
    """See `api.plan_block`, which has checked the arguments. No host sync."""
    batch, ahead, length = clean.shape
    device = clean.device
    if strategy == "low_confidence_dynamic":  # the bar that `reveal` compares float32 probabilities with
        threshold = torch.tensor(threshold, dtype=torch.float32, device="cpu").item()
    constants, options = configuration(length)
    room = 1 + constants["CHILDREN"] * (max_copies - 1)

    def scratch_memory(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((batch, *shape), dtype=dtype, device=device)

    def number(value: float) -> Tensor:  # Triton would take it as float32
        return torch.full((1,), value, dtype=torch.float64, device=device)

    # The current states are the first of all.
    bits = torch.arange(length, device=device)
    known = revealed & (-1 if length == 64 else (1 << length) - 1)
    progress = torch.ones((batch, 3), dtype=torch.int32, device=device)
    progress[:, 2] = start >= 0
    reach = scratch_memory(room, dtype=torch.float64)
    reach[:, 0] = 1.0
    long = scratch_memory(3, room, dtype=torch.int64)
    long[:, :, 0] = 0
    long[:, 0, 0] = known
    ints = scratch_memory(5, room, dtype=torch.int32)
    ints[:, :, 0] = 0
    ints[:, 1, 0] = step
    ints[:, 2, 0] = 1
    ints[:, 4, 0] = 1
    taken = torch.zeros((batch, max_copies), dtype=torch.int32, device=device)
    score = torch.zeros((batch, max_copies), dtype=torch.float64, device=device)
    seen = scratch_memory(max_copies, length, dtype=torch.int64)
    seen[:, 0] = torch.where((known[:, None] >> bits) & 1 != 0, tokens, -1)
    limits = (power.contiguous(), depth.contiguous(), blocks_left.contiguous(), trust.contiguous())
    numbers = (number(threshold), number(_logit(threshold)), number(floor))
    graph = (progress, reach, long, ints, taken, score, seen)
    work = (
        scratch_memory(max_copies, length, dtype=torch.int64),
        scratch_memory(constants["LENGTH"], dtype=torch.float64),
        scratch_memory(constants["LENGTH"], dtype=torch.int32),
        scratch_memory(constants["ENTRIES"], dtype=torch.float64),
        scratch_memory(constants["ENTRIES"], dtype=torch.int64),
        scratch_memory(constants["CHILDREN"], dtype=torch.int32),
    )
    clean, start = clean.contiguous(), start.contiguous()

    def turns(count: int, proposal: tuple[Tensor, ...], lane_stride: int, block_stride: int) -> None:
        grow[(batch,)](
            *(x.contiguous() for x in proposal), clean, *limits, schedule.contiguous(), *numbers, *graph, *work,
            ahead, length, schedule.shape[0], max_copies, room, count, lane_stride, block_stride,
            STRATEGY=strategy, **constants, **options,
        )  # fmt: skip

    with torch.cuda.device(device) if clean.is_cuda else contextlib.nullcontext():
        sampling = (temperature, top_k, top_p, seed)
        if batch == 0 or ahead == 0:
            pass
        elif draft_logits is None:
            turns(max_copies, (clean, prob, log_odds, entropy), ahead * length, length)
        elif strategy == "sequential" or temperature is None:  # all states of a block have the same draws
            every = (None if value is None else value.repeat_interleave(ahead) for value in sampling)
            first = start[:, None] + length * torch.arange(ahead, dtype=torch.int32, device=device)
            none = torch.zeros(batch * ahead, dtype=torch.int64, device=device)
            drawn = _draw(draft_logits.flatten(0, 1), *every, banned_ids, first.flatten(), none)
            turns(max_copies, drawn, ahead * length, length)
        else:  # each turn draws at the states that the one before took
            lanes = torch.arange(batch, device=device)
            for _ in range(max_copies - 1):
                newest = taken[lanes, (progress[:, 0] - 1).long()].long()
                block = ints[lanes, 0, newest].clamp(max=ahead - 1)
                set_now = long[lanes, 0, newest]
                drawn = _draw(draft_logits[lanes, block.long()], *sampling, banned_ids, start + block * length, set_now)
                turns(1, drawn, length, 0)
        kept, cleaned = _fit(progress, ints, taken, score, start, max_rows // length)
        out = _empty_plan(start, ahead, length, max_copies, slots, stride)
        if batch:
            (token, position, slot, clock, birth, death, states, sets, block_of, reached) = out
            mask = torch.full((1,), mask_id, dtype=torch.int64, device=device)
            lay_out[(batch * (ahead + max_copies),)](
                start, clean, kept, cleaned, reach, long, ints, taken, seen, mask, token, position, slot, clock, birth,
                death, states, sets, block_of, reached, ahead, length, max_copies, room, slots, scratch, stride,
                copy_stride(length), LENGTH=constants["LENGTH"], **LAYOUT_OPTIONS,
            )  # fmt: skip
    return (*out[:9], cleaned, out[9])


def _draw(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seed: Tensor | None,
    banned_ids: Tensor | None,
    first: Tensor,
    known: Tensor,
) -> tuple[Tensor, ...]:
    """token, prob, log_odds and entropy [B, L] of blocks [B, L, V] at positions `first`, with the noise of a state."""
    batch, length, vocabulary = logits.shape

    def every(value: Tensor | None, default: float, dtype: torch.dtype) -> Tensor:
        value = torch.full((batch,), default, dtype=dtype, device=logits.device) if value is None else value
        return value[:, None].expand(batch, length).reshape(-1)

    position = first[:, None] + torch.arange(length, dtype=torch.int32, device=logits.device)
    out = torch.ops.simsd.sample_logits(
        logits.reshape(-1, vocabulary),
        every(temperature, 0.0, torch.float32),
        every(top_k, 0, torch.int32),
        every(top_p, 1.0, torch.float32),
        every(seed, 0, torch.int64),
        position.reshape(-1),
        every(known, 0, torch.int64),
        banned_ids,
    )
    return tuple(x.view(batch, length) for x in out[:4])


def _fit(
    progress: Tensor, ints: Tensor, taken: Tensor, score: Tensor, start: Tensor, copies: int
) -> tuple[Tensor, Tensor]:
    """kept, cleaned int32 [B]: copies of each lane that are among the best-scored of the batch, and finished blocks
    that they need. As `reference._fit`."""
    batch, max_copies = taken.shape
    number = torch.arange(max_copies, device=taken.device)
    exists = (number < progress[:, :1]) & (number > 0)  # [B, C], the current states aside
    cost = ints[:, 2].gather(1, torch.where(exists, taken, 0).long())
    block = ints[:, 0].gather(1, torch.where(exists, taken, 0).long())
    # Lanes in turn, ties in order; scores never rise along a lane, so each lane keeps its first ones.
    order = torch.where(exists, score, -1.0).flatten().argsort(descending=True, stable=True)
    spent = torch.where(exists, cost, copies + 1).flatten()[order].long().cumsum(0)
    fits = torch.empty_like(spent, dtype=torch.bool).scatter_(0, order, spent <= copies).view(batch, max_copies)
    kept = torch.where(start >= 0, 1 + fits.sum(dim=1), 0).int()
    enters = torch.where(fits & (cost == 2), block, 0)
    return kept, enters.amax(dim=1).int() if max_copies else kept


def _empty_plan(start: Tensor, ahead: int, length: int, copies: int, slots: int, stride: int) -> tuple[Tensor, ...]:
    """The outputs but for `cleaned`, in their order; births and deaths are those of the committed prefix."""
    batch, device = start.shape[0], start.device

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((batch, *shape), dtype=dtype, device=device)

    rows = (ahead + copies) * length
    slot = torch.arange(slots, dtype=torch.int32, device=device)
    birth = torch.where(slot < start[:, None], slot // length * stride, INF).int()
    return (
        empty(rows, dtype=torch.int64),
        *(empty(rows, dtype=torch.int32) for _ in range(3)),
        birth,
        torch.full_like(birth, INF),
        empty(copies, length, dtype=torch.int64),
        empty(copies, dtype=torch.int64),
        empty(copies, dtype=torch.int32),
        empty(copies, dtype=torch.float32),
    )


def _logit(p: float) -> float:
    if p <= 0 or p >= 1:
        return -1e30 if p <= 0 else 1e30
    return math.log(p / (1 - p))
