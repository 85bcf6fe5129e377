"""Triton kernels of `block_verify`: straight from logits, without a probability tensor. The host side is triton.py.

Data path. The kernels of `sample_logits` read every judged row of the target, and every drafted row of the draft, once
(more often only where top-k or top-p are on). `judge` has one program per sequence: it merges the chunks, and decides
all positions at once. Only for a rejection under rule mrs do `weigh_residual` and `draw_residual` read that one row of
target and draft again.

Floor. Bytes: B * L * V * itemsize for match, that and the drafted rows of the draft for mrs. Noise costs about 25
integer operations per id.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simsd_kernels.sample_logits.triton_filters import NO_ID, is_banned, is_kept, load_scaled, lowest_allowed, scaled
from simsd_kernels.sample_logits.triton_kernels import (
    SIZES,
    best_ids,
    draw_logprob,
    finite,
    kept_sum,
    rescaled,
    summary,
)


@triton.jit
def totals(p_stats, p_ids, p_cutoff, b_row, b_wanted, n_stats, n_chunks, CHUNKS: tl.constexpr):
    """Top of whole rows, and Sum exp(x - top) over all ids and over those kept: b_row and b_wanted are [L]."""
    b_top, _, b_second, b_others, _ = summary(p_stats, p_ids, b_row, b_wanted, n_stats, n_chunks, CHUNKS)
    b_sum = tl.where(b_top > float("-inf"), 1.0, 0.0) + rescaled(b_others, b_second, b_top)
    b_kept_sum = b_sum
    if p_cutoff is not None:
        b_kept_sum = kept_sum(p_stats, b_row, b_wanted, b_top, n_stats, n_chunks, CHUNKS)
    return finite(b_top), b_sum, b_kept_sum


@triton.jit
def scaled_at(p_logits, p_banned, b_offset, b_id, b_wanted, temperature):
    """x of ids whose logits lie at b_offset, -inf where none is wanted: [L]."""
    b_x = tl.load(p_logits + b_offset, b_wanted, other=float("-inf"))
    b_banned = b_wanted == 0
    if p_banned is not None:
        b_banned = b_banned | is_banned(p_banned, b_id, b_id, b_wanted)
    return scaled(b_x, temperature, b_banned)


@triton.jit
def probability(p_cutoff, b_x, b_row, b_id, b_wanted, b_top, b_sum):
    """softmax(x)[id], over what is kept. The sum is at least 1, unless nothing is finite."""
    # [L]
    b_weight = tl.exp(b_x - b_top)
    if p_cutoff is not None:
        b_cut_key = tl.load(p_cutoff + b_row * 2, b_wanted, other=0)
        b_cut_id = tl.load(p_cutoff + b_row * 2 + 1, b_wanted, other=0)
        b_weight = tl.where(is_kept(b_x, b_id, b_cut_key, b_cut_id), b_weight, 0.0)
    return tl.div_rn(b_weight, tl.maximum(b_sum, 1.0))


@triton.jit(do_not_specialize=SIZES)
def judge(
    p_target,  # [B, L, V]
    p_draft,  # [B, L, V] or None
    p_banned,  # int32 [ceil(V / 32)] or None, see simsd_kernels.banned_mask
    p_stats,  # float32 [6, B * L, chunks], see scan_chunks
    p_ids,  # int32 [2, B * L, chunks]
    p_cutoff,  # int32 [B * L, 2] or None, see find_cutoffs: used under rule mrs, where the draw is not by noise
    p_draft_stats,  # the same of the draft, or None
    p_draft_tops,
    p_draft_cutoff,
    p_draft_ids,  # int64 [B, L]
    p_known,  # int32 [B]
    p_drafted,  # int64 [B]
    p_temperature,  # float32 [B]
    p_coin,  # float32 [B, L] or None
    p_accepted,  # out: int32 [B]
    p_bonus,  # out: int64 [B]
    p_tokens,  # out: int64 [B, L]
    p_target_ids,  # out: int64 [B, L]
    p_prob,  # out: float32 [B, L]
    p_draw_logprob,  # out: float32 [B, L]
    p_stop,  # out: int32 [B]: the position whose token is yet to be drawn from the residual, -1 for none
    p_rejected,  # out: float32 [B, 5]: that row's maximum and kept sum, target's and draft's; the target's sum
    n_rows,
    n_length,
    n_ids,
    n_chunks,
    stride_target_b,
    stride_target_l,
    stride_target_v,
    stride_draft_b,
    stride_draft_l,
    stride_draft_v,
    NOISY: tl.constexpr,  # whether the target's tokens are drawn with noise, where they are drawn
    LENGTH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program per sequence: all positions at once, then the first rejection decides what each of them becomes."""
    i_b = tl.program_id(0).to(tl.int64)
    known = tl.load(p_known + i_b)
    drafted = tl.load(p_drafted + i_b)
    temperature = tl.load(p_temperature + i_b)
    o_l = tl.arange(0, LENGTH)
    o_row = i_b * n_length + o_l
    exists = o_l < n_length
    # [LENGTH]
    is_known = o_l < known
    is_drafted = exists & (o_l >= known) & (((drafted >> o_l.to(tl.int64)) & 1) != 0)
    b_draft_ids = tl.load(p_draft_ids + o_row, exists, other=0)

    # [LENGTH]; nothing was stored for known rows
    b_wanted = exists & (o_l >= known)
    n_stats = n_rows * n_chunks
    b_top, b_sum, b_kept_sum = totals(p_stats, p_ids, p_cutoff, o_row, b_wanted, n_stats, n_chunks, CHUNKS)
    b_best, b_target_ids = best_ids(p_stats + 4 * n_stats, p_ids + n_stats, o_row, b_wanted, n_chunks, CHUNKS)
    allowed = 0
    if p_banned is not None:
        allowed = lowest_allowed(p_banned, n_ids)
    b_target_ids = tl.where(b_best > float("-inf"), b_target_ids, allowed).to(tl.int64)
    b_accept = b_draft_ids == b_target_ids

    b_target_row = i_b * stride_target_b + o_l.to(tl.int64) * stride_target_l
    b_top_q = b_top
    b_sum_q = b_sum
    if p_draft is not None:
        b_inside = is_drafted & (b_draft_ids >= 0) & (b_draft_ids < n_ids)
        b_top_q, _, b_sum_q = totals(p_draft_stats, p_draft_tops, p_draft_cutoff, o_row, is_drafted, n_stats, n_chunks,
                                     CHUNKS)  # fmt: skip
        b_x_p = scaled_at(p_target, p_banned, b_target_row + b_draft_ids * stride_target_v, b_draft_ids, b_inside,
                          temperature)  # fmt: skip
        b_p = probability(p_cutoff, b_x_p, o_row, b_draft_ids, b_inside, b_top, b_kept_sum)
        b_draft_row = i_b * stride_draft_b + o_l.to(tl.int64) * stride_draft_l
        b_x_q = scaled_at(p_draft, p_banned, b_draft_row + b_draft_ids * stride_draft_v, b_draft_ids, b_inside,
                          temperature)  # fmt: skip
        b_q = probability(p_draft_cutoff, b_x_q, o_row, b_draft_ids, b_inside, b_top_q, b_sum_q)
        b_coin = tl.load(p_coin + o_row, exists, other=0.0)
        b_tossed = b_inside & (b_coin * b_q < b_p)
        b_accept = tl.where(temperature > 0, b_tossed, b_accept)

    stop = tl.min(tl.where(is_drafted & (b_accept == 0), o_l, LENGTH))
    tl.store(p_accepted + i_b, tl.sum((is_drafted & (o_l < stop)).to(tl.int32)))
    at_stop = o_l == stop
    bonus = tl.sum(tl.where(at_stop, b_target_ids, 0))
    tl.store(p_bonus + i_b, tl.where(stop < LENGTH, bonus, -1))
    if p_draft is not None:
        tl.store(p_stop + i_b, tl.where((stop < LENGTH) & (temperature > 0), stop, -1))
        p_rejected += i_b * 5
        tl.store(p_rejected, tl.sum(tl.where(at_stop, b_top, 0.0)))
        tl.store(p_rejected + 1, tl.sum(tl.where(at_stop, b_kept_sum, 0.0)))
        tl.store(p_rejected + 2, tl.sum(tl.where(at_stop, b_top_q, 0.0)))
        tl.store(p_rejected + 3, tl.sum(tl.where(at_stop, b_sum_q, 0.0)))
        tl.store(p_rejected + 4, tl.sum(tl.where(at_stop, b_sum, 0.0)))

    b_target_ids = tl.where(is_known, b_draft_ids, b_target_ids)
    b_tokens = tl.where(is_known | is_drafted, b_draft_ids, b_target_ids)
    b_tokens = tl.where(at_stop, b_target_ids, b_tokens)
    b_tokens = tl.where(o_l > stop, -1, b_tokens)
    b_judged = tl.where(b_tokens >= 0, b_tokens, b_target_ids)
    b_judged = tl.minimum(tl.maximum(b_judged, 0), n_ids - 1)
    b_x = scaled_at(p_target, p_banned, b_target_row + b_judged * stride_target_v, b_judged, b_wanted, temperature)
    b_prob = probability(None, b_x, o_row, b_judged, b_wanted, b_top, b_sum)
    b_draws = b_wanted
    if not NOISY:
        b_draws = is_drafted & (o_l < stop)  # at the stop `draw_residual` draws
    b_logprob = draw_logprob(b_x, b_top, b_kept_sum, tl.where(b_draws, temperature, 0.0) > 0)
    tl.store(p_tokens + o_row, b_tokens, exists)
    tl.store(p_target_ids + o_row, b_target_ids, exists)
    tl.store(p_prob + o_row, tl.where(is_known, 1.0, b_prob), exists)
    tl.store(p_draw_logprob + o_row, tl.where(is_known, 0.0, b_logprob), exists)


@triton.jit
def kept_softmax(p_row, p_banned, p_cutoff, p_rejected, b_v, n_ids, stride_v, temperature):
    """exp(x - top) and the softmax over what is kept, at ids b_v of a row with its top and kept sum at p_rejected."""
    # [CHUNK]
    b_x = load_scaled(p_row, p_banned, b_v, b_v, n_ids, stride_v, temperature)
    b_weight = tl.exp(b_x - tl.load(p_rejected))
    b_kept = b_weight
    if p_cutoff is not None:
        b_kept = tl.where(is_kept(b_x, b_v, tl.load(p_cutoff), tl.load(p_cutoff + 1)), b_weight, 0.0)
    return b_weight, tl.div_rn(b_kept, tl.zeros_like(b_kept) + tl.maximum(tl.load(p_rejected + 1), 1.0))


@triton.jit
def residual(p_target, p_draft, p_banned, p_cutoff, p_draft_cutoff, p_rejected, i_b, i_l, o_v, n_length, n_ids,
             temperature, stride_target_b, stride_target_l, stride_target_v, stride_draft_b, stride_draft_l,
             stride_draft_v):  # fmt: skip
    """max(p - q, 0) and p of the rejected row at ids o_v, float64 (the reference adds them up in it), and exp(x - top)
    of the target."""
    p_target += i_b * stride_target_b + i_l * stride_target_l
    p_draft += i_b * stride_draft_b + i_l * stride_draft_l
    if p_cutoff is not None:
        p_cutoff += (i_b * n_length + i_l) * 2
        p_draft_cutoff += (i_b * n_length + i_l) * 2
    p_rejected += i_b * 5
    # [CHUNK]
    b_weight, b_p = kept_softmax(p_target, p_banned, p_cutoff, p_rejected, o_v, n_ids, stride_target_v, temperature)
    _, b_q = kept_softmax(p_draft, p_banned, p_draft_cutoff, p_rejected + 2, o_v, n_ids, stride_draft_v, temperature)
    return tl.maximum(b_p - b_q, 0.0).to(tl.float64), b_p.to(tl.float64), b_weight


@triton.jit(do_not_specialize=SIZES)
def weigh_residual(
    p_target,  # [B, L, V]
    p_draft,  # [B, L, V]
    p_banned,  # int32 [ceil(V / 32)] or None, see simsd_kernels.banned_mask
    p_temperature,  # float32 [B]
    p_cutoff,  # int32 [B * L, 2] or None
    p_draft_cutoff,  # int32 [B * L, 2] or None
    p_stop,  # int32 [B]
    p_rejected,  # float32 [B, 5]
    p_mass,  # out: float64 [B, 2, chunks]: sums of max(p - q, 0) and of p
    n_length,
    n_ids,
    n_chunks,
    stride_target_b,
    stride_target_l,
    stride_target_v,
    stride_draft_b,
    stride_draft_l,
    stride_draft_v,
    CHUNK: tl.constexpr,
):
    """One program per (sequence, chunk of the vocabulary), which has nothing to do where nothing was rejected."""
    i_b = (tl.program_id(0) // n_chunks).to(tl.int64)
    i_chunk = tl.program_id(0) % n_chunks
    stop = tl.load(p_stop + i_b)
    if stop < 0:
        return
    o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_surplus, b_p, _ = residual(
        p_target, p_draft, p_banned, p_cutoff, p_draft_cutoff, p_rejected, i_b, stop.to(tl.int64), o_v, n_length, n_ids,
        tl.load(p_temperature + i_b), stride_target_b, stride_target_l, stride_target_v, stride_draft_b,
        stride_draft_l, stride_draft_v)  # fmt: skip
    tl.store(p_mass + i_b * 2 * n_chunks + i_chunk, tl.sum(b_surplus))
    tl.store(p_mass + (i_b * 2 + 1) * n_chunks + i_chunk, tl.sum(b_p))


@triton.jit
def crossing(b_mass, b_at, start, goal):
    """The first place whose running total from `start` exceeds `goal`; the last with any mass if rounding hides it."""
    b_reached = start + tl.cumsum(b_mass, 0)
    first = tl.min(tl.where((b_reached > goal) & (b_mass > 0), b_at, NO_ID))
    last = tl.max(tl.where(b_mass > 0, b_at, -1))
    return tl.where(first < NO_ID, first, last)


@triton.jit(do_not_specialize=SIZES)
def draw_residual(
    p_target,  # [B, L, V]
    p_draft,  # [B, L, V]
    p_banned,  # int32 [ceil(V / 32)] or None, see simsd_kernels.banned_mask
    p_temperature,  # float32 [B]
    p_residual,  # float32 [B]
    p_cutoff,  # int32 [B * L, 2] or None
    p_draft_cutoff,  # int32 [B * L, 2] or None
    p_stop,  # int32 [B]
    p_rejected,  # float32 [B, 5]
    p_mass,  # float64 [B, 2, chunks]
    p_bonus,  # out: int64 [B]
    p_tokens,  # out: int64 [B, L]
    p_prob,  # out: float32 [B, L]
    p_draw_logprob,  # out: float32 [B, L]
    n_length,
    n_ids,
    n_chunks,
    stride_target_b,
    stride_target_l,
    stride_target_v,
    stride_draft_b,
    stride_draft_l,
    stride_draft_v,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program per sequence: inverse CDF over the chunks, then over the ids of the chunk that was hit."""
    i_b = tl.program_id(0).to(tl.int64)
    stop = tl.load(p_stop + i_b)
    if stop < 0:
        return
    o_c = tl.arange(0, CHUNKS)
    p_mass += i_b * 2 * n_chunks + o_c
    # [CHUNKS]
    b_mass = tl.load(p_mass, o_c < n_chunks, other=0.0)
    no_surplus = tl.sum(b_mass) == 0
    if no_surplus:
        b_mass = tl.load(p_mass + n_chunks, o_c < n_chunks, other=0.0)
    total = tl.sum(b_mass)
    if total == 0:
        return  # nothing is finite: judge's token stands
    goal = tl.load(p_residual + i_b).to(tl.float64) * total
    i_chunk = crossing(b_mass, o_c, tl.zeros_like(total), goal)
    start = tl.sum(tl.where(o_c < i_chunk, b_mass, 0.0))

    o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_surplus, b_p, b_weight = residual(
        p_target, p_draft, p_banned, p_cutoff, p_draft_cutoff, p_rejected, i_b, stop.to(tl.int64), o_v, n_length, n_ids,
        tl.load(p_temperature + i_b), stride_target_b, stride_target_l, stride_target_v, stride_draft_b,
        stride_draft_l, stride_draft_v)  # fmt: skip
    token = crossing(tl.where(no_surplus, b_p, b_surplus), o_v, start, goal)
    tl.store(p_bonus + i_b, token.to(tl.int64))
    tl.store(p_tokens + i_b * n_length + stop, token.to(tl.int64))
    weight = tl.sum(tl.where(o_v == token, b_weight, 0.0))
    p_rejected += i_b * 5
    tl.store(p_prob + i_b * n_length + stop, tl.div_rn(weight, tl.maximum(tl.load(p_rejected + 4), 1.0)))
    tl.store(p_draw_logprob + i_b * n_length + stop, tl.log(weight) - tl.log(tl.load(p_rejected + 1)))
