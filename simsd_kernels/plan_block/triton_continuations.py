"""What the target may reveal next in a drafted state, and how likely: `reference.continuations` in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_true(b_flag):
    return tl.sum(b_flag.to(tl.int32), 0)


@triton.jit
def weight_of(b_exponent):
    """At most 1. NaN (infinity times a power of 0) objects not."""
    return tl.where(b_exponent < 0.0, tl.exp(tl.minimum(b_exponent, 0.0)), 1.0)


@triton.jit
def finite(b_value):
    """As double, so that differences are numbers; NaN ranks last."""
    b_value = b_value.to(tl.float64)
    largest = tl.full((), 1e30, tl.float64)  # Triton before 3.9 rounds a bare literal to float32
    b_value = tl.where(b_value != b_value, -largest, b_value)
    return tl.minimum(tl.maximum(b_value, -largest), largest)


@triton.jit
def before(b_score, b_masked, o_l):
    """int32 [L]: how many masked positions come before each, by falling score, ties by position."""
    b_earlier = (b_score[None, :] == b_score[:, None]) & (o_l[None, :] < o_l[:, None])
    b_earlier |= b_score[None, :] > b_score[:, None]
    return tl.sum((b_earlier & b_masked[None, :]).to(tl.int32), 1)


@triton.jit
def continuations(
    p_prob,  # float32 [L], as the other statistics
    p_log_odds,
    p_entropy,
    p_sorted,  # scratch: float64 [LENGTH], scores in the draft's order
    p_order,  # scratch: int32 [LENGTH], positions in that order
    p_weight,  # out: float64 [entries]
    p_set,  # out: int64 [entries]
    b_masked,
    o_l,
    count,
    last,
    power,
    threshold,
    bar,
    STRATEGY: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Sets that the target may reveal next, the draft's own choice first, and weights. See `reference.continuations`.

    Returns how many there are. count: what the schedule asks for, at most the number of
    masked positions. last: whether the schedule ends here.
    """
    masked = count_true(b_masked)
    b_score = tl.zeros(b_masked.shape, tl.float64)
    if STRATEGY == "entropy_bounded":
        b_score = finite(-tl.load(p_entropy + o_l, b_masked, other=0.0))
    elif STRATEGY != "sequential":
        b_score = finite(tl.load(p_log_odds + o_l, b_masked, other=0.0))
    b_rank = before(b_score, b_masked, o_l)
    confident = tl.zeros_like(count)
    if STRATEGY == "low_confidence_dynamic":
        b_sure = b_masked & (tl.load(p_prob + o_l, b_masked, other=0.0).to(tl.float64) > threshold)
        confident = count_true(b_sure)
        # The confident ones first, each part in its order: a key that no two positions share.
        b_key = tl.where(b_sure, b_masked.shape[0], 0) - b_rank
        b_rank = tl.where(confident >= count, before(b_key, b_masked, o_l), b_rank)
    tl.store(p_sorted + b_rank, b_score, b_masked)
    tl.store(p_order + b_rank, o_l, b_masked)
    tl.debug_barrier()

    size = count
    swaps = tl.zeros_like(size) + 1
    total = tl.zeros_like(threshold)
    # Ranks that may come in addition, and ones that may stay away: where they begin, and how many.
    more_from = size
    more = tl.zeros_like(size)
    less_from = tl.zeros_like(size)
    less = tl.zeros_like(size)
    if STRATEGY == "sequential":
        swaps = tl.zeros_like(size)
    elif STRATEGY == "low_confidence_dynamic":
        if confident >= count:
            size = confident
            swaps = (confident == count).to(tl.int32)
            more_from = size
            more = masked - size
            less = tl.where(size > count, size, 0)
    elif STRATEGY == "entropy_bounded":
        size = tl.zeros_like(count)
        going = masked > 0
        while going:
            score = tl.load(p_sorted + size)
            going = total - score < threshold
            total = tl.where(going, total - score, total)
            size += going.to(tl.int32)
            going &= size < masked
        more_from = size
        more = ((size < masked) & (size > 0)).to(tl.int32)
        less_from = size - 1
        less = (size > 1).to(tl.int32)
        size = tl.maximum(size, 1)
    size = tl.where(last, masked, size)
    swapped = tl.where(last, 0, swaps * size * (masked - size))
    more = tl.where(last, 0, more)
    less = tl.where(last | (size <= 1), 0, less)

    entries = 1 + swapped + more + less
    others = tl.maximum(masked - size, 1)
    b_bit = tl.full(o_l.shape, 1, tl.int64) << o_l
    base = tl.sum(tl.where(b_masked & (b_rank < size), b_bit, 0), 0)
    i_e = tl.zeros_like(entries)
    while i_e < entries:
        # [AT_ONCE]: the base, swaps (leaving rank by leaving rank), more, less
        o_e = i_e + tl.arange(0, AT_ONCE)
        o_swap = o_e - 1
        o_more = o_swap - swapped
        o_less = o_more - more
        b_swap = (o_swap >= 0) & (o_swap < swapped)
        b_more = (o_more >= 0) & (o_more < more)
        b_less = (o_less >= 0) & (o_less < less)
        b_comes = b_swap | b_more
        b_goes = b_swap | b_less
        o_comes = tl.where(b_swap, size + o_swap % others, more_from + o_more)
        o_goes = tl.where(b_swap, o_swap // others, less_from + o_less)
        b_score_in = tl.load(p_sorted + o_comes, b_comes, other=0.0)
        b_score_out = tl.load(p_sorted + o_goes, b_goes, other=0.0)
        b_bit_in = tl.where(b_comes, 1, 0).to(tl.int64) << tl.load(p_order + o_comes, b_comes, other=0).to(tl.int64)
        b_bit_out = tl.where(b_goes, 1, 0).to(tl.int64) << tl.load(p_order + o_goes, b_goes, other=0).to(tl.int64)

        b_difference = b_score_in - b_score_out
        if STRATEGY == "entropy_bounded":
            b_difference = tl.where(b_more, threshold - (total - b_score_in), b_difference)
            b_difference = tl.where(b_less, total - threshold, b_difference)
        else:
            b_difference = tl.where(b_more, b_score_in - bar, b_difference)
            b_difference = tl.where(b_less, bar - b_score_out, b_difference)
        b_weight = tl.where(o_e == 0, 1.0, weight_of(power * b_difference))
        tl.store(p_weight + o_e, b_weight, o_e < entries)
        tl.store(p_set + o_e, (base & ~b_bit_out) | b_bit_in, o_e < entries)
        i_e += AT_ONCE
    tl.debug_barrier()
    return entries


@triton.jit
def sum_in_order(p_value, count):
    """One by one: a parallel sum would round otherwise than the other backends do."""
    total = tl.zeros((), tl.float64)
    i = tl.zeros_like(count)
    while i < count:
        total += tl.load(p_value + i)
        i += 1
    return total


@triton.jit
def pick_likeliest(p_pick, p_weight, entries, count, ENTRIES: tl.constexpr):
    """Writes the numbers of the `count` greatest weights, greatest first, of equals the first."""
    o_e = tl.arange(0, ENTRIES)
    b_weight = tl.load(p_weight + o_e, o_e < entries, other=-1.0)
    i = tl.zeros_like(count)
    while i < count:
        first = tl.min(tl.where(b_weight == tl.max(b_weight, 0), o_e, ENTRIES), 0)
        tl.store(p_pick + i, first)
        b_weight = tl.where(o_e == first, -1.0, b_weight)
        i += 1
    tl.debug_barrier()
