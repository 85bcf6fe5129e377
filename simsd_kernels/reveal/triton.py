"""`reveal` on Triton, and the choice of a step's positions, which the walk of `block_verify.graph` takes too.

Data path. One program per block holds it in registers and ranks its masked positions by comparing every one with every
other. Floor. Latency: a block is two dependent loads and a few reductions over L <= 64 positions.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def count_true(b_flag):
    return tl.sum(b_flag.to(tl.int32), 0)


@triton.jit
def has(known, o_l):
    """int1 [L]: whether the set holds each position."""
    return ((known >> o_l) & 1) != 0


@triton.jit
def chosen(p_prob, p_log_odds, p_entropy, b_at, b_masked, o_l, count, p_bound, threshold, STRATEGY: tl.constexpr):
    """int1 [L]: which masked positions a step reveals, the last step of a block aside. As reveal/reference.py.

    The statistics are read at offsets b_at [L]. count: what the schedule asks for, at most the number of masked
    positions. p_bound, threshold: see `bound_of`.
    """
    # [L]; equal scores leave the lowest position first, which is all that `sequential` asks
    b_score = tl.zeros(b_masked.shape, tl.float32)
    if STRATEGY == "entropy_bounded":
        b_entropy = tl.load(p_entropy + b_at, b_masked, other=float("inf"))
        b_entropy = tl.where(b_entropy != b_entropy, float("inf"), b_entropy)
        b_score = -b_entropy
    elif STRATEGY != "sequential":
        b_score = tl.load(p_log_odds + b_at, b_masked, other=float("-inf"))
        b_score = tl.where(b_score != b_score, float("-inf"), b_score)
    # [L, L]: whether the second position comes before the first
    b_before = (b_score[None, :] == b_score[:, None]) & (o_l[None, :] < o_l[:, None])
    b_before |= b_score[None, :] > b_score[:, None]
    b_rank = tl.sum((b_before & b_masked[None, :]).to(tl.int32), 1)

    if STRATEGY == "entropy_bounded":
        # One by one: a parallel sum would round otherwise than the other backends do.
        masked = count_true(b_masked)
        bound = tl.load(p_bound)
        total = tl.zeros_like(bound)
        below = tl.zeros_like(masked)
        going = masked > 0
        while going:
            total += tl.sum(tl.where(b_masked & (b_rank == below), b_entropy, 0.0), 0).to(tl.float64)
            below += (total < bound).to(tl.int32)
            going = (total < bound) & (below < masked)
        count = tl.maximum(below, 1)
    b_chosen = b_masked & (b_rank < count)
    if STRATEGY == "low_confidence_dynamic":
        b_confident = b_masked & (tl.load(p_prob + b_at, b_masked, other=0.0) > threshold)
        b_chosen = tl.where(count_true(b_confident) >= count, b_confident, b_chosen)
    return b_chosen


@triton.jit(do_not_specialize=["n_length", "n_steps"])
def reveal_step(
    p_tokens,  # updated: int64 [B, L]
    p_revealed,  # updated: int64 [B]
    p_step_map,  # updated: int32 [B, L]
    p_proposal,  # int64 [B, L], contiguous as all that is only read
    p_prob,  # float32 [B, L]
    p_log_odds,  # float32 [B, L]
    p_entropy,  # float32 [B, L]
    p_step,  # int32 [B]
    p_schedule,  # int32 [T]
    p_bound,  # float64 [1], or None: of the sum of entropies
    p_newly,  # out: int64 [B]
    stride_tokens_b, stride_tokens_l, stride_revealed_b, stride_step_map_b, stride_step_map_l,
    n_length,
    n_steps,
    threshold,  # a probability
    STRATEGY: tl.constexpr,
    LENGTH: tl.constexpr,
):  # fmt: skip
    """One program per block. LENGTH is L padded to a power of 2."""
    i_b = tl.program_id(0).to(tl.int64)
    o_l = tl.arange(0, LENGTH)
    step = tl.load(p_step + i_b)
    known = tl.load(p_revealed + i_b * stride_revealed_b)
    active = (step >= 0) & (step < n_steps)
    # [L]
    b_masked = (o_l < tl.where(active, n_length, 0)) & (has(known, o_l) == 0)
    b_at = i_b * n_length + o_l
    b_proposal = tl.load(p_proposal + b_at, b_masked, other=0)
    count = tl.load(p_schedule + step, active, other=0)
    count = tl.minimum(tl.maximum(count, 0), count_true(b_masked))
    b_chosen = chosen(p_prob, p_log_odds, p_entropy, b_at, b_masked, o_l, count, p_bound, threshold, STRATEGY=STRATEGY)
    b_chosen = tl.where(step == n_steps - 1, b_masked, b_chosen)
    b_offset = o_l.to(tl.int64)
    tl.store(p_tokens + i_b * stride_tokens_b + b_offset * stride_tokens_l, b_proposal, b_chosen)
    b_step = tl.zeros_like(o_l) + (step + 1)
    tl.store(p_step_map + i_b * stride_step_map_b + b_offset * stride_step_map_l, b_step, b_chosen)
    b_bit = tl.full((LENGTH,), 1, tl.int64) << o_l
    newly = tl.sum(tl.where(b_chosen, b_bit, 0), 0)  # distinct bits: a sum is their union, bit 63 included
    tl.debug_barrier()  # every warp has read the set
    tl.store(p_revealed + i_b * stride_revealed_b, known | newly)
    tl.store(p_newly + i_b, newly)


def configuration(length: int) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of the kernel for blocks of `length`, and its launch options."""
    padded = triton.next_power_of_2(length)
    # One warp needs no barrier in a reduction, but [64, 64] comparisons are too much for its registers.
    return {"LENGTH": padded}, {"num_warps": 1 if padded <= 16 else 4, "enable_fp_fusion": False}


def bound_of(strategy: str, threshold: float, device: torch.device) -> Tensor | None:
    """The threshold of `entropy_bounded`: Triton takes a number as float32, and the sum is compared in float64."""
    if strategy != "entropy_bounded":
        return None
    return torch.full((1,), threshold, dtype=torch.float64, device=device)


def reveal(
    tokens: Tensor,
    revealed: Tensor,
    step_map: Tensor,
    proposal: Tensor,
    prob: Tensor,
    log_odds: Tensor,
    entropy: Tensor,
    step: Tensor,
    schedule: Tensor,
    strategy: str,
    threshold: float,
) -> Tensor:
    """See `api.reveal`, which has checked the arguments. No host sync."""
    batch, length = tokens.shape
    steps = schedule.shape[0]
    if batch == 0 or length == 0 or steps == 0:
        return torch.zeros_like(revealed)
    newly = torch.empty((batch,), dtype=torch.int64, device=tokens.device)
    given = (proposal, prob, log_odds, entropy, step, schedule)
    constants, options = configuration(length)
    with torch.cuda.device(tokens.device) if tokens.is_cuda else contextlib.nullcontext():
        reveal_step[(batch,)](
            *(tokens, revealed, step_map), *(x.contiguous() for x in given),
            bound_of(strategy, threshold, tokens.device), newly,
            *tokens.stride(), *revealed.stride(), *step_map.stride(),
            length, steps, float(threshold), STRATEGY=strategy, **constants, **options,
        )  # fmt: skip
    return newly
