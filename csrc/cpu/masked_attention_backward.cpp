// masked_attention_backward on the CPU: argument checks, the work's partition over threads (a KV head of a batch
// element each, so that gradients of keys are summed in one order), registration. The arithmetic is in
// attention/backward.h.
#include "common/arguments/masked_attention_backward.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <tuple>

#include "common/strided.h"
#include "cpu/attention/describe.h"
#include "cpu/attention/memory.h"

namespace simsd::attention {
namespace {

constexpr double SERIAL_FLOPS = 2e6;  // below this, waking threads costs more than it saves

struct Backward {
    Problem p;
    const Kernels& kernels;
    const Tensor &dout, &q, &out;
    Tensor dq, dk, dv;

    int64_t pitch() const { return divide_up(p.dim, kernels.half_lanes) * kernels.half_lanes; }
    bool stages(const int64_t* strides) const { return !kernels.in_place(p, strides); }

    int64_t scratch_floats() const {
        const int64_t staged = stages(p.k_strides) + stages(p.v_strides);
        const int64_t of_keys = staged * aligned(p.keys * p.dim) + 2 * aligned(p.keys * pitch()) + aligned(pitch());
        const int64_t lanes = kernels.lanes, of_lanes = 3 * aligned(lanes);
        return of_keys + of_lanes + 3 * aligned(p.dim * lanes) + 2 * aligned(lanes * pitch()) +
               aligned((p.keys + kernels.padded_keys) * lanes);
    }
};

// Hands out parts of a thread's memory.
struct Parts {
    float* next;

    float* take(int64_t floats) {
        float* part = next;
        next += aligned(floats);
        return part;
    }
};

// Where packed row r of a KV head lies in a [B, H, L, D] tensor.
template <typename T>
T* row_of(const Strided<T, 4>& x, const Problem& p, int64_t batch, int64_t kv_head, int64_t row) {
    return x.at(batch, kv_head * p.group + row % p.group, row / p.group);
}

// The head's K or V in float32, and how far apart its rows are. Of staged ones only tiles that some query sees are
// read.
const float* rows_of(const Backward& b, const void* data, const int64_t* strides, int64_t batch, int64_t kv_head,
                     float* staged, int64_t& pitch) {
    const Problem& p = b.p;
    const int64_t first = batch * strides[0] + kv_head * strides[1];
    if (!b.stages(strides)) {
        pitch = strides[2];
        return static_cast<const float*>(data) + first;
    }
    pitch = p.dim;
    if (p.q_rows == 0) return staged;
    const int32_t* clock = p.clock + batch * p.q_rows;
    const auto [earliest, latest] = std::minmax_element(clock, clock + p.q_rows);
    for (int64_t j = 0; j < p.key_count[batch]; ++j) {
        const TileRange& tile = p.tiles[batch * p.tile_count + j / TILE];
        if (tile.birth_min > *latest || tile.death_max < *earliest) continue;
        b.kernels.convert(p, data, first + j * strides[2], strides[3], staged + j * p.dim);
    }
    return staged;
}

template <typename T>
void backward_of_head(const Backward& b, int64_t batch, int64_t kv_head, float* memory) {
    const Problem& p = b.p;
    const int64_t pitch = b.pitch(), lanes = b.kernels.lanes;
    Parts parts{memory};
    const auto staged = [&](const int64_t* strides) {
        return b.stages(strides) ? parts.take(p.keys * p.dim) : nullptr;
    };
    Head head{};
    head.k = rows_of(b, p.k, p.k_strides, batch, kv_head, staged(p.k_strides), head.k_pitch);
    head.v = rows_of(b, p.v, p.v_strides, batch, kv_head, staged(p.v_strides), head.v_pitch);
    head.pitch = pitch;
    head.dk = parts.take(p.keys * pitch);
    head.dv = parts.take(p.keys * pitch);
    head.spare = parts.take(pitch);
    std::fill(head.dk, parts.next, 0.0f);
    auto* clock = reinterpret_cast<int32_t*>(parts.take(lanes));
    float *inverse = parts.take(lanes), *delta = parts.take(lanes);
    float *q = parts.take(p.dim * lanes), *dout = parts.take(p.dim * lanes), *dq = parts.take(p.dim * lanes);
    float *q_rows = parts.take(lanes * pitch), *dout_rows = parts.take(lanes * pitch);
    float* weights = parts.take((p.keys + b.kernels.padded_keys) * lanes);

    const auto q_in = strided_const<T, 4>(b.q), dout_in = strided_const<T, 4>(b.dout),
               out_in = strided_const<T, 4>(b.out);
    const auto dq_out = strided_mutable<T, 4>(b.dq);
    for (int64_t first = 0; first < p.group * p.q_rows; first += lanes) {
        const int64_t rows = std::min(lanes, p.group * p.q_rows - first);
        RowBlock block{first, rows, rows <= b.kernels.half_lanes ? b.kernels.half_lanes : lanes, 0, 0, clock, q};
        const int64_t width = block.lanes;
        for (int64_t lane = 0; lane < width; ++lane) {
            clock[lane] = p.clock[batch * p.q_rows + (first + (lane < rows ? lane : 0)) / p.group];
            const T* from = row_of(q_in, p, batch, kv_head, first + (lane < rows ? lane : 0));
            for (int64_t d = 0; d < p.dim; ++d) {
                q[d * width + lane] = lane < rows ? static_cast<float>(from[d * q_in.strides[3]]) * p.scale : 0.0f;
            }
        }
        block.clock_min = *std::min_element(clock, clock + rows);
        block.clock_max = *std::max_element(clock, clock + rows);
        std::fill_n(dq, p.dim * width, 0.0f);
        const RowGradients gradients{weights, inverse, dout, q_rows, dout_rows, delta, dq};
        if (b.kernels.weigh(p, batch, head, block, gradients)) {
            std::fill_n(dout, p.dim * width, 0.0f);
            std::fill_n(delta, width, 0.0f);
            std::fill_n(q_rows, rows * pitch, 0.0f);
            std::fill_n(dout_rows, rows * pitch, 0.0f);
            for (int64_t lane = 0; lane < rows; ++lane) {
                if (inverse[lane] == 0.0f) continue;  // it sees nothing, and may hold anything
                const T* from = row_of(dout_in, p, batch, kv_head, first + lane);
                const T* with = row_of(out_in, p, batch, kv_head, first + lane);
                for (int64_t d = 0; d < p.dim; ++d) {
                    const float value = from[d * dout_in.strides[3]];
                    delta[lane] += value * static_cast<float>(with[d * out_in.strides[3]]);
                    dout[d * width + lane] = dout_rows[lane * pitch + d] = value;
                    q_rows[lane * pitch + d] = q[d * width + lane];
                }
            }
            b.kernels.propagate(p, batch, head, block, gradients);
        }
        for (int64_t lane = 0; lane < rows; ++lane) {
            T* to = row_of(dq_out, p, batch, kv_head, first + lane);
            for (int64_t d = 0; d < p.dim; ++d) to[d * dq_out.strides[3]] = dq[d * width + lane] * p.scale;
        }
    }
    for (const auto& [tensor, from] : {std::pair{&b.dk, head.dk}, std::pair{&b.dv, head.dv}}) {
        const auto to = strided_mutable<T, 4>(*tensor);
        for (int64_t j = 0; j < p.keys; ++j) {
            T* row = to.at(batch, kv_head, j);
            for (int64_t d = 0; d < p.dim; ++d) row[d * to.strides[3]] = from[j * pitch + d];
        }
    }
}

std::tuple<Tensor, Tensor, Tensor> masked_attention_backward(const Tensor dout, const Tensor q, const Tensor k,
                                                             const Tensor v, const Tensor out, const Tensor clock,
                                                             const Tensor birth, const Tensor death,
                                                             const std::optional<Tensor> kv_len,
                                                             const std::optional<double> scale) {
    check_masked_attention_backward(check_cpu, dout, q, k, v, out, clock, birth, death, kv_len);
    Storage storage;
    const Problem p = describe(q, k, v, clock, birth, death, kv_len, scale, std::nullopt, storage);
    const Backward b{p, kernels(), dout, q, out, allocate_heads(q), allocate_heads(k), allocate_heads(v)};
    const int64_t heads = p.batch * p.kv_heads;
    const double flops = 10.0 * heads * p.group * p.q_rows * p.keys * p.dim;
    const int64_t workers = flops < SERIAL_FLOPS ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), heads);
    std::atomic<int64_t> next{0};
    const auto drain = [&](int64_t, int64_t) {
        Memory memory;
        float* floats = memory.reserve(b.scratch_floats());
        with_element(p.element, [&](auto element) {
            for (int64_t index = next++; index < heads; index = next++) {
                backward_of_head<decltype(element)>(b, index / p.kv_heads, index % p.kv_heads, floats);
            }
        });
    };
    if (workers > 1) {
        torch::stable::parallel_for(0, workers, 1, drain);
    } else {
        drain(0, 1);
    }
    return {b.dq, b.dk, b.dv};
}

}  // namespace
}  // namespace simsd::attention

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) {
    m.impl("masked_attention_backward", TORCH_BOX(&simsd::attention::masked_attention_backward));
}
