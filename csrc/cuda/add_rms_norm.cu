// add_rms_norm: the residual takes in x, and its RMSNorm.
//
// Data path: one warp per row up to 64 units of 16 bytes, one block of 4 warps up to 256, one of 8 warps beyond. Thread
// t holds units t, t + T, ... of T threads; from 1024 units on it does not hold them but reads again what it wrote,
// which the L1 or L2 cache still has. Squares are added per thread in order of its columns, then in a tree over the
// warp, then over the warps in order: the sum's order follows from D and the dtype, whatever the strides and the
// alignment, which choose between moves of 16 bytes and of single elements only. Each step is rounded to the tensors'
// dtype as the modules of transformers round it.
//
// Floor: x and residual read once, residual and output written once. SDAR-8B, 64 rows: 64 x 4096 x 2 bytes x 4 = 2.1
// MB, 0.6 us at 3.35 TB/s; the launch and one trip to memory and back dominate (the modules take 8 launches).
#include "cuda/add_rms_norm.h"
#include "cuda/columns.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/warp.h"

namespace simsd::layer {
namespace {

constexpr int ROWS_PER_BLOCK = 4;  // of one warp each

constexpr int threads_of(int warps) { return (warps == 1 ? ROWS_PER_BLOCK : warps) * WARP; }

// Of the block's warps, or of the only one that has the row.
template <int WARPS>
SIMSD_DEVICE float row_sum(float value) {
    float total = warp_sum(value);
    if constexpr (WARPS > 1) {
        Shared shared;
        float* sums = shared.take<float>(WARPS);
        if (lane_index() == 0) sums[warp_index()] = total;
        block_barrier();
        total = sums[0];
#pragma unroll
        for (int warp = 1; warp < WARPS; ++warp) total = sum(total, sums[warp]);
    }
    return total;
}

// The residual's unit with x added, written back.
template <typename T, bool Vector>
SIMSD_DEVICE Columns<T> add_unit(Columns<T> held, const Columns<T>& added, T* residual, int64_t stride, int first,
                                 int count) {
    held = plus<T>(held, added);
    store_columns<T, Vector>(held, residual, stride, first, count);
    return held;
}

// WARPS per row; HELD units per thread, 0: none is held.
template <typename T, int WARPS, int HELD, bool Vector>
__global__ void __launch_bounds__(threads_of(WARPS)) add_norm(const NormParams p) {
    constexpr int THREADS = WARPS * WARP;
    const int64_t row = WARPS == 1 ? static_cast<int64_t>(block_x()) * ROWS_PER_BLOCK + warp_index() : block_x();
    if (row >= p.rows.count) return;
    const int thread = WARPS == 1 ? lane_index() : thread_index();
    const int units = (p.dim + UNIT<T> - 1) / UNIT<T>;
    const auto count_of = [&](int unit) { return smaller(p.dim - unit * UNIT<T>, UNIT<T>); };
    const int64_t stride = p.rows.element_strides[0], x_stride = p.rows.element_strides[1];
    T* residual = static_cast<T*>(p.residual) + p.rows.offset(0, row);
    const T* x = p.x == nullptr ? nullptr : static_cast<const T*>(p.x) + p.rows.offset(1, row);
    T* out = static_cast<T*>(p.out) + row * p.dim;
    const auto load_residual = [&](int unit) {
        return load_columns<T, Vector, true>(residual, stride, unit * UNIT<T>, count_of(unit));
    };
    const auto load_x = [&](int unit) { return load_columns<T, Vector>(x, x_stride, unit * UNIT<T>, count_of(unit)); };
    const auto load_weight = [&](int unit) {
        return load_columns<T, Vector>(p.weight, p.weight_stride, unit * UNIT<T>, count_of(unit));
    };
    const auto finish = [&](int unit, const Columns<T>& held, const Columns<T>& weight, float inverse) {
        Columns<T> scale;
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) scale.x[i] = inverse;
        store_columns<T, Vector>(times<T>(weight, times<T>(held, scale)), out, 1, unit * UNIT<T>, count_of(unit));
    };

    float total = 0.0f;
    if constexpr (HELD > 0) {
        static_assert(Vector);
        Bytes16 read[HELD], added[HELD], weight[HELD];  // as they are: nothing is done before all are on their way
#pragma unroll
        for (int j = 0; j < HELD; ++j) {
            const int unit = thread + j * THREADS;
            if (unit >= units) continue;
            read[j] = load_16_written(residual + unit * UNIT<T>);
            if (x != nullptr) added[j] = load_16(x + unit * UNIT<T>);
            weight[j] = load_16(static_cast<const T*>(p.weight) + unit * UNIT<T>);
        }
        Columns<T> held[HELD];
#pragma unroll
        for (int j = 0; j < HELD; ++j) {
            const int unit = thread + j * THREADS;
            if (unit >= units) continue;
            held[j] = columns_of<T>(read[j]);
            if (x != nullptr) {
                const Columns<T> own = columns_of<T>(added[j]);
                held[j] = add_unit<T, Vector>(held[j], own, residual, stride, unit * UNIT<T>, count_of(unit));
            }
            total = squares<T>(held[j], total);
        }
        const float inverse = reciprocal_root(sum(row_sum<WARPS>(total) / static_cast<float>(p.dim), p.eps));
#pragma unroll
        for (int j = 0; j < HELD; ++j) {
            const int unit = thread + j * THREADS;
            if (unit < units) finish(unit, held[j], columns_of<T>(weight[j]), inverse);
        }
    } else {
        for (int unit = thread; unit < units; unit += THREADS) {
            Columns<T> held = load_residual(unit);
            if (x != nullptr) {
                held = add_unit<T, Vector>(held, load_x(unit), residual, stride, unit * UNIT<T>, count_of(unit));
            }
            total = squares<T>(held, total);
        }
        const float inverse = reciprocal_root(sum(row_sum<WARPS>(total) / static_cast<float>(p.dim), p.eps));
        for (int unit = thread; unit < units; unit += THREADS) {
            finish(unit, load_residual(unit), load_weight(unit), inverse);
        }
    }
}

template <typename T, int WARPS, int HELD>
void launch_rows(const NormParams& p, bool vector, Stream stream) {
    const auto kernel = vector ? add_norm<T, WARPS, HELD, true> : add_norm<T, WARPS, 0, false>;
    const Grid grid{WARPS == 1 ? (p.rows.count + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK : p.rows.count};
    const int shared_bytes = WARPS == 1 ? 0 : (WARPS * static_cast<int>(sizeof(float)) + 15) / 16 * 16;
    launch("add_rms_norm", kernel, grid, threads_of(WARPS), shared_bytes, stream, p);
}

template <typename T>
void launch_typed(const NormParams& p, Stream stream) {
    bool vector = p.dim % UNIT<T> == 0 && aligned<T>(p.weight, {p.weight_stride});
    const void* data[] = {p.residual, p.x};
    for (int t = 0; t < 2; ++t) {
        const int64_t* leading = p.rows.strides[t];
        const int64_t strides[] = {leading[0], leading[1], leading[2], p.rows.element_strides[t]};
        vector = vector && aligned<T>(data[t], strides);
    }
    const int units = (p.dim + UNIT<T> - 1) / UNIT<T>;
    if (units <= 2 * WARP) return launch_rows<T, 1, 2>(p, vector, stream);
    if (units <= 8 * WARP) return launch_rows<T, 4, 2>(p, vector, stream);
    if (units <= 16 * WARP) return launch_rows<T, 8, 2>(p, vector, stream);
    if (units <= 32 * WARP) return launch_rows<T, 8, 4>(p, vector, stream);
    launch_rows<T, 8, 0>(p, vector, stream);
}

}  // namespace

void launch_add_norm(const NormParams& params, Element element, Stream stream) {
    switch (element) {
        case Element::float32:
            return launch_typed<float>(params, stream);
        case Element::bfloat16:
            return launch_typed<Bfloat16>(params, stream);
        default:
            return launch_typed<Float16>(params, stream);
    }
}

}  // namespace simsd::layer
