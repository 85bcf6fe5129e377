// The masked_attention kernels, written once against a `Simd` type (float vector F, mask type Mask, their operations).
//
// Data path, per KV head, split of 256 keys and block of rows (a row = one query of one head; rows are vector lanes):
//   1. keys that some row sees are listed; dead tiles are never read, fully visible ones are taken without a test
//   2. scores [keys, lanes] = K q: K[j][d] is broadcast against q[d][lanes], a block of keys x 2 vectors in registers
//   3. masked, maximum, weights = exp(score - maximum), sum: all vertical, no shuffles
//   4. out [D, lanes] += V^T weights: V[j][d] is broadcast against weights[j][lanes]
// Every lane runs the same operations in the same order whichever block or lane it sits in: sums over d and over keys
// are sequential, so a row's bits do not depend on its neighbours; a key that a row does not see adds an exact zero.
//
// Floor, per KV head: 4 * rows * keys * D flops against 2 * keys * D elements read, so 2 * rows flops per element. At
// 32 rows (8 queries of 4 heads), 4,096 keys and 8 heads of 128 that is 537 MFLOP and 34 MB: some 240 GFLOP/s of FMAs
// per AVX-512 core need 15 GB/s. With 2 vectors and 8 keys 10 loads feed 16 FMAs, so the FMA units are the limit from
// about 16 rows up and memory below that; rows fewer than a vector cost as much as a full one.
//
// This file and registers.h are compiled once per instruction set under a target pragma. They must not instantiate
// library templates: the linker could then pick their AVX-512 copy for code that runs everywhere.
#pragma once

#include "cpu/attention/problem.h"
#include "cpu/attention/registers.h"

namespace simsd::attention {
namespace {

inline bool dead(const TileRange& tile, int32_t clock_min, int32_t clock_max) {
    return tile.birth_min > clock_max || tile.death_max < clock_min;
}

inline bool fully_visible(const TileRange& tile, int32_t clock_min, int32_t clock_max) {
    return tile.birth_max <= clock_min && clock_max <= tile.death_min;
}

// Where the rows of a KV head begin in K and V, for keys in ascending order: a page is looked up once.
struct KeyRows {
    const Problem& p;
    int64_t batch, kv_head;
    int64_t first = 0, end = 0;  // keys of the present page; or of all of K and V
    int64_t k = 0, v = 0;  // where its first row begins; negative: nowhere, its keys are dead and none may be read

    KeyRows(const Problem& problem, int64_t b, int64_t head) : p(problem), batch(b), kv_head(head) {
        if (p.pages == nullptr) {
            end = p.keys;
            start_at(batch);
        }
    }

    void start_at(int64_t page) {
        k = page < 0 ? -1 : page * p.k_strides[0] + kv_head * p.k_strides[1];
        v = page < 0 ? -1 : page * p.v_strides[0] + kv_head * p.v_strides[1];
    }

    // To be called before k_row(j) and v_row(j).
    void find(int64_t j) {
        if (j < end) return;
        const int64_t page = j / p.page_size;
        first = page * p.page_size;
        end = first + p.page_size;
        start_at(p.pages[batch * (p.keys / p.page_size) + page]);
    }

    int64_t k_row(int64_t j) const { return k + (j - first) * p.k_strides[2]; }
    int64_t v_row(int64_t j) const { return v + (j - first) * p.v_strides[2]; }
};

// K and V of a split as float32 rows: in place where that is what they are, else in scratch.
template <typename Simd>
struct Rows {
    static bool in_place(const Problem& p, const int64_t* strides) {
        return p.element == Element::float32 && (strides[3] == 1 || p.dim == 1);
    }

    // One row of D elements to float32.
    static void convert(const Problem& p, const void* data, int64_t offset, int64_t stride, float* to) {
        if (p.element == Element::float32) {
            const float* from = static_cast<const float*>(data) + offset;
            for (int64_t d = 0; d < p.dim; ++d) to[d] = from[d * stride];
            return;
        }
        const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
        const bool half = p.element == Element::float16;
        int64_t d = 0;
        if (stride == 1) {
            for (; d + Simd::LANES <= p.dim; d += Simd::LANES) {
                Simd::store(to + d, half ? Simd::load_float16(from + d) : Simd::load_bfloat16(from + d));
            }
        }
        uint16_t bits[Simd::LANES] = {};
        alignas(64) float values[Simd::LANES];
        while (d < p.dim) {
            const int64_t count = smaller(Simd::LANES, p.dim - d);
            for (int64_t i = 0; i < count; ++i) bits[i] = from[(d + i) * stride];
            Simd::store(values, half ? Simd::load_float16(bits) : Simd::load_bfloat16(bits));
            for (int64_t i = 0; i < count; ++i) to[d + i] = values[i];
            d += count;
        }
    }
};

template <typename Simd>
struct Scratch {
    static constexpr int64_t PADDED_KEYS = SPLIT + Simd::MAX_KEYS;  // the last block of keys may hang over
    float* scores;                                                  // [PADDED_KEYS, lanes]
    float* k;                                                       // [SPLIT, D], unused where K is read in place
    float* v;                                                       // [SPLIT, D], unused where V is read in place

    static int64_t floats(const Problem& p) {
        const int64_t staged = !Rows<Simd>::in_place(p, p.k_strides) + !Rows<Simd>::in_place(p, p.v_strides);
        return PADDED_KEYS * 2 * Simd::LANES + staged * SPLIT * p.dim;
    }

    Scratch(const Problem& p, float* memory) : scores(memory) {
        k = memory + PADDED_KEYS * 2 * Simd::LANES;
        v = k + (Rows<Simd>::in_place(p, p.k_strides) ? 0 : SPLIT * p.dim);
    }
};

template <typename Simd>
void stage(const Problem& p, int64_t batch, int64_t kv_head, int64_t split, int32_t clock_min, int32_t clock_max,
           float* memory) {
    const bool stage_k = !Rows<Simd>::in_place(p, p.k_strides);
    const bool stage_v = !Rows<Simd>::in_place(p, p.v_strides);
    if (!stage_k && !stage_v) return;
    const Scratch<Simd> scratch(p, memory);
    const int64_t begin = split * SPLIT, end = smaller(begin + SPLIT, p.key_count[batch]);
    KeyRows rows(p, batch, kv_head);
    for (int64_t first = begin; first < end; first += TILE) {
        if (dead(p.tiles[batch * p.tile_count + first / TILE], clock_min, clock_max)) continue;
        for (int64_t j = first; j < smaller(first + TILE, end); ++j) {
            rows.find(j);
            if (rows.k < 0) continue;
            const int64_t staged = (j - begin) * p.dim;
            if (stage_k) Rows<Simd>::convert(p, p.k, rows.k_row(j), p.k_strides[3], scratch.k + staged);
            if (stage_v) Rows<Simd>::convert(p, p.v, rows.v_row(j), p.v_strides[3], scratch.v + staged);
        }
    }
}

// The keys of a split that a row block sees.
struct KeyList {
    int64_t count = 0;
    int32_t key[SPLIT];
    bool tested[SPLIT];  // some row of the block does not see the key
};

template <typename Simd, int VECS>
inline void list_keys(const Problem& p, int64_t batch, int64_t split, const RowBlock& block, KeyList& list) {
    using Mask = typename Simd::Mask;
    const int32_t* birth = p.birth + batch * p.keys;
    const int32_t* death = p.death + batch * p.keys;
    const int64_t begin = split * SPLIT, end = smaller(begin + SPLIT, p.key_count[batch]);
    for (int64_t first = begin; first < end; first += TILE) {
        const int64_t last = smaller(first + TILE, end);
        const TileRange& tile = p.tiles[batch * p.tile_count + first / TILE];
        if (dead(tile, block.clock_min, block.clock_max)) continue;
        if (fully_visible(tile, block.clock_min, block.clock_max)) {
            for (int64_t j = first; j < last; ++j) {
                list.key[list.count] = static_cast<int32_t>(j);
                list.tested[list.count++] = false;
            }
            continue;
        }
        for (int64_t j = first; j < last; ++j) {
            bool any = false, all = true;
#pragma GCC unroll 4
            for (int v = 0; v < VECS; ++v) {
                const Mask seen = Simd::visible(block.clock + v * Simd::LANES, birth[j], death[j]);
                any |= Simd::any(seen);
                all &= Simd::all(seen);
            }
            list.key[list.count] = static_cast<int32_t>(j);
            list.tested[list.count] = !all;
            list.count += any;
        }
    }
}

// Makes a score -inf where a row does not see its key, and raises the rows' maximum to what they see.
template <typename Simd, int VECS>
inline void mask_scores(const Problem& p, int64_t batch, const RowBlock& block, const KeyList& list, float* scores,
                        typename Simd::F (&max)[VECS]) {
    using F = typename Simd::F;
    constexpr int W = VECS * Simd::LANES;
    const int32_t* birth = p.birth + batch * p.keys;
    const int32_t* death = p.death + batch * p.keys;
    const F minus_infinity = Simd::set1(-__builtin_inff());
    for (int64_t i = 0; i < list.count; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) {
            float* key_scores = scores + i * W + v * Simd::LANES;
            F score = Simd::load(key_scores);
            if (list.tested[i]) {
                const int32_t j = list.key[i];
                score = Simd::select(Simd::visible(block.clock + v * Simd::LANES, birth[j], death[j]), score,
                                     minus_infinity);
                Simd::store(key_scores, score);
            }
            max[v] = Simd::max(score, max[v]);
        }
    }
}

// Turns the listed keys' scores into weights, 0 where a row does not see a key, and notes their maximum and sum. V's
// first rows come into the cache meanwhile.
template <typename Simd, int VECS>
inline void weigh_keys(const Problem& p, int64_t batch, const RowBlock& block, const KeyList& list,
                       const float* const* v_rows, float* scores, State partial) {
    using F = typename Simd::F;
    constexpr int W = VECS * Simd::LANES;
    F max[VECS], shift[VECS], sum[VECS];
    for (int v = 0; v < VECS; ++v) max[v] = Simd::set1(-__builtin_inff());
    mask_scores<Simd, VECS>(p, batch, block, list, scores, max);
    for (int v = 0; v < VECS; ++v) {
        // A row that sees nothing here: -inf - (-inf) would be NaN.
        shift[v] = Simd::zero_below(max[v], LOWEST_FLOAT, max[v]);
        sum[v] = Simd::set1(0.0f);
    }
    for (int64_t i = 0; i < list.count; ++i) {
        if (i < Simd::VALUE_KEYS) prefetch_rows(v_rows, i, i + 1, list.count, p.dim);
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) {
            float* key_scores = scores + i * W + v * Simd::LANES;
            const F weight = exp<Simd>(Simd::sub(Simd::load(key_scores), shift[v]));
            Simd::store(key_scores, weight);
            sum[v] = Simd::add(sum[v], weight);
        }
    }
    for (int v = 0; v < VECS; ++v) {
        Simd::store(partial.max + v * Simd::LANES, max[v]);
        Simd::store(partial.sum + v * Simd::LANES, sum[v]);
    }
}

template <typename Simd, int VECS>
inline bool attend_block(const Problem& p, int64_t batch, int64_t kv_head, int64_t split, const RowBlock& block,
                         float* memory, State partial) {
    constexpr int W = VECS * Simd::LANES;
    constexpr int KEYS = VECS == 1 ? Simd::KEYS_1 : Simd::KEYS_2;
    constexpr int DIMS = VECS == 1 ? Simd::DIMS_1 : Simd::DIMS_2;

    KeyList list;
    list_keys<Simd, VECS>(p, batch, split, block, list);
    if (list.count == 0) return false;

    const Scratch<Simd> scratch(p, memory);
    const int64_t begin = split * SPLIT;
    const bool k_in_place = Rows<Simd>::in_place(p, p.k_strides), v_in_place = Rows<Simd>::in_place(p, p.v_strides);
    const float *k = static_cast<const float*>(p.k), *v = static_cast<const float*>(p.v);
    const float* k_rows[Scratch<Simd>::PADDED_KEYS];
    const float* v_rows[SPLIT];
    KeyRows rows(p, batch, kv_head);
    for (int64_t i = 0; i < list.count; ++i) {
        const int64_t j = list.key[i], staged = (j - begin) * p.dim;
        rows.find(j);
        k_rows[i] = k_in_place ? k + rows.k_row(j) : scratch.k + staged;
        v_rows[i] = v_in_place ? v + rows.v_row(j) : scratch.v + staged;
    }
    // The last block of keys is filled up with a repeated one, whose scores nobody reads.
    for (int64_t i = list.count; i < list.count + KEYS; ++i) k_rows[i] = k_rows[list.count - 1];

    for (int64_t i = 0; i < list.count; i += KEYS) {
        prefetch_rows(k_rows, i + KEYS, i + 2 * KEYS, list.count, p.dim);
        score_keys<Simd, KEYS, VECS>(k_rows + i, block.q, p.dim, scratch.scores + i * W);
    }
    weigh_keys<Simd, VECS>(p, batch, block, list, v_rows, scratch.scores, partial);

    for (int64_t i = 0; i < p.dim * W; i += Simd::LANES) Simd::store(partial.out + i, Simd::set1(0.0f));
    // In chunks of keys, so that V's rows stay in the first-level cache while their columns are walked. The next
    // chunk's rows are fetched a few per column block.
    const int64_t step = (Simd::VALUE_KEYS * DIMS + p.dim - 1) / p.dim;
    for (int64_t i = 0; i < list.count; i += Simd::VALUE_KEYS) {
        const int64_t keys = smaller(Simd::VALUE_KEYS, list.count - i);
        const float* weights = scratch.scores + i * W;
        int64_t d = 0, next = i + Simd::VALUE_KEYS;
        for (; d + DIMS <= p.dim; d += DIMS, next += step) {
            prefetch_rows(v_rows, next, smaller(next + step, i + 2 * Simd::VALUE_KEYS), list.count, p.dim);
            weigh_values<Simd, DIMS, VECS>(v_rows + i, d, weights, keys, partial.out);
        }
        weigh_values_tail<Simd, DIMS, VECS>(v_rows + i, d, p.dim - d, weights, keys, partial.out);
    }
    return true;
}

template <typename Simd>
bool attend(const Problem& p, int64_t batch, int64_t kv_head, int64_t split, const RowBlock& block, float* memory,
            State partial) {
    return block.lanes == Simd::LANES ? attend_block<Simd, 1>(p, batch, kv_head, split, block, memory, partial)
                                      : attend_block<Simd, 2>(p, batch, kv_head, split, block, memory, partial);
}

template <typename Simd>
void fold(const Problem& p, const RowBlock& block, State state, State partial) {
    using F = typename Simd::F;
    for (int64_t lane = 0; lane < block.lanes; lane += Simd::LANES) {
        const F old_max = Simd::load(state.max + lane), new_max = Simd::load(partial.max + lane);
        const F max = Simd::max(old_max, new_max);
        const F shift = Simd::zero_below(max, LOWEST_FLOAT, max);
        const F old_scale = exp<Simd>(Simd::sub(old_max, shift)), new_scale = exp<Simd>(Simd::sub(new_max, shift));
        const auto combine = [&](float* to, const float* from) __attribute__((always_inline)) {
            Simd::store(to, Simd::fma(Simd::load(to), old_scale, Simd::mul(Simd::load(from), new_scale)));
        };
        Simd::store(state.max + lane, max);
        combine(state.sum + lane, partial.sum + lane);
        for (int64_t d = 0; d < p.dim; ++d)
            combine(state.out + d * block.lanes + lane, partial.out + d * block.lanes + lane);
    }
}

template <typename Simd>
void normalise(const Problem& p, const RowBlock& block, State state) {
    using F = typename Simd::F;
    for (int64_t lane = 0; lane < block.lanes; lane += Simd::LANES) {
        const F sum = Simd::load(state.sum + lane);
        for (int64_t d = 0; d < p.dim; ++d) {
            float* out = state.out + d * block.lanes + lane;
            Simd::store(out, Simd::zero_below(sum, 1e-30f, Simd::div(Simd::load(out), sum)));
        }
    }
}

template <typename Simd>
int64_t scratch_floats(const Problem& p) {
    return Scratch<Simd>::floats(p);
}

}  // namespace
}  // namespace simsd::attention
