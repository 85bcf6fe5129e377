"""Triton kernels of `masked_attention`. The host side, which chooses between them, is triton.py.

Data path. `summarise` reads the three vectors once and writes, per key, its birth (UNSEEN if no query of the batch
element sees it, or it is past kv_len) and death, and per tile of keys the extremes of both. The attention kernels read
only that: a tile that no row of theirs can see is not loaded, one that all of them see is not tested, and the V of an
unseen key is replaced by 0 as it is loaded, so what lies in such slots cannot reach a result.

Bits. A row's result depends on nothing but its own visible keys: tiles and splits are constants in keys, `attend_split`
is the one body of both attention kernels, and splits are merged in ascending order. Maxima are rounded up to whole
powers of two (scores are in log2 units), so that every rescaling is an exact multiplication: it does not matter when or
how often it happens, and the two kernels agree.

Pages. With PAGE > 0 (keys per page) `summarise` also writes the page of every key, looked up in the block table once;
the attention kernels load row k % PAGE of it. Nothing else differs, so the bits are those of K and V that lie in order.

Floor. Bytes: K and V once per row tile (64 rows), 2 * Lk * D * itemsize per KV head. Flops: 4 * rows * Lk * D. Packing
the G query heads of a KV head into the rows of one tile keeps decoding (16..64 rows) bound by those bytes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simsd_kernels import dispatch

# The interpreter computes bf16 wrongly, so everything is widened to float32 there.
INTERPRET = tl.constexpr(dispatch.interpreting())
UNSEEN = tl.constexpr(2**31 - 1)
NEVER = tl.constexpr(-(2**31))


@triton.jit
def power_of_two(b_exponent):
    """2 ** exponent for whole exponents <= 0, exactly; 0 below -126."""
    b_biased = tl.maximum(b_exponent, -127.0).to(tl.int32) + 127
    return (b_biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def dot(b_a, b_b, b_acc):
    if INTERPRET:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee")


@triton.jit(do_not_specialize=["n_q", "n_k", "n_padded", "n_table", "n_pages"])
def summarise(
    p_clock,  # int32 [B, Lq]
    p_birth,  # int32 [B, Lk]
    p_death,  # int32 [B, Lk]
    p_kv_len,  # int32 [B] or None
    p_table,  # int32 [B, n_table], contiguous, or None
    p_keys,  # out: int32 [B, 2 or 3, padded]: birth (or UNSEEN), death and, with pages, the page (0 where unseen)
    p_bounds,  # out: int32 [B, 4, padded / TILE]: least and greatest birth, least and greatest death
    n_q,
    n_k,
    n_padded,
    n_table,
    n_pages,
    stride_clock_b,
    stride_clock_q,
    stride_birth_b,
    stride_birth_k,
    stride_death_b,
    stride_death_k,
    stride_kv_len,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    QUERIES: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One program per split of one batch element. Reads 8 bytes per key and every clock; writes 8 bytes per key."""
    TILES: tl.constexpr = SPLIT // TILE
    n_splits = n_padded // SPLIT
    i_b = (tl.program_id(0) // n_splits).to(tl.int64)
    i_split = tl.program_id(0) % n_splits
    live_keys = n_k
    if p_kv_len is not None:
        live_keys = tl.minimum(n_k, tl.load(p_kv_len + i_b * stride_kv_len))

    o_k = i_split * SPLIT + tl.arange(0, SPLIT)
    o_k64 = o_k.to(tl.int64)
    # [SPLIT]
    b_birth = tl.load(p_birth + i_b * stride_birth_b + o_k64 * stride_birth_k, mask=o_k < live_keys, other=UNSEEN)
    b_death = tl.load(p_death + i_b * stride_death_b + o_k64 * stride_death_k, mask=o_k < live_keys, other=NEVER)

    b_seen = tl.zeros([SPLIT], tl.int32)
    for i_q in range(0, n_q, QUERIES):
        o_q = i_q + tl.arange(0, QUERIES)
        # [QUERIES]; a row that does not exist looks at a moment before every birth
        b_clock = tl.load(p_clock + i_b * stride_clock_b + o_q.to(tl.int64) * stride_clock_q, o_q < n_q, other=NEVER)
        b_sees = (b_birth[None, :] <= b_clock[:, None]) & (b_clock[:, None] <= b_death[None, :]) & (o_q < n_q)[:, None]
        b_seen = tl.maximum(b_seen, tl.max(b_sees.to(tl.int32), 0))
    b_seen = (b_seen > 0) & (o_k < live_keys)
    VECTORS: tl.constexpr = 2 if PAGE == 0 else 3
    p_keys += i_b * VECTORS * n_padded + o_k
    if PAGE > 0:
        b_page = tl.load(p_table + i_b * n_table + o_k // PAGE, mask=o_k < live_keys, other=-1)
        b_seen = b_seen & (b_page >= 0) & (b_page < n_pages)
        tl.store(p_keys + 2 * n_padded, tl.where(b_seen, b_page, 0))
    b_birth = tl.where(b_seen, b_birth, UNSEEN)
    b_last = tl.where(b_seen, b_death, NEVER)

    tl.store(p_keys, b_birth)
    tl.store(p_keys + n_padded, b_death)
    p_bounds += i_b * 4 * (n_padded // TILE) + i_split * TILES + tl.arange(0, TILES)
    # [TILES, TILE] -> [TILES]
    tl.store(p_bounds, tl.min(tl.reshape(b_birth, [TILES, TILE]), 1))
    tl.store(p_bounds + n_padded // TILE, tl.max(tl.reshape(b_birth, [TILES, TILE]), 1))
    tl.store(p_bounds + 2 * (n_padded // TILE), tl.min(tl.reshape(b_death, [TILES, TILE]), 1))
    tl.store(p_bounds + 3 * (n_padded // TILE), tl.max(tl.reshape(b_last, [TILES, TILE]), 1))


@triton.jit
def tile_states(p_bounds, o_tile, n_tiles, first_clock, last_clock):
    """Per key tile, for rows whose clocks lie in [first_clock, last_clock]: 0 dead, 1 to be tested, 2 fully visible."""
    exists = o_tile < n_tiles
    b_first_birth = tl.load(p_bounds + o_tile, exists, other=UNSEEN)
    b_last_birth = tl.load(p_bounds + n_tiles + o_tile, exists, other=UNSEEN)
    b_first_death = tl.load(p_bounds + 2 * n_tiles + o_tile, exists, other=NEVER)
    b_last_death = tl.load(p_bounds + 3 * n_tiles + o_tile, exists, other=NEVER)
    alive = (b_first_birth <= last_clock) & (b_first_birth < UNSEEN) & (b_last_death >= first_clock)
    full = (b_last_birth <= first_clock) & (b_first_death >= last_clock) & (b_last_birth < UNSEEN)
    return tl.where(alive, tl.where(full, 2, 1), 0)


@triton.jit
def load_rows(p_q, p_clock, i_b, i_hkv, i_row, n_group, n_q, n_dim, stride_q_b, stride_q_h, stride_q_q, stride_q_d,
              stride_clock_b, stride_clock_q, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """The row tile: row r is query r // G of head r % G, so that a tile holds neighbouring queries."""
    o_r = i_row * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    o_q = (o_r // n_group).to(tl.int64)
    o_h = (i_hkv * n_group + o_r % n_group).to(tl.int64)
    exists = o_q < n_q
    p_rows = p_q + i_b * stride_q_b + o_h * stride_q_h + o_q * stride_q_q
    # [ROWS, BLOCK_D]
    b_q = tl.load(
        p_rows[:, None] + o_d.to(tl.int64)[None, :] * stride_q_d, exists[:, None] & (o_d < n_dim)[None, :], 0.0
    )
    p_clock += i_b * stride_clock_b + o_q * stride_clock_q
    # [ROWS]; below UNSEEN, so that no row can see an unseen key
    b_clock = tl.minimum(tl.load(p_clock, exists, other=NEVER), UNSEEN - 1)
    first_clock = tl.min(tl.load(p_clock, exists, other=UNSEEN))
    last_clock = tl.max(b_clock)
    return b_q, b_clock, first_clock, last_clock, exists, o_h, o_q


@triton.jit
def attend_tiles(b_q, b_clock, b_max, b_sum, b_acc, p_k, p_v, p_keys, b_states, i_start, first, end, n_padded,
                 n_dim, scale, i_v, stride_k_b, stride_k_k, stride_k_d, stride_v_b, stride_v_k, stride_v_d,
                 TESTED: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                 PAGE: tl.constexpr):  # fmt: skip
    """Adds tiles [first, end), counted from key i_start. Without TESTED every row sees every key of them.

    Two loops over this body, not one with a branch: Triton keeps P in registers between the two products, and loads
    ahead, only where no branch is in the way.
    """
    ROWS: tl.constexpr = b_q.shape[0]
    o_d = tl.arange(0, BLOCK_D)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    for i_tile in range(first, end):
        o_k = i_start + i_tile * TILE + tl.arange(0, TILE)
        if TESTED:
            # [TILE]
            alive = tl.sum(tl.where(tl.arange(0, b_states.shape[0]) == i_tile, b_states, 0)) > 0
            b_birth = tl.where(alive, tl.load(p_keys + o_k), UNSEEN)
            b_death = tl.load(p_keys + n_padded + o_k)
        if PAGE == 0:
            o_k64 = o_k.to(tl.int64)
            p_k_rows = p_k + o_k64[:, None] * stride_k_k
            p_v_rows = p_v + o_k64[:, None] * stride_v_k
        else:
            # [TILE]
            o_page = tl.load(p_keys + 2 * n_padded + o_k).to(tl.int64)
            o_row = (o_k % PAGE).to(tl.int64)
            p_k_rows = p_k + (o_page * stride_k_b + o_row * stride_k_k)[:, None]
            p_v_rows = p_v + (o_page * stride_v_b + o_row * stride_v_k)[:, None]
        p_k_tile = p_k_rows + o_d.to(tl.int64)[None, :] * stride_k_d
        p_v_tile = p_v_rows + o_v.to(tl.int64)[None, :] * stride_v_d
        if TESTED:
            # [TILE, BLOCK_D], [TILE, BLOCK_V]
            b_k = tl.load(p_k_tile, (b_birth < UNSEEN)[:, None] & (o_d < n_dim)[None, :], 0.0)
            b_v = tl.load(p_v_tile, (b_birth < UNSEEN)[:, None] & (o_v < n_dim)[None, :], 0.0)
        else:
            # [TILE, BLOCK_D], [TILE, BLOCK_V]
            b_k = tl.load(p_k_tile, (o_d < n_dim)[None, :], 0.0)
            b_v = tl.load(p_v_tile, (o_v < n_dim)[None, :], 0.0)
        # [ROWS, TILE]
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([ROWS, TILE], tl.float32)) * scale
        if TESTED:
            b_sees = (b_birth[None, :] <= b_clock[:, None]) & (b_clock[:, None] <= b_death[None, :])
            b_s = tl.where(b_sees, b_s, float("-inf"))
        b_next = tl.maximum(b_max, tl.ceil(tl.max(b_s, 1)))
        b_shift = tl.where(b_next == float("-inf"), 0.0, b_next)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_keep = power_of_two(b_max - b_shift)
        b_sum = b_sum * b_keep + tl.sum(b_p, 1)
        b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc * b_keep[:, None])
        b_max = b_next
    return b_max, b_sum, b_acc


@triton.jit
def attend_split(b_q, b_clock, first_clock, last_clock, p_k, p_v, p_keys, p_bounds, i_split, n_padded, n_dim,
                 scale, i_v, stride_k_b, stride_k_k, stride_k_d, stride_v_b, stride_v_k, stride_v_d,
                 TILE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
                 PAGE: tl.constexpr):  # fmt: skip
    """Softmax attention of a row tile to one split of keys: (whole) log2 of the scale, sum and output, unnormalised.

    p_k and p_v point at the KV head (of page 0, where PAGE > 0), p_keys and p_bounds at the batch element; `scale`
    includes log2(e).
    """
    ROWS: tl.constexpr = b_q.shape[0]
    TILES: tl.constexpr = SPLIT // TILE
    o_t = tl.arange(0, TILES)
    # [TILES]
    b_states = tile_states(p_bounds, i_split * TILES + o_t, n_padded // TILE, first_clock, last_clock)
    first = tl.min(tl.where(b_states > 0, o_t, TILES))
    end = tl.max(tl.where(b_states > 0, o_t + 1, 0))
    # The committed prefix is full, what follows it is not: [first, tested) is full, [tested, end) has to be looked at.
    tested = tl.minimum(tl.min(tl.where((o_t >= first) & (b_states < 2), o_t, TILES)), end)

    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    b_max, b_sum, b_acc = attend_tiles(
        b_q, b_clock, b_max, b_sum, b_acc, p_k, p_v, p_keys, b_states, i_split * SPLIT, first, tested,
        n_padded, n_dim, scale, i_v, stride_k_b, stride_k_k, stride_k_d, stride_v_b, stride_v_k, stride_v_d,
        False, TILE, BLOCK_D, BLOCK_V, PAGE)  # fmt: skip
    return attend_tiles(
        b_q, b_clock, b_max, b_sum, b_acc, p_k, p_v, p_keys, b_states, i_split * SPLIT, tested, end,
        n_padded, n_dim, scale, i_v, stride_k_b, stride_k_k, stride_k_d, stride_v_b, stride_v_k, stride_v_d,
        True, TILE, BLOCK_D, BLOCK_V, PAGE)  # fmt: skip


@triton.jit
def merge(b_max, b_sum, b_acc, b_max_2, b_sum_2, b_acc_2):
    b_next = tl.maximum(b_max, b_max_2)
    b_shift = tl.where(b_next == float("-inf"), 0.0, b_next)
    b_keep = power_of_two(b_max - b_shift)
    b_keep_2 = power_of_two(b_max_2 - b_shift)
    return b_next, b_sum * b_keep + b_sum_2 * b_keep_2, b_acc * b_keep[:, None] + b_acc_2 * b_keep_2[:, None]


@triton.jit
def normalise(b_sum, b_acc):
    """A row that sees nothing has sum 0 and output 0."""
    b_inverse = tl.div_rn(tl.full(b_sum.shape, 1.0, tl.float32), tl.where(b_sum > 0, b_sum, 1.0))
    return b_acc * b_inverse[:, None]
