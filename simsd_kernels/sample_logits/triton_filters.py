"""The logits of a row as `sample_logits` takes them, and what top-k and top-p keep of them, in Triton.

No sort. Ids are ordered by x, of equal x by id, and what is kept is a beginning of that order: it is described by its
last entry, the cutoff (x as an order-preserving integer, id). x of the cutoff is found by narrowing an interval of such
integers: a sweep measures what lies at or above each of three pivots, in ids for top-k and in weight for top-p. Weights
are integers (2**40 exp(x - top)), so their sums are exact and what crosses top_p is never in doubt.

A sweep is by a single program per row, from L2 but for the first. Rows of 151,936 normally distributed logits took 7
of them for top-k 50, and 4 to 15 for top-p 0.9 and 0.95, where many ids are as likely as the one that crosses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
NO_ID = tl.constexpr(2**31 - 1)
LOWEST_KEY = tl.constexpr(-(2**31))
UNIT = tl.constexpr(2.0**40)  # the weight of a row's top: leaves room for 2**22 ids
COLUMNS = tl.constexpr(8)


@triton.jit
def scaled(b_logits, temperature, b_banned):
    """x = logits / temperature (as they are at temperature 0); banned ids and NaN are -inf, nothing is +inf."""
    b_logits = b_logits.to(tl.float32)
    b_x = tl.div_rn(b_logits, tl.zeros_like(b_logits) + tl.where(temperature > 0, temperature, 1.0))
    b_x = tl.where(b_x > LARGEST, LARGEST, b_x)
    return tl.where((b_x != b_x) | b_banned, float("-inf"), b_x)


@triton.jit
def is_banned(p_banned, b_v, b_start, b_wanted):
    """Whether ids b_v are banned: the mask's words are read at b_start, where b_wanted, of the same shape or of one id
    for each row of b_v, of which the others share the word."""
    b_word = tl.load(p_banned + (b_start >> 5), b_wanted, other=0)
    return ((b_word >> (b_v & 31).to(tl.int32)) & 1) != 0


@triton.jit
def lowest_allowed(p_banned, n_ids):
    """The lowest id that is not banned, 0 where all are."""
    found = tl.full([], NO_ID, tl.int32)
    i_v = 0
    while (found == NO_ID) & (i_v < n_ids):
        b_v = i_v + tl.arange(0, 1024)
        b_allowed = b_v < n_ids
        b_allowed = b_allowed & (is_banned(p_banned, b_v, b_v, b_allowed) == 0)
        found = tl.min(tl.where(b_allowed, b_v, NO_ID))
        i_v += 1024
    return tl.where(found == NO_ID, 0, found)


@triton.jit
def load_scaled(p_row, p_banned, b_v, b_start, n_ids, stride_v, temperature):
    """x at ids b_v of the row at p_row; -inf past the end of the vocabulary. b_start as `is_banned` takes it."""
    b_banned = b_v >= n_ids
    if p_banned is not None:
        b_banned = b_banned | is_banned(p_banned, b_v, b_start, b_start < n_ids)
    b_logits = tl.load(p_row + b_v.to(tl.int64) * stride_v, b_v < n_ids, other=float("-inf"))
    return scaled(b_logits, temperature, b_banned)


@triton.jit
def ordered(b_x):
    """x as int32 in the same order; -0 and 0 are equal, as in x."""
    b_bits = tl.where(b_x == 0, 0.0, b_x).to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def inverse(key):
    """x of a key of `ordered`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weight(b_x, top):
    """exp(x - top), int64 in units of 1 / UNIT."""
    return (tl.exp(b_x - top) * UNIT).to(tl.int64)


@triton.jit
def is_kept(b_x, b_v, cut_key, cut_id):
    """Whether x is finite and (x, id) comes no later than the cutoff."""
    b_key = ordered(b_x)
    return (b_x > float("-inf")) & ((b_key > cut_key) | ((b_key == cut_key) & (b_v <= cut_id)))


@triton.jit
def measure(p_row, p_banned, n_ids, stride_v, temperature, top, low, high, pivot_1, pivot_2, pivot_3,
            WEIGH: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """One sweep over a row: ids, or their weight, at or above `low` and each pivot; ends of what is in [low, high)."""
    dtype: tl.constexpr = tl.int64 if WEIGH else tl.int32
    b_above_0 = tl.zeros([LANES], dtype)
    b_above_1 = tl.zeros([LANES], dtype)
    b_above_2 = tl.zeros([LANES], dtype)
    b_above_3 = tl.zeros([LANES], dtype)
    b_first = tl.full([LANES], high, tl.int32)
    b_last = tl.full([LANES], low, tl.int32)
    for i_v in range(0, n_ids, LANES * COLUMNS):
        b_start = i_v + tl.arange(0, LANES)[:, None] * COLUMNS
        b_v = b_start + tl.arange(0, COLUMNS)[None, :]
        # [LANES, COLUMNS]
        b_x = load_scaled(p_row, p_banned, b_v, b_start, n_ids, stride_v, temperature)
        b_key = ordered(b_x)
        if WEIGH:
            b_size = weight(b_x, top)
        else:
            b_size = (b_v < n_ids).to(tl.int32)
        b_above_0 += tl.sum(tl.where(b_key >= low, b_size, 0), 1)
        b_above_1 += tl.sum(tl.where(b_key >= pivot_1, b_size, 0), 1)
        b_above_2 += tl.sum(tl.where(b_key >= pivot_2, b_size, 0), 1)
        b_above_3 += tl.sum(tl.where(b_key >= pivot_3, b_size, 0), 1)
        b_first = tl.minimum(b_first, tl.min(tl.where(b_key >= low, b_key, high), 1))
        b_last = tl.maximum(b_last, tl.max(tl.where(b_key < high, b_key, low), 1))
    return tl.sum(b_above_0), tl.sum(b_above_1), tl.sum(b_above_2), tl.sum(b_above_3), tl.min(b_first), tl.max(b_last)


@triton.jit
def narrow(p_row, p_banned, n_ids, stride_v, temperature, top, low, goal, WEIGH: tl.constexpr, LANES: tl.constexpr):
    """The largest key x at which what lies at or above it reaches a goal, searched in [low, top].

    The goal is `goal` ids or, with WEIGH, the share `goal` of the weight at or above `low`. Returns the key (for ids:
    or a lower one that has as many at or above it), what lies at or above it, what lies strictly above it, the goal.
    """
    dtype: tl.constexpr = tl.int64 if WEIGH else tl.int32
    high = ordered(top) + 1
    at_low = tl.full([], 0, dtype)
    at_high = tl.full([], 0, dtype)
    wanted = tl.full([], -1, dtype)
    sweep = 0
    unsettled = high > low  # true: at least one sweep
    # [low, high) holds the answer throughout: the goal is reached at low and not at high
    while unsettled:
        span = high.to(tl.int64) - low
        pivot_1 = (low + (span >> 2)).to(tl.int32)
        pivot_2 = (low + (span >> 1)).to(tl.int32)
        pivot_3 = (low + (span - (span >> 2))).to(tl.int32)
        if sweep == 0:
            # distances in nats that tell the likely from the rest, in logits of the usual scale
            pivot_1 = tl.maximum(ordered(top - 16), low)
            pivot_2 = tl.maximum(ordered(top - 8), low)
            pivot_3 = tl.maximum(ordered(top - 4), low)
        at_0, at_1, at_2, at_3, first, last = measure(
            p_row, p_banned, n_ids, stride_v, temperature, top, low, high, pivot_1, pivot_2, pivot_3, WEIGH, LANES
        )
        if sweep == 0:
            if WEIGH:
                wanted = tl.ceil(goal.to(tl.float64) * at_0.to(tl.float64)).to(tl.int64)
            else:
                wanted = goal
        passed_1, passed_2, passed_3 = at_1 >= wanted, at_2 >= wanted, at_3 >= wanted
        at_low = tl.where(passed_3, at_3, tl.where(passed_2, at_2, tl.where(passed_1, at_1, at_0)))
        at_high = tl.where(passed_3, at_high, tl.where(passed_2, at_3, tl.where(passed_1, at_2, at_1)))
        low = tl.where(passed_3, pivot_3, tl.where(passed_2, pivot_2, tl.where(passed_1, pivot_1, low)))
        high = tl.where(passed_3, high, tl.where(passed_2, pivot_3, tl.where(passed_1, pivot_2, pivot_1)))
        # no id lies between these ends and those of the interval before, so what was measured still holds
        low = tl.maximum(low, first)
        high = tl.minimum(high, last + 1)
        unsettled = high - 1 > low
        if not WEIGH:
            unsettled = unsettled & (at_low != wanted)
        sweep += 1
    return low, at_low, at_high, wanted


@triton.jit
def nth_id(p_row, p_banned, n_ids, stride_v, temperature, key, n, LANES: tl.constexpr):
    """The n-th id (from 1) whose x has `key`; the row has that many."""
    found = tl.full([], NO_ID, tl.int32)
    left = n.to(tl.int32)
    i_v = 0
    while (found == NO_ID) & (i_v < n_ids):
        b_v = i_v + tl.arange(0, LANES * COLUMNS)
        b_x = load_scaled(p_row, p_banned, b_v, b_v, n_ids, stride_v, temperature)
        b_same = (ordered(b_x) == key).to(tl.int32)
        b_rank = tl.cumsum(b_same, 0)
        found = tl.min(tl.where((b_same > 0) & (b_rank == left), b_v, NO_ID))
        left -= tl.sum(b_same)
        i_v += LANES * COLUMNS
    return found


@triton.jit(do_not_specialize=["n_length"])
def find_cutoffs(
    p_logits,  # [B, L, V]
    p_banned,  # int32 [ceil(V / 32)] or None, see simsd_kernels.banned_mask
    p_known,  # int32 [B] or None: rows below are of no interest
    p_drafted,  # int64 [B] or None: rows whose bit is not set are of no interest
    p_temperature,  # float32 [B]
    p_top_k,  # int32 [B] or None
    p_top_p,  # float32 [B] or None
    p_cutoff,  # out: int32 [B * L, 2]: key and id of the last entry that is kept
    n_length,
    n_ids,
    stride_logits_b,
    stride_logits_l,
    stride_logits_v,
    LANES: tl.constexpr,
):
    """One program per row. At temperature 0 nothing is filtered, as the top is always kept."""
    i_row = tl.program_id(0).to(tl.int64)
    i_b = i_row // n_length
    i_l = i_row % n_length
    if p_known is not None:
        if i_l < tl.load(p_known + i_b):
            return
    if p_drafted is not None:
        if ((tl.load(p_drafted + i_b) >> i_l) & 1) == 0:
            return
    p_cutoff += i_row * 2
    tl.store(p_cutoff, LOWEST_KEY)
    tl.store(p_cutoff + 1, n_ids)
    temperature = tl.load(p_temperature + i_b)
    top_k = n_ids
    if p_top_k is not None:
        top_k = tl.load(p_top_k + i_b)
        top_k = tl.where((top_k > 0) & (top_k < n_ids), top_k, n_ids)
    top_p = 1.0
    if p_top_p is not None:
        top_p = tl.load(p_top_p + i_b)
    by_count = top_k < n_ids
    by_weight = top_p < 1.0
    if (temperature > 0) & (by_count | by_weight):
        p_logits += i_b * stride_logits_b + i_l * stride_logits_l
        # [LANES]
        b_top = tl.full([LANES], float("-inf"), tl.float32)
        for i_v in range(0, n_ids, LANES * COLUMNS):
            b_start = i_v + tl.arange(0, LANES)[:, None] * COLUMNS
            b_v = b_start + tl.arange(0, COLUMNS)[None, :]
            b_x = load_scaled(p_logits, p_banned, b_v, b_start, n_ids, stride_logits_v, temperature)
            b_top = tl.maximum(b_top, tl.max(b_x, 1))
        top = tl.max(b_top)
        if top > float("-inf"):
            cut_key = ordered(top * 0.0 + float("-inf"))
            if by_count:
                cut_key, _, _, _ = narrow(p_logits, p_banned, n_ids, stride_logits_v, temperature, top, cut_key, top_k,
                                          False, LANES)  # fmt: skip
            if by_weight:
                cut_key, at_key, above_key, wanted = narrow(p_logits, p_banned, n_ids, stride_logits_v, temperature,
                                                            top, cut_key, top_p, True, LANES)  # fmt: skip
                # of the ids that share the cutoff's x, those in front of which the weight falls short
                share = tl.maximum(weight(inverse(cut_key), top), 1)
                ties = tl.maximum((wanted - above_key + share - 1) // share, 1)
                if ties * share < at_key - above_key:
                    cut_id = nth_id(p_logits, p_banned, n_ids, stride_logits_v, temperature, cut_key, ties, LANES)
                    tl.store(p_cutoff + 1, cut_id)
            tl.store(p_cutoff, cut_key)
