"""Triton kernels of `sample_logits`; `block_verify` scans its rows by the same ones. The host side is triton.py.

Rows are those of [B, L, V], with temperature, filters and seed per sequence; the rows [R, V] of `sample_logits` are
sequences of length one.

Data path. `find_cutoffs` (triton_filters.py), one program per row, turns top-k and top-p into the last id that they
keep; it returns at once for a row that neither filters. `scan_chunks`, one program per (row, chunk of a constant number
of ids), reads every row once and keeps per chunk what the statistics are made of, and the best score with the sampler's
noise. `finish_rows` merges the chunks. No program talks to another, and the order of every sum is fixed by constants,
so a row gives the same bits in any company.

Floor. Bytes: R * V * itemsize, once; every sweep of a filter comes on top. Noise is about 25 integer operations per id.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simsd_kernels.sample_logits.triton_filters import NO_ID, is_banned, is_kept, load_scaled, lowest_allowed, scaled
from simsd_kernels.triton_noise import gumbel, log1p, noise_words

# A vocabulary is specialised to being a multiple of 16, as it mostly is: then whole vectors are masked, and loaded.
SIZES = ["n_rows", "n_length", "n_chunks"]


@triton.jit
def finite(b_max):
    return tl.where(b_max > float("-inf"), b_max, 0.0)


@triton.jit(do_not_specialize=SIZES)
def scan_chunks(
    p_logits,  # [B, L, V]
    p_banned,  # int32 [ceil(V / 32)] or None, see simsd_kernels.banned_mask
    p_known,  # int32 [B] or None: rows below are of no interest
    p_drafted,  # int64 [B] or None: rows whose bit is not set are of no interest
    p_temperature,  # float32 [B]
    p_seed,  # int64 [B] or None
    p_position,  # int32 [B, L] or None
    p_revealed,  # int64 [B, L] or None
    p_cutoff,  # int32 [B * L, 2] or None, see find_cutoffs
    p_stats,  # out: float32 [6, B * L, chunks], see `summary`; then the best score, and the sum over what is kept
    p_ids,  # out: int32 [2, B * L, chunks]: ids of the maximum and of the best score
    n_rows,
    n_length,
    n_ids,
    n_chunks,
    stride_logits_b,
    stride_logits_l,
    stride_logits_v,
    CHUNK: tl.constexpr,
):
    """One program per (row, chunk of the vocabulary). The ids are laid out [CHUNK / 4, 4], as the noise comes."""
    i_row = (tl.program_id(0) // n_chunks).to(tl.int64)
    i_chunk = tl.program_id(0) % n_chunks
    i_b = i_row // n_length
    i_l = i_row % n_length
    if p_known is not None:
        if i_l < tl.load(p_known + i_b):
            return
    if p_drafted is not None:
        if ((tl.load(p_drafted + i_b) >> i_l) & 1) == 0:
            return
    temperature = tl.load(p_temperature + i_b)
    o_quad = i_chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    o_v = o_quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    p_logits += i_b * stride_logits_b + i_l * stride_logits_l
    # [CHUNK / 4, 4]
    b_x = load_scaled(p_logits, p_banned, o_v, o_quad[:, None] * 4, n_ids, stride_logits_v, temperature)
    top = tl.max(b_x)
    top_id = tl.min(tl.where(b_x == top, o_v, NO_ID))
    b_others = tl.where(o_v == top_id, float("-inf"), b_x)
    second = tl.max(b_others)
    b_distance = b_others - finite(second)
    b_weight = tl.exp(b_distance)
    n_stats = n_rows * n_chunks
    p_stats += i_row * n_chunks + i_chunk
    p_ids += i_row * n_chunks + i_chunk
    tl.store(p_stats, top)
    tl.store(p_stats + n_stats, second)
    tl.store(p_stats + 2 * n_stats, tl.sum(b_weight))
    tl.store(p_stats + 3 * n_stats, tl.sum(tl.where(b_weight > 0, b_weight * b_distance, 0.0)))
    tl.store(p_ids, top_id)

    b_kept = b_x > float("-inf")
    if p_cutoff is not None:
        b_kept = is_kept(b_x, o_v, tl.load(p_cutoff + i_row * 2), tl.load(p_cutoff + i_row * 2 + 1))
        tl.store(p_stats + 5 * n_stats, tl.sum(tl.where(b_kept, tl.exp(b_x - finite(top)), 0.0)))
    b_score = b_x
    if p_seed is not None:
        if temperature > 0:
            seed = tl.load(p_seed + i_b)
            b_word = noise_words(seed, tl.load(p_position + i_row), tl.load(p_revealed + i_row), o_quad)
            b_score = tl.where(b_kept, b_x + gumbel(b_word), float("-inf"))
    best = tl.max(b_score)
    tl.store(p_stats + 4 * n_stats, best)
    tl.store(p_ids + n_stats, tl.min(tl.where(b_score == best, o_v, NO_ID)))


@triton.jit
def best_ids(p_score, p_id, b_row, b_wanted, n_chunks, CHUNKS: tl.constexpr):
    """The best score of whole rows and its lowest id, from those of their chunks: b_row and b_wanted are [ROWS]."""
    b_best = tl.full(b_row.shape, float("-inf"), tl.float32)
    b_best_id = tl.full(b_row.shape, NO_ID, tl.int32)
    for i_chunk in range(0, n_chunks, CHUNKS):
        o_c = i_chunk + tl.arange(0, CHUNKS)
        b_at = b_row[:, None] * n_chunks + o_c[None, :]
        b_exists = b_wanted[:, None] & (o_c < n_chunks)[None, :]
        # [ROWS, CHUNKS]
        b_score = tl.load(p_score + b_at, b_exists, other=float("-inf"))
        b_id = tl.load(p_id + b_at, b_exists, other=NO_ID)
        b_top = tl.max(b_score, 1)
        b_top_id = tl.min(tl.where(b_score == b_top[:, None], b_id, NO_ID), 1)
        # chunks come in ascending order of ids, so a tie stays where it is
        b_best_id = tl.where(b_top > b_best, b_top_id, b_best_id)
        b_best = tl.maximum(b_best, b_top)
    return b_best, b_best_id


@triton.jit
def rescaled(b_value, b_from, b_to):
    """b_value * exp(b_from - b_to) for b_from <= b_to; 0 where that has vanished, whatever b_value."""
    b_factor = tl.exp(b_from - finite(b_to))
    return tl.where(b_factor > 0, b_value * b_factor, 0.0)


@triton.jit
def summary(p_stats, p_ids, b_row, b_wanted, n_stats, n_chunks, CHUNKS: tl.constexpr):
    """What softmax(x) of whole rows is made of: b_row and b_wanted are [ROWS], n_stats is the size of one statistic.

    The largest entry is kept apart: its weight is 1, and what the others add would drown in it. Returns top and its id;
    second, the largest of the others, sum = Sum exp(x - second) and moment = Sum exp(x - top) (x - top) over them.
    """
    b_top, b_top_id = best_ids(p_stats, p_ids, b_row, b_wanted, n_chunks, CHUNKS)
    b_second = tl.full(b_row.shape, float("-inf"), tl.float32)
    b_sum = tl.zeros(b_row.shape, tl.float32)
    b_moment = tl.zeros(b_row.shape, tl.float32)
    for i_chunk in range(0, n_chunks, CHUNKS):
        o_c = i_chunk + tl.arange(0, CHUNKS)
        b_at = b_row[:, None] * n_chunks + o_c[None, :]
        b_exists = b_wanted[:, None] & (o_c < n_chunks)[None, :]
        # [ROWS, CHUNKS]; the top of a chunk is one of the others, unless it is the row's
        b_first = tl.load(p_stats + b_at, b_exists, other=float("-inf"))
        b_id = tl.load(p_ids + b_at, b_exists, other=NO_ID)
        b_first = tl.where(b_id == b_top_id[:, None], float("-inf"), b_first)
        b_second_2 = tl.load(p_stats + n_stats + b_at, b_exists, other=float("-inf"))
        b_sum_2 = tl.load(p_stats + 2 * n_stats + b_at, b_exists, other=0.0)
        b_moment_2 = tl.load(p_stats + 3 * n_stats + b_at, b_exists, other=0.0)
        b_next = tl.maximum(b_second, tl.max(tl.maximum(b_first, b_second_2), 1))
        b_new = rescaled(1.0, b_first, b_next[:, None]) + rescaled(b_sum_2, b_second_2, b_next[:, None])
        b_sum = rescaled(b_sum, b_second, b_next) + tl.sum(b_new, 1)
        b_second = b_next
        b_new = rescaled(b_first - finite(b_top)[:, None], b_first, b_top[:, None])
        b_from_top = b_moment_2 + b_sum_2 * (b_second_2 - finite(b_top)[:, None])
        b_moment += tl.sum(b_new + rescaled(b_from_top, b_second_2, b_top[:, None]), 1)
    return b_top, b_top_id, b_second, b_sum, b_moment


@triton.jit
def kept_sum(p_stats, b_row, b_wanted, b_top, n_stats, n_chunks, CHUNKS: tl.constexpr):
    """Sum exp(x - top) over what the cutoff of whole rows keeps: b_row, b_wanted and b_top are [ROWS]."""
    b_sum = tl.zeros(b_row.shape, tl.float32)
    for i_chunk in range(0, n_chunks, CHUNKS):
        o_c = i_chunk + tl.arange(0, CHUNKS)
        b_at = b_row[:, None] * n_chunks + o_c[None, :]
        b_exists = b_wanted[:, None] & (o_c < n_chunks)[None, :]
        # [ROWS, CHUNKS]
        b_max = tl.load(p_stats + b_at, b_exists, other=float("-inf"))
        b_kept = tl.load(p_stats + 5 * n_stats + b_at, b_exists, other=0.0)
        b_sum += tl.sum(rescaled(b_kept, b_max, b_top[:, None]), 1)
    return b_sum


@triton.jit
def draw_logprob(b_x, b_top, b_kept_sum, b_noisy):
    """Log-probability of x among what is kept: 0 where it is no draw, -inf where nothing is finite."""
    b_something = b_kept_sum > 0
    b_logprob = b_x - finite(b_top) - tl.log(tl.where(b_something, b_kept_sum, 1.0))
    return tl.where(b_something, tl.where(b_noisy, b_logprob, 0.0), float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def finish_rows(
    p_logits,  # [R, V]
    p_banned,  # int32 [ceil(V / 32)] or None, see simsd_kernels.banned_mask
    p_temperature,  # float32 [R]
    p_stats,  # float32 [6, R, chunks], see scan_chunks
    p_ids,  # int32 [2, R, chunks]
    p_token,  # out: int64 [R]
    p_prob,  # out: float32 [R], as the next four
    p_log_odds,
    p_entropy,
    p_logsumexp,
    p_draw_logprob,
    n_rows,
    n_ids,
    n_chunks,
    stride_logits_r,
    stride_logits_v,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program per ROWS rows: the token is the best score's id; see reference.statistics for the rest."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = o_r < n_rows
    n_stats = n_rows * n_chunks
    # [ROWS]
    b_temperature = tl.load(p_temperature + o_r, exists, other=0.0)
    b_top, b_top_id, b_second, b_sum, b_moment = summary(p_stats, p_ids, o_r, exists, n_stats, n_chunks, CHUNKS)
    b_best, b_token = best_ids(p_stats + 4 * n_stats, p_ids + n_stats, o_r, exists, n_chunks, CHUNKS)
    b_something = b_best > float("-inf")
    allowed = 0
    if p_banned is not None:
        allowed = lowest_allowed(p_banned, n_ids)
    b_token = tl.where(b_something, b_token, allowed).to(tl.int64)
    tl.store(p_token + o_r, b_token, exists)

    b_banned = b_something == 0
    if p_banned is not None:
        b_banned = b_banned | is_banned(p_banned, b_token, b_token, exists)
    b_logit = tl.load(p_logits + o_r * stride_logits_r + b_token * stride_logits_v, exists, other=0.0)
    b_x = scaled(b_logit, b_temperature, b_banned)
    b_rest = rescaled(b_sum, b_second, b_top)
    b_log_total = log1p(b_rest)
    b_weight = tl.exp(b_x - finite(b_top))
    b_of_top = tl.where(b_sum > 0, b_top - b_second - tl.log(tl.where(b_sum > 0, b_sum, 1.0)), float("inf"))
    # the top's weight of 1 stays in this sum, so taking out the token loses at most one bit
    b_of_other = b_x - finite(b_top) - log1p(tl.maximum(b_rest - b_weight, 0.0))
    b_log_odds = tl.where(b_token == b_top_id, b_of_top, b_of_other)
    tl.store(p_prob + o_r, tl.div_rn(b_weight, 1.0 + b_rest), exists)
    tl.store(p_log_odds + o_r, tl.where(b_something, b_log_odds, float("-inf")), exists)
    tl.store(p_entropy + o_r, b_log_total - tl.div_rn(b_moment, 1.0 + b_rest), exists)
    tl.store(p_logsumexp + o_r, tl.where(b_something, b_top + b_log_total, float("-inf")), exists)
    b_kept_sum = kept_sum(p_stats, o_r, exists, b_top, n_stats, n_chunks, CHUNKS)
    b_logprob = draw_logprob(b_x, b_top, b_kept_sum, b_temperature > 0)
    tl.store(p_draw_logprob + o_r, b_logprob, exists)
