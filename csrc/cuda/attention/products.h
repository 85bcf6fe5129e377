// What one warp computes for its 16 rows: two products on the tensor cores per tile of keys, with a running softmax
// between them that stays in registers. Lane l holds of every 16 x 8 result rows l / 4 and l / 4 + 8 ("halves" 0 and 1)
// and columns 2 (l % 4) and 2 (l % 4) + 1.
#pragma once

#include <utility>

#include "cuda/attention/softmax.h"
#include "cuda/attention/tiles.h"

namespace simsd::intervals {

constexpr int WARP_ROWS = 16;

// Calls `use` with 0 ... COUNT - 1 as constants.
template <int COUNT, typename Use>
SIMSD_DEVICE void unrolled(Use use) {
    [&]<int... I>(std::integer_sequence<int, I...>) {
        (use.template operator()<I>(), ...);
    }(std::make_integer_sequence<int, COUNT>{});
}

// Softmax over some keys: whole maximum, sum of weights and weighted sum of V. `sum` is of this lane's columns alone
// until `quad_sum`.
template <int COLUMNS>
struct State {
    float max[2], sum[2], out[COLUMNS / 8][4];

    SIMSD_DEVICE void clear() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            max[half] = NOTHING;
            sum[half] = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
        }
    }
};

// Over the 4 lanes that share rows.
SIMSD_DEVICE float quad_sum(float value) {
    value = sum(value, shuffle_xor(value, 1));
    return sum(value, shuffle_xor(value, 2));
}

SIMSD_DEVICE float quad_max(float value) {
    value = maximum(value, shuffle_xor(value, 1));
    return maximum(value, shuffle_xor(value, 2));
}

// Adds `added`, whose sums of all columns are `sums`, to `total`.
template <int COLUMNS>
SIMSD_DEVICE void merge(State<COLUMNS>& total, const State<COLUMNS>& added, const float (&sums)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (sums[half] == 0.0f) continue;
        const Rescale by = rescale(total.max[half], added.max[half]);
        total.max[half] = by.max;
        total.sum[half] = merged(by, total.sum[half], sums[half]);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                total.out[n][i] = merged(by, total.out[n][i], added.out[n][i]);
            }
        }
    }
}

// A split to its key group.
template <int COLUMNS>
SIMSD_DEVICE void add_split(State<COLUMNS>& key_group, State<COLUMNS>& split) {
    merge(key_group, split, {quad_sum(split.sum[0]), quad_sum(split.sum[1])});
    split.clear();
}

// When the rows of a warp look: in shared memory, since registers are short and tiles that not all rows see are few.
struct Moments {
    int32_t clock[WARP_ROWS];  // -1 past the end
    Span span;                 // of the live rows

    // `clocks`: those of the block's queries (warp).
    SIMSD_DEVICE void set(const Params& p, const Rows& rows, const int32_t* clocks) {
        const int lane = lane_index(), first = rows.first + warp_index() * WARP_ROWS, row = first + lane;
        const bool exists = lane < WARP_ROWS && row < rows.first + rows.count;
        const int32_t mine = exists ? clocks[row / p.group - rows.first_query] : -1;
        const int32_t earliest = lanes_min(mine < 0 ? INT32_MAX : mine),
                      latest = lanes_max(mine < 0 ? INT32_MIN : mine);
        if (lane < WARP_ROWS) clock[lane] = mine;
        if (lane == 0) span = {earliest, latest};
        warp_barrier();
    }

    SIMSD_DEVICE int32_t of_half(int half) const { return clock[lane_index() / 4 + 8 * half]; }
};

template <typename T, int DIM>
struct Queries {
    uint32_t fragments[DIM / 16][4];

    // `shared`: the warp's 16 rows.
    SIMSD_DEVICE void load(const T* shared, bool negated) {
        const int lane = lane_index();
        const T* row = shared + (lane / 8 % 2 * 8 + lane % 8) * ROW_STRIDE<DIM> + lane / 16 * CHUNK;
#pragma unroll
        for (int k = 0; k < DIM / 16; ++k) {
            load_matrices(fragments[k], row + 16 * k);
#pragma unroll
            for (int i = 0; i < 4; ++i) fragments[k][i] ^= negated ? 0x80008000u : 0u;
        }
    }
};

// Adds the keys of one tile; `k` and `v` are its rows in shared memory, `birth` and `death` its lives, which nobody
// looks at where `full` says that every row sees all (warp).
template <typename T, int DIM, int COLUMNS>
SIMSD_DEVICE void add_tile(State<COLUMNS>& state, const Queries<T, DIM>& q, const Moments& moments, const T* k,
                           const T* v, const int32_t* birth, const int32_t* death, bool full, float scale) {
    const int lane = lane_index();
    if (!full) {
        const bool overlaps = birth[lane] <= moments.span.last && death[lane] >= moments.span.first;
        if (!warp_any(overlaps)) return;
    }

    // [16, TILE]
    float scores[TILE / 8][4] = {};
    k += (lane / 16 * 8 + lane % 8) * ROW_STRIDE<DIM> + lane / 8 % 2 * CHUNK;
    unrolled<DIM / 16>([&]<int STEP>() {
        unrolled<TILE / 16>([&]<int PAIR>() {
            uint32_t b[4];
            load_matrices<2 * (16 * PAIR * ROW_STRIDE<DIM> + 16 * STEP)>(b, k);
            multiply_add<T>(scores[2 * PAIR], q.fragments[STEP], b[0], b[1]);
            multiply_add<T>(scores[2 * PAIR + 1], q.fragments[STEP], b[2], b[3]);
        });
    });
    if (!full) {
        const int32_t clock[2] = {moments.of_half(0), moments.of_half(1)};
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int key = 8 * n + 2 * (lane % 4) + i % 2;
                if (!visible(clock[i / 2], birth[key], death[key])) scores[n][i] = NOTHING;
            }
        }
    }

    float next[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float most = NOTHING;
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n) {
            most = maximum(most, maximum(scores[n][2 * half], scores[n][2 * half + 1]));
        }
        next[half] = maximum(state.max[half], round_up(product(quad_max(most), scale)));
    }
    if (warp_any(next[0] > state.max[0] || next[1] > state.max[1])) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float keep = power_of_two(state.max[half] - shift_of(next[half]));
            state.max[half] = next[half];
            state.sum[half] = product(state.sum[half], keep);
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) state.out[n][i] = product(state.out[n][i], keep);
            }
        }
    }
    uint32_t weights[TILE / 8][2];  // [n][half]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float shift = shift_of(next[half]);
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n) {
            const float low = exp2_fast(fused(scores[n][2 * half], scale, -shift));
            const float high = exp2_fast(fused(scores[n][2 * half + 1], scale, -shift));
            added = sum(added, sum(low, high));
            weights[n][half] = pack<T>(low, high);
        }
        state.sum[half] = sum(state.sum[half], added);
    }

    // [16, COLUMNS]
    v += (lane / 8 % 2 * 8 + lane % 8) * ROW_STRIDE<COLUMNS> + lane / 16 * CHUNK;
    unrolled<TILE / 16>([&]<int STEP>() {
        const uint32_t a[4] = {weights[2 * STEP][0], weights[2 * STEP][1], weights[2 * STEP + 1][0],
                               weights[2 * STEP + 1][1]};
        unrolled<COLUMNS / 16>([&]<int N>() {
            uint32_t b[4];
            load_matrices_transposed<2 * (16 * STEP * ROW_STRIDE<COLUMNS> + 16 * N)>(b, v);
            multiply_add<T>(state.out[2 * N], a, b[0], b[1]);
            multiply_add<T>(state.out[2 * N + 1], a, b[2], b[3]);
        });
    });
}

}  // namespace simsd::intervals
