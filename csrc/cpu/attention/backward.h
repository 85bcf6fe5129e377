// The kernels of masked_attention_backward, on those of the forward.
//
// Data path, per KV head and block of rows (vector lanes, as in kernel.h):
//   1. scores of every key that some row sees, their maximum, weights = exp(score - maximum), sum
//   2. then, for a few keys at a time, so that their rows of K, V, dK and dV stay in the first-level cache:
//      weights /= sum;  dP = V dout;  dS = weights (dP - delta)  [keys, lanes], like scores
//      dq [D, lanes] += K^T dS, like the forward's values
//      dV += weights^T dout, dK += dS^T q: a lane's row of dout and q is added, D elements at a time, weighted by key
// Five products, 10 * rows * keys * D flops; weights are kept between 1 and 2, 4 * lanes bytes per key.
#pragma once

#include "cpu/attention/kernel.h"

namespace simsd::attention {
namespace {

template <typename Simd, int VECS>
inline bool weigh_block(const Problem& p, int64_t batch, const Head& head, const RowBlock& block,
                        const RowGradients& rows) {
    using F = typename Simd::F;
    constexpr int W = VECS * Simd::LANES;
    constexpr int KEYS = VECS == 1 ? Simd::KEYS_1 : Simd::KEYS_2;
    F max[VECS], shift[VECS], sum[VECS];
    for (int v = 0; v < VECS; ++v) max[v] = Simd::set1(-__builtin_inff());
    int64_t count = 0;
    for (int64_t split = 0; split * SPLIT < p.key_count[batch]; ++split) {
        KeyList list;
        list_keys<Simd, VECS>(p, batch, split, block, list);
        const float* k_rows[SPLIT + Simd::MAX_KEYS];
        for (int64_t i = 0; i < list.count; ++i) k_rows[i] = head.k + list.key[i] * head.k_pitch;
        for (int64_t i = list.count; list.count > 0 && i < list.count + KEYS; ++i) k_rows[i] = k_rows[list.count - 1];
        float* scores = rows.weights + count * W;
        for (int64_t i = 0; i < list.count; i += KEYS) {
            score_keys<Simd, KEYS, VECS>(k_rows + i, block.q, p.dim, scores + i * W);
        }
        mask_scores<Simd, VECS>(p, batch, block, list, scores, max);
        count += list.count;
    }
    for (int v = 0; v < VECS; ++v) {
        shift[v] = Simd::zero_below(max[v], LOWEST_FLOAT, max[v]);
        sum[v] = Simd::set1(0.0f);
    }
    for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) {
            float* key_scores = rows.weights + i * W + v * Simd::LANES;
            const F weight = exp<Simd>(Simd::sub(Simd::load(key_scores), shift[v]));
            Simd::store(key_scores, weight);
            sum[v] = Simd::add(sum[v], weight);
        }
    }
    for (int v = 0; v < VECS; ++v) {
        const F inverse = Simd::zero_below(sum[v], 1e-30f, Simd::div(Simd::set1(1.0f), sum[v]));
        Simd::store(rows.inverse + v * Simd::LANES, inverse);
    }
    return count > 0;
}

// to[key][d .. d + VECS vectors] += sum over rows of weights[key][row] * from[row][d ..], for KEYS keys.
template <typename Simd, int KEYS, int VECS>
inline void add_rows(const float* weights, int64_t lanes, const float* from, int64_t pitch, int64_t rows, int64_t d,
                     float* const* to) {
    using F = typename Simd::F;
    F sum[KEYS][VECS];
#pragma GCC unroll 32
    for (int key = 0; key < KEYS; ++key) {
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) sum[key][v] = Simd::load(to[key] + d + v * Simd::LANES);
    }
    for (int64_t row = 0; row < rows; ++row) {
        F x[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) x[v] = Simd::load(from + row * pitch + d + v * Simd::LANES);
#pragma GCC unroll 32
        for (int key = 0; key < KEYS; ++key) {
            const F w = Simd::set1(weights[key * lanes + row]);
#pragma GCC unroll 4
            for (int v = 0; v < VECS; ++v) sum[key][v] = Simd::fma(w, x[v], sum[key][v]);
        }
    }
#pragma GCC unroll 32
    for (int key = 0; key < KEYS; ++key) {
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) Simd::store(to[key] + d + v * Simd::LANES, sum[key][v]);
    }
}

// The same for `keys` keys and all of D. What lies in `to` past the last key is written, too.
template <typename Simd>
inline void add_all_rows(const float* weights, int64_t lanes, const float* from, int64_t pitch, int64_t rows,
                         int64_t keys, float* const* to) {
    constexpr int KEYS = Simd::KEYS_2;
    int64_t d = 0;
    for (; d + 2 * Simd::LANES <= pitch; d += 2 * Simd::LANES) {
        for (int64_t i = 0; i < keys; i += KEYS)
            add_rows<Simd, KEYS, 2>(weights + i * lanes, lanes, from, pitch, rows, d, to + i);
    }
    if (d < pitch) {
        for (int64_t i = 0; i < keys; i += KEYS)
            add_rows<Simd, KEYS, 1>(weights + i * lanes, lanes, from, pitch, rows, d, to + i);
    }
}

template <typename Simd, int VECS>
inline void propagate_block(const Problem& p, int64_t batch, const Head& head, const RowBlock& block,
                            const RowGradients& rows) {
    using F = typename Simd::F;
    constexpr int W = VECS * Simd::LANES;
    constexpr int KEYS = VECS == 1 ? Simd::KEYS_1 : Simd::KEYS_2;
    constexpr int DIMS = VECS == 1 ? Simd::DIMS_1 : Simd::DIMS_2;
    constexpr int PADDED = Simd::VALUE_KEYS + Simd::MAX_KEYS;
    alignas(64) float scores[PADDED * W];  // dP, then dS
    const float *k_rows[PADDED], *v_rows[PADDED];
    float *dk_rows[PADDED], *dv_rows[PADDED];
    float* weights = rows.weights;
    for (int64_t split = 0; split * SPLIT < p.key_count[batch]; ++split) {
        KeyList list;
        list_keys<Simd, VECS>(p, batch, split, block, list);
        for (int64_t first = 0; first < list.count; first += Simd::VALUE_KEYS) {
            const int64_t keys = smaller(Simd::VALUE_KEYS, list.count - first);
            for (int64_t i = 0; i < keys + Simd::MAX_KEYS; ++i) {
                const int64_t j = list.key[first + smaller(i, keys - 1)];
                k_rows[i] = head.k + j * head.k_pitch;
                v_rows[i] = head.v + j * head.v_pitch;
                dk_rows[i] = i < keys ? head.dk + j * head.pitch : head.spare;
                dv_rows[i] = i < keys ? head.dv + j * head.pitch : head.spare;
            }
            for (int64_t i = 0; i < keys; i += KEYS) {
                score_keys<Simd, KEYS, VECS>(v_rows + i, rows.dout, p.dim, scores + i * W);
            }
            for (int64_t i = 0; i < keys; ++i) {
#pragma GCC unroll 4
                for (int v = 0; v < VECS; ++v) {
                    const int64_t at = i * W + v * Simd::LANES;
                    const F weight = Simd::mul(Simd::load(weights + at), Simd::load(rows.inverse + v * Simd::LANES));
                    const F delta = Simd::load(rows.delta + v * Simd::LANES);
                    Simd::store(weights + at, weight);
                    Simd::store(scores + at, Simd::mul(weight, Simd::sub(Simd::load(scores + at), delta)));
                }
            }
            int64_t d = 0;
            for (; d + DIMS <= p.dim; d += DIMS) weigh_values<Simd, DIMS, VECS>(k_rows, d, scores, keys, rows.dq);
            weigh_values_tail<Simd, DIMS, VECS>(k_rows, d, p.dim - d, scores, keys, rows.dq);
            add_all_rows<Simd>(weights, W, rows.dout_rows, head.pitch, block.rows, keys, dv_rows);
            add_all_rows<Simd>(scores, W, rows.q_rows, head.pitch, block.rows, keys, dk_rows);
            weights += keys * W;
        }
    }
}

template <typename Simd>
bool weigh(const Problem& p, int64_t batch, const Head& head, const RowBlock& block, const RowGradients& rows) {
    return block.lanes == Simd::LANES ? weigh_block<Simd, 1>(p, batch, head, block, rows)
                                      : weigh_block<Simd, 2>(p, batch, head, block, rows);
}

template <typename Simd>
void propagate(const Problem& p, int64_t batch, const Head& head, const RowBlock& block, const RowGradients& rows) {
    block.lanes == Simd::LANES ? propagate_block<Simd, 1>(p, batch, head, block, rows)
                               : propagate_block<Simd, 2>(p, batch, head, block, rows);
}

template <typename Simd>
constexpr Kernels KERNELS = {2 * Simd::LANES,      Simd::LANES,         scratch_floats<Simd>, stage<Simd>,
                             attend<Simd>,         fold<Simd>,          normalise<Simd>,      Simd::MAX_KEYS,
                             Rows<Simd>::in_place, Rows<Simd>::convert, weigh<Simd>,          propagate<Simd>};

}  // namespace
}  // namespace simsd::attention
