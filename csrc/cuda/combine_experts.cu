// combine_experts: every token's weighted sum of its experts' rows, in the order of its choices. Each product is
// rounded to the tensors' dtype, the sum to float32, and then once to the dtype.
//
// Data path: a thread takes 16 bytes of a token's output and reads the same columns of its rows, global to registers;
// what is not aligned or not contiguous goes element by element. Weights and places are the same for a whole block.
//
// Floor: every row once. SDAR-30B-A3B, 64 tokens of 8 experts: 64 x 9 x 2048 x 2 bytes = 2.4 MB, just written, from L2.
#include "cuda/columns.h"
#include "cuda/combine_experts.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/warp.h"

namespace simsd::combination {
namespace {

constexpr int THREADS = 128;

template <typename T, bool Vector>
__global__ void __launch_bounds__(THREADS) add_choices(const Params p) {
    const int64_t token = block_x() / p.blocks;
    const int first = (block_x() % p.blocks * THREADS + thread_index()) * UNIT<T>;
    if (first >= p.size) return;
    const int count = smaller(p.size - first, UNIT<T>);
    const T* weights = static_cast<const T*>(p.weights) + token * p.weight_strides[0];
    const int32_t* places = p.places + token * p.place_strides[0];
    Columns<T> total;
#pragma unroll 4
    for (int choice = 0; choice < p.choices; ++choice) {
        const int32_t place = places[choice * p.place_strides[1]];
        expect(place >= 0 && place < p.rows, "combine_experts: places must be in [0, S)");
        const float weight = to_float(weights[choice * p.weight_strides[1]]);
        const T* row = static_cast<const T*>(p.y) + place * p.row_stride;
        Columns<T> term = load_columns<T, Vector>(row, p.element_stride, first, count);
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) term.x[i] = product(term.x[i], weight);
        round_to<T>(term);
#pragma unroll
        for (int i = 0; i < UNIT<T>; ++i) total.x[i] = sum(total.x[i], term.x[i]);
    }
    store_columns<T, Vector>(total, static_cast<T*>(p.out) + token * p.size, 1, first, count);
}

template <typename T>
void launch_typed(Params p, Stream stream) {
    const int64_t strides[] = {p.row_stride, p.element_stride};
    const bool vector = p.size % UNIT<T> == 0 && aligned<T>(p.y, strides);
    const int64_t units = (static_cast<int64_t>(p.size) + UNIT<T> - 1) / UNIT<T>;
    p.blocks = static_cast<int32_t>((units + THREADS - 1) / THREADS);
    const auto kernel = vector ? add_choices<T, true> : add_choices<T, false>;
    launch("combine_experts", kernel, Grid{p.tokens * p.blocks}, THREADS, 0, stream, p);
}

}  // namespace

void launch_combine(const Params& params, Element element, Stream stream) {
    switch (element) {
        case Element::float32:
            return launch_typed<float>(params, stream);
        case Element::bfloat16:
            return launch_typed<Bfloat16>(params, stream);
        default:
            return launch_typed<Float16>(params, stream);
    }
}

}  // namespace simsd::combination
