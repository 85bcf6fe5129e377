// silu_mul: silu(gate) * up for the two halves of a row.
//
// Data path: a thread takes 16 bytes of the gate and the 16 bytes of up that belong to them, global to registers to
// global; what is not aligned or not contiguous goes element by element. Every element goes through the same
// arithmetic, rounded to the tensors' dtype as the module of transformers rounds it.
//
// Floor: every byte read once and written once. SDAR-8B, 64 rows: 64 x 3 x 12288 x 2 bytes = 4.7 MB, 1.4 us at 3.35
// TB/s (the module takes 2 launches and 5 rows' bytes where this takes 3).
#include "cuda/columns.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/silu_mul.h"
#include "cuda/warp.h"

namespace simsd::activation {
namespace {

constexpr int THREADS = 128;

// x / (1 + e^-x) with an exponential that cannot overflow. -inf gives -0, as the large numbers that it stands for do.
SIMSD_DEVICE float silu(float x) {
    const float bounded = x < -104.0f ? -104.0f : x;
    const float e = exponential(bounded < 0.0f ? bounded : -bounded);
    return (bounded < 0.0f ? product(bounded, e) : bounded) / sum(1.0f, e);
}

template <typename T, bool Vector>
__global__ void __launch_bounds__(THREADS) silu_times(const Params p) {
    const int64_t row = block_x() / p.blocks;
    const int first = (block_x() % p.blocks * THREADS + thread_index()) * UNIT<T>;
    if (first >= p.size) return;
    const int count = smaller(p.size - first, UNIT<T>);
    const int64_t stride = p.rows.element_strides[0];
    const T* gate = static_cast<const T*>(p.gate_up) + p.rows.offset(0, row);
    Columns<T> activated = load_columns<T, Vector>(gate, stride, first, count);
    const Columns<T> up = load_columns<T, Vector>(gate + p.size * stride, stride, first, count);
#pragma unroll
    for (int i = 0; i < UNIT<T>; ++i) activated.x[i] = silu(activated.x[i]);
    round_to<T>(activated);
    store_columns<T, Vector>(times<T>(activated, up), static_cast<T*>(p.out) + row * p.size, 1, first, count);
}

template <typename T>
void launch_typed(Params p, Stream stream) {
    const int64_t* leading = p.rows.strides[0];
    const int64_t strides[] = {leading[0], leading[1], leading[2], p.rows.element_strides[0]};
    const bool vector = p.size % UNIT<T> == 0 && aligned<T>(p.gate_up, strides);
    const int64_t units = (static_cast<int64_t>(p.size) + UNIT<T> - 1) / UNIT<T>;
    p.blocks = static_cast<int32_t>((units + THREADS - 1) / THREADS);
    const auto kernel = vector ? silu_times<T, true> : silu_times<T, false>;
    launch("silu_mul", kernel, Grid{p.rows.count * p.blocks}, THREADS, 0, stream, p);
}

}  // namespace

void launch_silu_times(const Params& params, Element element, Stream stream) {
    switch (element) {
        case Element::float32:
            return launch_typed<float>(params, stream);
        case Element::bfloat16:
            return launch_typed<Bfloat16>(params, stream);
        default:
            return launch_typed<Float16>(params, stream);
    }
}

}  // namespace simsd::activation
