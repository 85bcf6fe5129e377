// masked_attention in float32, on the ordinary cores: the tensor cores would round its inputs. Meant for small models
// and for checking, so simple rather than fast.
//
// Data path: a block per (KV head, 16 rows) walks over all keys, 32 at a time through shared memory; each of 4 warps
// has 4 rows, first with a key per lane, then with columns lane, lane + 32, ... per lane. Every sum has one order: over
// columns, then over the keys of a tile, then over tiles. Operations: 4 x rows x keys x D; bytes: K and V once per 16
// rows.
#include "cuda/attention/keys.h"
#include "cuda/attention/softmax.h"
#include "cuda/launch.h"

namespace simsd::intervals {
namespace {

constexpr int WARPS = 4, WARP_ROWS = 4, ROWS = WARPS * WARP_ROWS;
constexpr int PER_LANE = MOST_COLUMNS / WARP;
constexpr int KEYS = SPLIT;

// Columns are summed four at a time, so rows are filled up with zeros.
SIMSD_ANYWHERE int padded(int dim) { return (dim + 3) / 4 * 4; }
SIMSD_ANYWHERE int row_stride(int dim) { return padded(dim) + 1; }  // neighbouring rows on different banks

// The keys or values of a tile, zeros where nobody of the block looks.
SIMSD_DEVICE void load_tile(float* to, const float* from, const int64_t (&strides)[4], int dim,
                            const Window<KEYS>& window, int tile) {
    for (int i = warp_index(); i < TILE; i += WARPS) {
        const int key = tile * TILE + i, unit = key / PAGE_UNIT;
        const bool seen = window.seen[tile] >> i & 1;
        const int64_t row =
            seen ? window.page[unit] * strides[0] + (window.slot[unit] + key % PAGE_UNIT) * strides[2] : 0;
        for (int d = lane_index(); d < padded(dim); d += WARP) {
            to[i * row_stride(dim) + d] = seen && d < dim ? from[row + d * strides[3]] : 0.0f;
        }
    }
}

__global__ void __launch_bounds__(WARPS* WARP, 4) attend_float(const Params p) {
    Shared shared;
    const Window<KEYS> window(shared);
    float* q = shared.take<float>(ROWS * padded(p.dim));
    float* k = shared.take<float>(TILE * row_stride(p.dim));
    float* v = shared.take<float>(TILE * row_stride(p.dim));
    float* all_weights = shared.take<float>(ROWS * TILE);
    int32_t* clocks = shared.take<int32_t>(ROWS);

    const int row_tiles = (p.group * p.q_rows + ROWS - 1) / ROWS, head = block_x() / row_tiles;
    const Rows rows = locate_rows(p, head / p.kv_heads, head % p.kv_heads, block_x() % row_tiles * ROWS, ROWS);
    const int keys = live_slots(p, rows.batch);
    const float* k_head = static_cast<const float*>(p.k) + rows.kv_head * p.k_strides[1];
    const float* v_head = static_cast<const float*>(p.v) + rows.kv_head * p.v_strides[1];
    load_clocks(p, rows, clocks);
    for (int i = warp_index(); i < ROWS; i += WARPS) {
        if (i >= rows.count) break;
        const float* from = static_cast<const float*>(p.q) + query_offset(p, rows, rows.first + i);
        for (int d = lane_index(); d < padded(p.dim); d += WARP) {
            q[i * padded(p.dim) + d] = d < p.dim ? from[d * p.q_strides[3]] : 0.0f;
        }
    }
    block_barrier();
    const Span span = span_of(clocks, rows.queries);

    const int lane = lane_index(), first = warp_index() * WARP_ROWS;  // within the block's rows
    q += first * padded(p.dim);
    float* weights = all_weights + first * TILE;
    int32_t clock[WARP_ROWS];
    float max[WARP_ROWS], lane_sum[WARP_ROWS], out[WARP_ROWS][PER_LANE];
#pragma unroll
    for (int r = 0; r < WARP_ROWS; ++r) {
        const int row = rows.first + first + r;
        clock[r] = first + r < rows.count ? clocks[row / p.group - rows.first_query] : -1;
        max[r] = NOTHING;
        lane_sum[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < PER_LANE; ++c) out[r][c] = 0.0f;
    }

    for (int first_key = 0; first_key < keys && span.first <= span.last; first_key += KEYS) {
        window.fetch(p, rows, keys, first_key);
        block_barrier();
        window.resolve(clocks, rows.queries, span);
        block_barrier();
        for (uint32_t live = window.live_tiles(); live != 0; live &= live - 1) {
            const int tile = lowest_bit(live), key = tile * TILE + lane;
            load_tile(k, k_head, p.k_strides, p.dim, window, tile);
            load_tile(v, v_head, p.v_strides, p.dim, window, tile);
            block_barrier();
            float scores[WARP_ROWS][4] = {};
            for (int d = 0; d < padded(p.dim); d += 4) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float k_d = k[lane * row_stride(p.dim) + d + i];
#pragma unroll
                    for (int r = 0; r < WARP_ROWS; ++r) {
                        scores[r][i] = fused(q[r * padded(p.dim) + d + i], k_d, scores[r][i]);
                    }
                }
            }
            float keep[WARP_ROWS], added[WARP_ROWS][PER_LANE] = {};
#pragma unroll
            for (int r = 0; r < WARP_ROWS; ++r) {
                const bool sees = clock[r] >= 0 && visible(clock[r], window.birth[key], window.death[key]);
                const float score = sum(sum(scores[r][0], scores[r][1]), sum(scores[r][2], scores[r][3]));
                const float mine = sees ? product(score, p.scale) : NOTHING;
                const float greatest = warp_reduce(mine, [](float a, float b) { return maximum(a, b); });
                const float next = maximum(max[r], round_up(greatest));
                keep[r] = power_of_two(max[r] - shift_of(next));
                const float weight = exp2_fast(mine - shift_of(next));
                max[r] = next;
                // With that of the key 16 places on: a block's copies lie on multiples of 16, and must sum alike.
                lane_sum[r] = fused(lane_sum[r], keep[r], sum(weight, shuffle_xor(weight, WARP / 2)));
                weights[r * TILE + lane] = weight;
            }
            warp_barrier();
            for (int j = 0; j < TILE; ++j) {
#pragma unroll
                for (int c = 0; c < PER_LANE; ++c) {
                    const int d = lane + c * WARP;
                    if (c * WARP >= p.dim) break;
                    const float v_d = d < p.dim ? v[j * row_stride(p.dim) + d] : 0.0f;
#pragma unroll
                    for (int r = 0; r < WARP_ROWS; ++r) added[r][c] = fused(weights[r * TILE + j], v_d, added[r][c]);
                }
            }
#pragma unroll
            for (int r = 0; r < WARP_ROWS; ++r) {
#pragma unroll
                for (int c = 0; c < PER_LANE; ++c) out[r][c] = fused(out[r][c], keep[r], added[r][c]);
            }
            block_barrier();
        }
        block_barrier();
    }
#pragma unroll
    for (int r = 0; r < WARP_ROWS; ++r) {
        const float total = product(0.5f, warp_sum(lane_sum[r]));  // each key is in two lanes' sums
        const float inverse = inverse_of(total);
        if (first + r >= rows.count) continue;
        float* to = static_cast<float*>(p.out) + out_offset(p, rows, rows.first + first + r);
#pragma unroll
        for (int c = 0; c < PER_LANE; ++c) {
            const int d = lane + c * WARP;
            if (d < p.dim) to[d] = total != 0.0f ? product(out[r][c], inverse) : 0.0f;
        }
    }
}

}  // namespace

void launch_float(const Params& p, Stream stream) {
    const int64_t row_tiles = (p.group * p.q_rows + ROWS - 1) / ROWS;
    const auto bytes = [](int floats) { return (4 * floats + 15) / 16 * 16; };
    const int shared = Window<KEYS>::SHARED_BYTES + bytes(ROWS * padded(p.dim)) + 2 * bytes(TILE * row_stride(p.dim)) +
                       bytes(ROWS * TILE) + bytes(ROWS);
    launch("masked_attention", attend_float, {p.batch * p.kv_heads * row_tiles}, WARPS * WARP, shared, stream, p);
}

}  // namespace simsd::intervals
