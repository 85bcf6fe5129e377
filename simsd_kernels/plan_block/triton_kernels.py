"""Triton kernels of `plan_block`: `grow` makes a lane's graph, `lay_out` rows of it. The host side is triton.py.

Data path. One program per lane holds the newest state in registers; every state that was thought of lies in scratch
memory, in order of discovery. A turn proposes the newest state's continuations all at once (as vectors over entries,
then over the likeliest CHILDREN of them, which are different states by construction), looks each up among the known
states, and takes the best candidate. The arithmetic is double, unfused and in the definition's order.

Floor. Latency: some hundred dependent steps per turn, and as many turns as copies. Bytes do not count: a state is 52 of
them. This is the plan where no compiled library is, and nobody should wait for it where one is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simsd_kernels.plan_block.triton_continuations import continuations, count_true, pick_likeliest, sum_in_order

MAX_CHILDREN = 64  # continuations of one state that are looked at, the likeliest
NOWHERE = tl.constexpr(2**31 - 1)
INF = tl.constexpr(2**30)
SIZES = [
    *("n_ahead", "n_length", "n_steps", "n_copies", "n_room", "n_turns", "n_proposals", "n_apart"),
    *("n_rows", "n_slots", "n_scratch", "n_stride", "n_copy_stride"),
]


@triton.jit
def trace(b_token, o_l):
    """uint64: what a token at a position adds to a state's hash."""
    b_x = (b_token * 64 + o_l).to(tl.uint64) + 0x1E3779B97F4A7C15
    b_x = (b_x ^ (b_x >> 30)) * 0x3F58476D1CE4E5B9
    b_x = (b_x ^ (b_x >> 27)) * 0x14D049BB133111EB
    return b_x ^ (b_x >> 31)


@triton.jit
def find_states(p_long, p_int, b_block, b_known, b_hash, states, n_room, AT_ONCE: tl.constexpr):
    """int32 [CHILDREN]: where among the known states each one is, NOWHERE if it is new."""
    b_found = tl.full(b_block.shape, NOWHERE, tl.int32)
    i_s = tl.zeros_like(states)
    while i_s < states:
        o_s = i_s + tl.arange(0, AT_ONCE)
        # [AT_ONCE]
        b_block_2 = tl.load(p_int + o_s, o_s < states, other=-1)
        b_known_2 = tl.load(p_long + o_s, o_s < states, other=0)
        b_hash_2 = tl.load(p_long + n_room + o_s, o_s < states, other=0)
        # [CHILDREN, AT_ONCE]
        b_same = (b_block[:, None] == b_block_2[None, :]) & (b_known[:, None] == b_known_2[None, :])
        b_same &= b_hash[:, None] == b_hash_2[None, :]
        b_found = tl.minimum(b_found, tl.min(tl.where(b_same, o_s[None, :], NOWHERE), 1))
        i_s += AT_ONCE
    return b_found


@triton.jit
def best_candidate(p_reach, p_int, states, n_room, AT_ONCE: tl.constexpr):
    """The state not yet taken with the greatest reach per copy, the first of equals, and that reach; -1 if none."""
    best = tl.full((), -1.0, tl.float64)
    at = tl.full((), -1, tl.int32)
    i_s = tl.zeros_like(states)
    while i_s < states:
        o_s = i_s + tl.arange(0, AT_ONCE)
        b_free = (o_s < states) & (tl.load(p_int + 4 * n_room + o_s, o_s < states, other=1) == 0)
        b_cost = tl.load(p_int + 2 * n_room + o_s, b_free, other=1).to(tl.float64)
        b_worth = tl.where(b_free, tl.load(p_reach + o_s, b_free, other=0.0) / b_cost, -1.0)
        top = tl.max(b_worth, 0)
        first = tl.min(tl.where(b_worth == top, o_s, NOWHERE), 0)
        at = tl.where(top > best, first, at)
        best = tl.maximum(top, best)
        i_s += AT_ONCE
    return at, best


@triton.jit(do_not_specialize=SIZES)
def grow(
    p_token,  # int64 [B, K, L]: what the draft proposes at every position, or [B, L], as the newest states draw it ...
    p_prob,  # float32, alike: ... with its probability
    p_log_odds,
    p_entropy,
    p_clean,  # int64 [B, K, L]
    p_power,  # float32 [B, K]
    p_depth,  # int32 [B]
    p_blocks_left,  # int32 [B]
    p_trust,  # float32 [B]
    p_schedule,  # int32 [T]
    p_threshold,  # float64 [1]
    p_bar,  # float64 [1]: the log-odds of the threshold
    p_floor,  # float64 [1]
    p_progress,  # int32 [B, 3]: states taken, states known, whether there may be more
    p_reach,  # float64 [B, S], by discovery
    p_long,  # int64 [B, 3, S]: revealed set, hash of the tokens, what its parent revealed to get here
    p_int,  # int32 [B, 5, S]: block, step, cost, the parent's place among the taken, whether taken
    p_taken,  # int32 [B, C]: states in the order in which they were taken
    p_score,  # float64 [B, C]
    p_tokens,  # int64 [B, C, L], -1 where masked
    p_proposed,  # scratch: int64 [B, C, L]
    p_sorted,  # scratch: float64 [B, LENGTH]
    p_order,  # scratch: int32 [B, LENGTH]
    p_weight,  # scratch: float64 [B, ENTRIES]
    p_set,  # scratch: int64 [B, ENTRIES]
    p_pick,  # scratch: int32 [B, CHILDREN]
    n_ahead,
    n_length,
    n_steps,
    n_copies,
    n_room,
    n_turns,
    n_proposals,
    n_apart,
    STRATEGY: tl.constexpr,
    LENGTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHILDREN: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One program per lane: `n_turns` turns, each of which expands the newest state and takes the best candidate.

    n_room: S; n_proposals, n_apart: elements from one lane's proposals to the next, and from one block's.
    LENGTH is L padded to a power of 2, AT_ONCE how many known states are compared at once.
    """
    i_b = tl.program_id(0).to(tl.int64)
    o_l = tl.arange(0, LENGTH)
    b_inside = o_l < n_length
    b_bit = tl.full((LENGTH,), 1, tl.int64) << o_l
    full = tl.sum(tl.where(b_inside, b_bit, 0), 0)
    o_k = tl.arange(0, CHILDREN)
    p_clean += i_b * n_ahead * n_length
    p_power += i_b * n_ahead
    p_progress += i_b * 3
    p_reach += i_b * n_room
    p_long += i_b * 3 * n_room
    p_int += i_b * 5 * n_room
    p_taken += i_b * n_copies
    p_score += i_b * n_copies
    p_tokens += i_b * n_copies * n_length
    p_proposed += i_b * n_copies * n_length
    p_sorted += i_b * LENGTH
    p_order += i_b * LENGTH
    p_weight += i_b * ENTRIES
    p_set += i_b * ENTRIES
    p_pick += i_b * CHILDREN
    depth = tl.minimum(tl.load(p_depth + i_b), n_ahead)
    blocks_left = tl.load(p_blocks_left + i_b)
    trust = tl.load(p_trust + i_b).to(tl.float64)
    threshold = tl.load(p_threshold)
    bar = tl.load(p_bar)
    floor = tl.load(p_floor)

    taken = tl.load(p_progress)
    states = tl.load(p_progress + 1)
    turn = tl.zeros_like(taken)
    alive = (tl.load(p_progress + 2) != 0) & (taken < n_copies)
    while alive & (turn < n_turns):
        at = tl.load(p_taken + taken - 1)
        block = tl.load(p_int + at)
        step = tl.load(p_int + n_room + at)
        known = tl.load(p_long + at)
        b_masked = b_inside & (((known >> o_l) & 1) == 0)
        masked = count_true(b_masked)
        if (block < depth) & (step >= 0) & (step < n_steps) & (masked > 0):
            i_proposal = i_b * n_proposals + block * n_apart
            b_token = tl.load(p_token + i_proposal + o_l, b_masked, other=-1)
            tl.store(p_proposed + (taken - 1) * n_length + o_l, b_token, b_inside)
            count = tl.minimum(tl.maximum(tl.load(p_schedule + step), 0), masked)
            entries = continuations(
                p_prob + i_proposal, p_log_odds + i_proposal, p_entropy + i_proposal, p_sorted, p_order, p_weight,
                p_set, b_masked, o_l, count, step == n_steps - 1, tl.load(p_power + block).to(tl.float64), threshold,
                bar, STRATEGY=STRATEGY, AT_ONCE=4 * AT_ONCE,
            )  # fmt: skip
            total = sum_in_order(p_weight, entries)
            kept = tl.minimum(entries, CHILDREN)
            pick_likeliest(p_pick, p_weight, entries, kept, ENTRIES=ENTRIES)

            # [CHILDREN]
            b_entry = tl.load(p_pick + o_k, o_k < kept, other=0)
            b_chosen = tl.load(p_set + b_entry, o_k < kept, other=0)
            b_reach = tl.load(p_reach + at) * (tl.load(p_weight + b_entry, o_k < kept, other=0.0) / total)
            i_l = tl.zeros_like(taken)
            while i_l < n_length:
                prob = tl.load(p_prob + i_proposal + i_l).to(tl.float64)
                b_reach = tl.where(((b_chosen >> i_l) & 1) != 0, b_reach * (trust * prob), b_reach)
                i_l += 1
            # [CHILDREN, LENGTH]
            b_trace = trace(b_token, o_l).to(tl.int64, bitcast=True)
            b_holds = ((b_chosen[:, None] >> o_l[None, :]) & 1) != 0
            b_hash = tl.load(p_long + n_room + at) + tl.sum(tl.where(b_holds, b_trace[None, :], 0), 1)

            # A finished block: no copy of it, but the next block may follow.
            b_seen = tl.load(p_tokens + (taken - 1) * n_length + o_l, b_inside, other=0)
            b_clean = tl.load(p_clean + block * n_length + o_l, b_inside, other=0)
            differs = count_true(b_inside & (tl.where(b_masked, b_token, b_seen) != b_clean))
            follows = (differs == 0) & (block + 1 < blocks_left)
            b_known = known | b_chosen
            b_done = b_known == full
            b_wanted = (o_k < kept) & (b_chosen != 0) & (b_reach > 0.0)
            b_wanted &= tl.where(b_done, follows.to(tl.int32), 1) != 0
            b_known = tl.where(b_done, 0, b_known)
            b_hash = tl.where(b_done, 0, b_hash)
            b_block = tl.where(b_done, block + 1, block)

            b_found = find_states(p_long, p_int, b_block, b_known, b_hash, states, n_room, AT_ONCE=AT_ONCE)
            # What comes to a taken state late is not passed on.
            b_again = b_wanted & (b_found < NOWHERE)
            b_again &= tl.load(p_int + 4 * n_room + b_found, b_again, other=1) == 0
            b_sum = tl.load(p_reach + b_found, b_again, other=0.0) + b_reach
            b_new = b_wanted & (b_found == NOWHERE)
            o_new = states + tl.cumsum(b_new.to(tl.int32), 0) - 1
            tl.debug_barrier()
            tl.store(p_reach + b_found, b_sum, b_again)
            tl.store(p_reach + o_new, b_reach, b_new)
            tl.store(p_long + o_new, b_known, b_new)
            tl.store(p_long + n_room + o_new, b_hash, b_new)
            tl.store(p_long + 2 * n_room + o_new, b_chosen, b_new)
            tl.store(p_int + o_new, b_block, b_new)
            tl.store(p_int + n_room + o_new, tl.where(b_done, 0, step + 1), b_new)
            tl.store(p_int + 2 * n_room + o_new, tl.where(b_done, 2, 1), b_new)
            tl.store(p_int + 3 * n_room + o_new, tl.zeros_like(o_new) + taken - 1, b_new)
            tl.store(p_int + 4 * n_room + o_new, tl.zeros_like(o_new), b_new)
            states += count_true(b_new)
            tl.debug_barrier()

        best, worth = best_candidate(p_reach, p_int, states, n_room, AT_ONCE=AT_ONCE)
        alive = (best >= 0) & (worth >= floor) & (worth > 0.0)
        if alive:
            # Never above its predecessor's: cutting at any score leaves a graph that the walk can enter.
            previous = tl.load(p_score + taken - 1)
            parent = tl.load(p_int + 3 * n_room + best)
            chosen = tl.load(p_long + 2 * n_room + best)
            b_parent = tl.load(p_tokens + parent * n_length + o_l, b_inside, other=-1)
            b_drawn = tl.load(p_proposed + parent * n_length + o_l, b_inside, other=-1)
            b_next = tl.where(((chosen >> o_l) & 1) != 0, b_drawn, b_parent)
            b_next = tl.where(tl.load(p_int + 2 * n_room + best) == 2, -1, b_next)
            tl.debug_barrier()
            tl.store(p_int + 4 * n_room + best, 1)
            tl.store(p_taken + taken, best)
            tl.store(p_score + taken, tl.where(taken > 1, tl.minimum(previous, worth), worth))
            tl.store(p_tokens + taken * n_length + o_l, b_next, b_inside)
            taken += 1
            tl.debug_barrier()
        alive &= taken < n_copies
        turn += 1
    tl.store(p_progress, taken)
    tl.store(p_progress + 1, states)
    tl.store(p_progress + 2, alive.to(tl.int32))


@triton.jit(do_not_specialize=SIZES)
def lay_out(
    p_start,  # int32 [B]
    p_clean,  # int64 [B, K, L]
    p_kept,  # int32 [B]: copies
    p_cleaned,  # int32 [B]
    p_reach,  # float64 [B, S]
    p_long,  # int64 [B, 3, S]
    p_int,  # int32 [B, 5, S]
    p_taken,  # int32 [B, C]
    p_seen,  # int64 [B, C, L]
    p_mask,  # int64 [1]: what stands in masked positions
    p_out_tokens,  # out: int64 [B, K + C, L], as the next three
    p_out_positions,
    p_out_slots,
    p_out_clock,
    p_out_birth,  # out: int32 [B, slots], as it is without these rows
    p_out_death,
    p_out_states,  # out: int64 [B, C, L]
    p_out_revealed,  # out: int64 [B, C]
    p_out_block,  # out: int32 [B, C]
    p_out_reach,  # out: float32 [B, C]
    n_ahead,
    n_length,
    n_copies,
    n_room,
    n_slots,
    n_scratch,
    n_stride,
    n_copy_stride,
    LENGTH: tl.constexpr,
):
    """One program per group of rows of a lane: K finished blocks as drafted, then C copies."""
    n_groups = n_ahead + n_copies
    i_b = (tl.program_id(0) // n_groups).to(tl.int64)
    i_group = tl.program_id(0) % n_groups
    o_l = tl.arange(0, LENGTH)
    b_inside = o_l < n_length
    start = tl.load(p_start + i_b)
    number = start // n_length

    i_copy = i_group - n_ahead
    is_copy = i_copy >= 0
    b_token = tl.zeros([LENGTH], tl.int64)
    block = tl.zeros_like(start)
    if is_copy:
        live = i_copy < tl.load(p_kept + i_b)
        at = tl.load(p_taken + i_b * n_copies + i_copy, live, other=0)
        block = tl.load(p_int + i_b * 5 * n_room + at, live, other=-1)
        known = tl.load(p_long + i_b * 3 * n_room + at, live, other=0)
        b_live = o_l < tl.where(live, n_length, 0)
        b_seen = tl.load(p_seen + (i_b * n_copies + i_copy) * n_length + o_l, b_live, other=0)
        b_token = tl.where(b_seen < 0, tl.load(p_mask), b_seen)
        slot = n_scratch + i_copy * n_copy_stride
        clock = (number + block) * n_stride + 1 + i_copy
        death = clock
        i_out = i_b * n_copies + i_copy
        tl.store(p_out_states + i_out * n_length + o_l, tl.maximum(b_seen, 0), b_inside)
        tl.store(p_out_revealed + i_out, known)
        tl.store(p_out_block + i_out, block)
        reach = tl.load(p_reach + i_b * n_room + at, live, other=0.0)
        tl.store(p_out_reach + i_out, reach.to(tl.float32))
    else:
        live = i_group < tl.load(p_cleaned + i_b)
        block = i_group
        b_live = o_l < tl.where(live, n_length, 0)
        b_token = tl.load(p_clean + (i_b * n_ahead + i_group) * n_length + o_l, b_live, other=0)
        slot = start + block * n_length
        clock = (number + block) * n_stride + 1 + n_copies
        death = tl.zeros_like(clock) + INF
    i_row = (i_b * n_groups + i_group) * n_length + o_l
    b_none = tl.zeros([LENGTH], tl.int32)
    tl.store(p_out_tokens + i_row, b_token, b_inside)
    tl.store(p_out_positions + i_row, tl.where(b_live, start + block * n_length + o_l, b_none), b_inside)
    tl.store(p_out_slots + i_row, tl.where(b_live, slot + o_l, b_none - 1), b_inside)
    tl.store(p_out_clock + i_row, tl.where(b_live, clock, b_none - 1), b_inside)
    i_slot = i_b * n_slots + slot + o_l
    # Values are trusted on a GPU, but a slot out of range is skipped rather than written elsewhere.
    b_written = b_live & (slot + o_l < n_slots)
    tl.store(p_out_birth + i_slot, b_none + clock, b_written)
    tl.store(p_out_death + i_slot, b_none + death, b_written)
