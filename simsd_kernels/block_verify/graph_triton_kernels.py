"""Triton kernel of the graph rule of `block_verify`. The host side is graph_triton.py.

Data path. One program per lane walks its whole path, with the current block in registers: it loads what the target
drew at the copy where it is, chooses what that step reveals by comparing every position with every other, and looks
for the copy of the state that this leads to. A finished block is stored and the next one begins empty.

Floor. Latency: a step is three dependent loads (statistics, sets of the copies, tokens of those that fit) and a few
reductions over L <= 64 positions. A lane moves some kilobytes at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simsd_kernels.reveal.triton import chosen, count_true, has

DENOISED = tl.constexpr(1)
DRAFTED = tl.constexpr(2)
NO_COPY = tl.constexpr(2**31 - 1)
SIZES = ["n_copies", "n_ahead", "n_length", "n_steps"]


@triton.jit
def copy_of(
    p_states, p_revealed, p_block, now, known, b_tokens, b_known, o_l, n_copies, n_length, COPIES: tl.constexpr
):
    """The first copy with this block number, set and revealed tokens; NO_COPY: none. p_* of this lane: [C, L], [C]."""
    found = tl.full((), NO_COPY, tl.int32)
    i_c = tl.zeros_like(n_copies)
    while (i_c < n_copies) & (found == NO_COPY):
        o_c = i_c + tl.arange(0, COPIES)
        # [COPIES]
        b_fits = tl.load(p_block + o_c, o_c < n_copies, other=-1) == now
        b_fits &= tl.load(p_revealed + o_c, o_c < n_copies, other=0) == known
        # [COPIES, L]; read only where it decides
        b_wanted = b_fits[:, None] & b_known[None, :]
        b_token = tl.load(p_states + o_c[:, None] * n_length + o_l[None, :], b_wanted, other=0)
        b_fits &= tl.max((b_wanted & (b_token != b_tokens[None, :])).to(tl.int32), 1) == 0
        found = tl.min(tl.where(b_fits, o_c, NO_COPY), 0)
        i_c += COPIES
    return found


@triton.jit
def store_block(
    p_tokens, p_step_map, p_prob, p_origin, i_row, b_tokens, b_step_map, b_prob, b_origin, o_l, n_length
):  # fmt: skip
    """Row i_row of a lane's outputs [K + 2, L]."""
    b_at = i_row * n_length + o_l
    tl.store(p_tokens + b_at, b_tokens, o_l < n_length)
    tl.store(p_step_map + b_at, b_step_map, o_l < n_length)
    tl.store(p_prob + b_at, b_prob, o_l < n_length)
    tl.store(p_origin + b_at, b_origin, o_l < n_length)


@triton.jit(do_not_specialize=SIZES)
def walk(
    p_drawn,  # int64 [B, C, L]: the target's token at every position of every copy ...
    p_drawn_prob,  # float32 [B, C, L]: ... with its probability
    p_log_odds,  # float32 [B, C, L]
    p_entropy,  # float32 [B, C, L]
    p_states,  # int64 [B, C, L]
    p_revealed,  # int64 [B, C], without bits at L and above
    p_block,  # int32 [B, C]
    p_clean,  # int64 [B, K, L]
    p_cleaned,  # int32 [B]
    p_depth,  # int32 [B]
    p_step,  # int32 [B]
    p_step_map,  # int32 [B, L]
    p_prob,  # float32 [B, L]
    p_origin,  # int32 [B, L]
    p_schedule,  # int32 [T]
    p_bound,  # float64 [1], or None: of the sum of entropies
    p_out_progress,  # out: int32 [B, 7]
    p_out_revealed,  # out: int64 [B]
    p_out_tokens,  # out: int64 [B, K + 2, L]
    p_out_step_map,  # out: int32 [B, K + 2, L]
    p_out_prob,  # out: float32 [B, K + 2, L]
    p_out_origin,  # out: int32 [B, K + 2, L]
    n_copies,
    n_ahead,
    n_length,
    n_steps,
    threshold,  # a probability
    STRATEGY: tl.constexpr,
    LENGTH: tl.constexpr,
    COPIES: tl.constexpr,
):
    """One program per lane. LENGTH is L padded to a power of 2, COPIES how many copies are compared at once."""
    i_b = tl.program_id(0).to(tl.int64)
    o_l = tl.arange(0, LENGTH)
    b_inside = o_l < n_length
    b_bit = tl.full((LENGTH,), 1, tl.int64) << o_l
    full = tl.sum(tl.where(b_inside, b_bit, 0), 0)  # distinct bits: a sum is their union, bit 63 included

    p_drawn += i_b * n_copies * n_length
    p_drawn_prob += i_b * n_copies * n_length
    p_log_odds += i_b * n_copies * n_length
    p_entropy += i_b * n_copies * n_length
    p_states += i_b * n_copies * n_length
    p_revealed += i_b * n_copies
    p_block += i_b * n_copies
    p_clean += i_b * n_ahead * n_length
    p_out_tokens += i_b * (n_ahead + 2) * n_length
    p_out_step_map += i_b * (n_ahead + 2) * n_length
    p_out_prob += i_b * (n_ahead + 2) * n_length
    p_out_origin += i_b * (n_ahead + 2) * n_length
    cleaned = tl.minimum(tl.load(p_cleaned + i_b), n_ahead)
    depth = tl.minimum(tl.load(p_depth + i_b), n_ahead)

    # The current block. [L]
    known = tl.load(p_revealed)
    b_tokens = tl.load(p_states + o_l, b_inside, other=0)
    b_step_map = tl.load(p_step_map + i_b * n_length + o_l, b_inside, other=0)
    b_prob = tl.load(p_prob + i_b * n_length + o_l, b_inside, other=1.0)
    b_origin = tl.load(p_origin + i_b * n_length + o_l, b_inside, other=0)
    step = tl.load(p_step + i_b)

    at = tl.zeros_like(step)  # the copy that the walk is at
    last = at - 1
    now = tl.zeros_like(step)  # the block that it is in
    committed = tl.zeros_like(step)
    taken = tl.zeros_like(step)
    judged = tl.zeros_like(step)
    accepted = tl.zeros_like(step)
    # The last step finishes a block, so there always is a next one. A step that reveals nothing stays at its copy:
    # the number of copies bounds those.
    alive = (tl.load(p_block) >= 0) & (step >= 0) & (step < n_steps)
    while alive:
        b_masked = b_inside & (has(known, o_l) == 0)
        b_at = at * n_length + o_l
        count = tl.minimum(tl.maximum(tl.load(p_schedule + step), 0), count_true(b_masked))
        b_chosen = chosen(
            p_drawn_prob, p_log_odds, p_entropy, b_at, b_masked, o_l, count, p_bound, threshold, STRATEGY=STRATEGY
        )  # fmt: skip
        b_chosen = tl.where(step == n_steps - 1, b_masked, b_chosen)
        b_tokens = tl.where(b_chosen, tl.load(p_drawn + b_at, b_chosen, other=0), b_tokens)
        b_prob = tl.where(b_chosen, tl.load(p_drawn_prob + b_at, b_chosen, other=1.0), b_prob)
        b_step_map = tl.where(b_chosen, step + 1, b_step_map)
        b_origin = tl.where(b_chosen, tl.where(at == 0, DENOISED, DRAFTED), b_origin)
        known |= tl.sum(tl.where(b_chosen, b_bit, 0), 0)

        # Blocks past the last drafted one have no proposal: nothing in them is judged or held.
        b_proposal = tl.load(p_clean + now * n_length + o_l, o_l < tl.where(now < n_ahead, n_length, 0), other=0)
        b_agrees = b_tokens == b_proposal
        judged += tl.where(now < depth, count_true(b_chosen), 0)
        accepted += tl.where(now < depth, count_true(b_chosen & b_agrees), 0)
        last = at
        taken += 1
        step += 1

        done = known == full
        held = done & (now < cleaned) & (count_true(b_inside & (b_agrees == 0)) == 0)
        if done:
            store_block(
                p_out_tokens, p_out_step_map, p_out_prob, p_out_origin, now, b_tokens, b_step_map, b_prob, b_origin,
                o_l, n_length,
            )  # fmt: skip
        committed += held.to(tl.int32)
        now += done.to(tl.int32)
        known = tl.where(done, 0, known)
        step = tl.where(done, 0, step)
        b_step_map = tl.where(done, 0, b_step_map)
        b_prob = tl.where(done, 1.0, b_prob)
        b_origin = tl.where(done, 0, b_origin)

        # The next copy. Behind a finished block only if that was as drafted: its rows saw the drafted one.
        next_at = copy_of(
            p_states, p_revealed, p_block, now, known, b_tokens, has(known, o_l), o_l, n_copies, n_length,
            COPIES=COPIES,
        )  # fmt: skip
        alive = (next_at < NO_COPY) & (held | (done == 0)) & (taken < n_copies)
        at = tl.where(next_at < NO_COPY, next_at, at)

    store_block(
        p_out_tokens, p_out_step_map, p_out_prob, p_out_origin, now, tl.where(has(known, o_l), b_tokens, 0),
        b_step_map, b_prob, b_origin, o_l, n_length,
    )  # fmt: skip
    b_none = tl.zeros_like(o_l)
    for i_row in range(now + 1, n_ahead + 2):
        store_block(
            p_out_tokens, p_out_step_map, p_out_prob, p_out_origin, i_row, b_none, b_none, b_none + 1.0, b_none,
            o_l, n_length,
        )  # fmt: skip
    p_out_progress += i_b * 7
    tl.store(p_out_progress, now)
    tl.store(p_out_progress + 1, committed)
    tl.store(p_out_progress + 2, taken)
    tl.store(p_out_progress + 3, last)
    tl.store(p_out_progress + 4, step)
    tl.store(p_out_progress + 5, judged)
    tl.store(p_out_progress + 6, accepted)
    tl.store(p_out_revealed + i_b, known)
