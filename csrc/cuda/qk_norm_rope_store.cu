// qk_norm_rope_store: QK-norm, rotary embedding, and K and V to their cache slots.
//
// Data path: one warp per (row, head) over the heads of q, k and v, in one launch. A lane holds the 16 bytes of columns
// that start at d and the 16 bytes that start at d + D_rot / 2, which is what they turn with, so that turning needs no
// other lane; columns past D_rot come in single units. The squares are added per lane in order of columns and then in a
// tree over the warp, whatever the strides and the alignment: a row has the same bits wherever it lies. K and V without
// a slot are not read. Each step is rounded to the tensors' dtype as the modules of transformers round it.
//
// Floor: every byte of q, k and v read once and written once. SDAR-8B, 64 rows: 64 x (32 + 8 + 8) x 128 x 2 bytes x 2 =
// 1.6 MB per layer, 0.5 us at 3.35 TB/s; the launch and one trip to memory and back dominate, which is why this is one
// kernel (the modules take 13 launches and move the rows through memory about 20 times).
#include "cuda/columns.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/qk_norm_rope_store.h"
#include "cuda/warp.h"

namespace simsd::rope {
namespace {

constexpr int WARPS = 4;

// Where a lane's unit lies: `count` columns from `first` and, if it turns, as many from `first` + D_rot / 2.
struct Place {
    int first, count;
    bool turns;
};

template <typename T>
SIMSD_DEVICE Place place_of(const Params& p, int unit) {
    const int half = p.rotary / 2, pairs = (half + UNIT<T> - 1) / UNIT<T>;
    const bool turns = unit < pairs;
    const int first = turns ? unit * UNIT<T> : p.rotary + (unit - pairs) * UNIT<T>;
    const int left = (turns ? half : p.dim) - first;
    return {first, left < 0 ? 0 : left < UNIT<T> ? left : UNIT<T>, turns};
}

// What a lane's columns are multiplied with: of those from `first` and of those they turn with.
template <typename T>
struct Factors {
    Columns<T> weight[2], cos[2], sin[2];
};

template <typename T, bool Vector>
SIMSD_DEVICE Factors<T> load_factors(const Params& p, const Heads& heads, const Place& place, const T* cos,
                                     const T* sin) {
    Factors<T> out;
    if (place.count == 0) return out;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        const int first = place.first + side * (p.rotary / 2);
        if (side == 1 && !place.turns) break;
        if (heads.weight != nullptr) {
            out.weight[side] = load_columns<T, Vector>(heads.weight, heads.weight_stride, first, place.count);
        }
        if (!place.turns) break;
        out.cos[side] = load_columns<T, Vector>(cos, p.cos.strides[2], first, place.count);
        out.sin[side] = load_columns<T, Vector>(sin, p.sin.strides[2], first, place.count);
    }
    return out;
}

// V goes as it is.
template <typename T, bool Vector>
SIMSD_DEVICE void copy_row(const T* from, int64_t from_stride, T* to, int64_t to_stride, int dim) {
    if constexpr (Vector) {
        for (int d = lane_index() * UNIT<T>; d < dim; d += WARP * UNIT<T>) store_16(to + d, load_16(from + d));
    } else {
        for (int d = lane_index(); d < dim; d += WARP) to[d * to_stride] = from[d * from_stride];
    }
}

// HELD: units per lane.
template <typename T, bool Vector, int HELD>
__global__ void __launch_bounds__(WARPS* WARP, 1) norm_rope_store(const Params p) {
    const int64_t b = block_x() / p.rows, r = block_x() % p.rows;
    int head = block_y() * WARPS + warp_index();
    if (head >= p.q_heads + 2 * p.kv_heads) return;
    const bool is_query = head < p.q_heads;
    int32_t slot = 0;
    if (!is_query) {
        slot = p.slots[b * p.slot_strides[0] + r * p.slot_strides[1]];
        // Slots are trusted on a GPU, but one out of range is skipped rather than written elsewhere.
        if (slot < 0 || slot >= p.capacity) return;
        head -= p.q_heads;
    }
    const bool is_value = head >= p.kv_heads && !is_query;
    if (is_value) head -= p.kv_heads;

    const Heads& source = is_query ? p.q : is_value ? p.v : p.k;
    const T* from =
        static_cast<const T*>(source.data) + b * source.strides[0] + r * source.strides[1] + head * source.strides[2];
    const int64_t from_stride = source.strides[3];
    int64_t to_stride = 1;
    T* to;
    if (is_query) {
        to = static_cast<T*>(p.out) + ((b * p.q_heads + head) * p.rows + r) * p.dim;
    } else {
        const Cache& cache = is_value ? p.v_cache : p.k_cache;
        to = static_cast<T*>(cache.data) + b * cache.strides[0] + head * cache.strides[1] + slot * cache.strides[2];
        to_stride = cache.strides[3];
    }
    if (is_value) return copy_row<T, Vector>(from, from_stride, to, to_stride, p.dim);

    const int half = p.rotary / 2;
    const T* cos = static_cast<const T*>(p.cos.data) + b * p.cos.strides[0] + r * p.cos.strides[1];
    const T* sin = static_cast<const T*>(p.sin.data) + b * p.sin.strides[0] + r * p.sin.strides[1];
    Columns<T> low[HELD], high[HELD];
#pragma unroll
    for (int j = 0; j < HELD; ++j) {
        const Place place = place_of<T>(p, lane_index() + j * WARP);
        if (place.count == 0) continue;
        low[j] = load_columns<T, Vector>(from, from_stride, place.first, place.count);
        if (place.turns) high[j] = load_columns<T, Vector>(from, from_stride, place.first + half, place.count);
    }
    // On their way while the squares are added up, where there are registers for that.
    Factors<T> factors;
    if (HELD == 1) factors = load_factors<T, Vector>(p, source, place_of<T>(p, lane_index()), cos, sin);
    Columns<T> scale;
    if (source.weight != nullptr) {
        float total = 0.0f;
#pragma unroll
        for (int j = 0; j < HELD; ++j) total = squares<T>(high[j], squares<T>(low[j], total));
        const float inverse = reciprocal_root(sum(warp_sum(total) / static_cast<float>(p.dim), p.eps));
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) scale.x[i] = inverse;
    }
#pragma unroll
    for (int j = 0; j < HELD; ++j) {
        const Place place = place_of<T>(p, lane_index() + j * WARP);
        if (place.count == 0) continue;
        if (HELD > 1) factors = load_factors<T, Vector>(p, source, place, cos, sin);
        if (source.weight != nullptr) {
            low[j] = times<T>(factors.weight[0], times<T>(low[j], scale));
            high[j] = times<T>(factors.weight[1], times<T>(high[j], scale));
        }
        if (place.turns) {
            const Columns<T> turned =
                plus<T>(times<T>(low[j], factors.cos[0]), negated<T>(times<T>(high[j], factors.sin[0])));
            high[j] = plus<T>(times<T>(high[j], factors.cos[1]), times<T>(low[j], factors.sin[1]));
            low[j] = turned;
            store_columns<T, Vector>(high[j], to, to_stride, place.first + half, place.count);
        }
        store_columns<T, Vector>(low[j], to, to_stride, place.first, place.count);
    }
}

template <typename T>
bool heads_aligned(const Heads& heads) {
    return aligned<T>(heads.data, heads.strides) &&
           (heads.weight == nullptr || aligned<T>(heads.weight, {heads.weight_stride}));
}

template <typename T>
void launch_typed(const Params& p, Stream stream) {
    const int units = (p.rotary / 2 + UNIT<T> - 1) / UNIT<T> + (p.dim - p.rotary + UNIT<T> - 1) / UNIT<T>;
    const bool one = units <= WARP;
    // Halves of whole units, and a whole number of them past what turns.
    const bool vector = p.rotary / 2 % UNIT<T> == 0 && p.dim % UNIT<T> == 0 && heads_aligned<T>(p.q) &&
                        heads_aligned<T>(p.k) && heads_aligned<T>(p.v) && aligned<T>(p.cos.data, p.cos.strides) &&
                        aligned<T>(p.sin.data, p.sin.strides) && aligned<T>(p.k_cache.data, p.k_cache.strides) &&
                        aligned<T>(p.v_cache.data, p.v_cache.strides);
    constexpr int MOST = (MAX_DIM / UNIT<T> + 1 + WARP - 1) / WARP;
    auto kernel = norm_rope_store<T, true, 1>;
    if (!vector) {
        kernel = norm_rope_store<T, false, MOST>;
    } else if constexpr (MAX_DIM / UNIT<T> > WARP) {  // whole units of 16 bits always fit
        if (!one) kernel = norm_rope_store<T, true, MOST>;
    }
    const Grid grid{p.total_rows, (p.q_heads + 2 * p.kv_heads + WARPS - 1) / WARPS};
    launch("qk_norm_rope_store", kernel, grid, WARPS * WARP, 0, stream, p);
}

}  // namespace

void launch_norm_rope_store(const Params& params, Element element, Stream stream) {
    switch (element) {
        case Element::float32:
            return launch_typed<float>(params, stream);
        case Element::bfloat16:
            return launch_typed<Bfloat16>(params, stream);
        default:
            return launch_typed<Float16>(params, stream);
    }
}

}  // namespace simsd::rope
