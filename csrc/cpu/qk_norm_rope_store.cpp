// qk_norm_rope_store: RMSNorm over the heads of q and k, rotary embedding, and K and V to their cache slots. Rounds
// after every step as the modules of transformers do, whose 16-bit tensors hold every intermediate result.
#include "common/arguments/qk_norm_rope_store.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <vector>

#include "common/strided.h"
#include "cpu/allocate.h"

namespace simsd {
namespace {

constexpr const char* OP = "qk_norm_rope_store";
constexpr int LANES = 8;  // sums of squares side by side, for the compiler to make vectors of

struct Arguments {
    const Tensor &q, &k, &v;
    const std::optional<Tensor>&q_weight, &k_weight;
    const Tensor &cos, &sin, &k_cache, &v_cache, &slots;
    float eps;
};

void check_arguments(const Arguments& a) {
    check_qk_norm_rope_store(check_cpu, a.q, a.k, a.v, a.q_weight, a.k_weight, a.cos, a.sin, a.k_cache, a.v_cache,
                             a.slots);
    const int64_t batch = a.q.size(0), rows = a.q.size(1), capacity = a.k_cache.size(2);
    // Before anything is written, so that a bad slot leaves both caches as they were.
    const auto slot = strided_const<int32_t, 2>(a.slots);
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t r = 0; r < rows; ++r) {
            const int32_t c = *slot.at(b, r);
            check(c >= -1 && c < capacity, OP, ": slots must be -1 or in [0, ", capacity, "), got ", c);
        }
    }
}

template <typename T>
float rounded(float value) {
    return static_cast<float>(static_cast<T>(value));
}

template <typename T>
void widen(const T* from, int64_t stride, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i * stride]);
}

template <typename T>
void narrow(const float* from, int64_t count, T* to, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) to[i * stride] = static_cast<T>(from[i]);
}

// x [D] in place.
template <typename T>
void norm(float* x, int64_t dim, const float* weight, float eps) {
    float lanes[LANES] = {};
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
        for (int i = 0; i < LANES; ++i) lanes[i] += x[d + i] * x[d + i];
    }
    for (int i = 0; d + i < dim; ++i) lanes[i] += x[d + i] * x[d + i];
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    }
    const float scale = 1.0f / std::sqrt(lanes[0] / static_cast<float>(dim) + eps);
    for (d = 0; d < dim; ++d) x[d] = rounded<T>(weight[d] * rounded<T>(x[d] * scale));
}

// x [D] in place; cos and sin [D_rot].
template <typename T>
void rotate(float* x, const float* cos, const float* sin, int64_t rotary) {
    const int64_t half = rotary / 2;
    for (int64_t d = 0; d < half; ++d) {
        const float low = x[d], high = x[d + half];
        x[d] = rounded<T>(rounded<T>(low * cos[d]) - rounded<T>(high * sin[d]));
        x[d + half] = rounded<T>(rounded<T>(high * cos[d + half]) + rounded<T>(low * sin[d + half]));
    }
}

template <typename T>
void serve(const Arguments& a, Tensor& out) {
    const auto q = strided_const<T, 4>(a.q), k = strided_const<T, 4>(a.k), v = strided_const<T, 4>(a.v);
    const auto cos = strided_const<T, 3>(a.cos), sin = strided_const<T, 3>(a.sin);
    const auto k_cache = strided_mutable<T, 4>(a.k_cache), v_cache = strided_mutable<T, 4>(a.v_cache);
    const auto q_out = strided_mutable<T, 4>(out);
    const auto slots = strided_const<int32_t, 2>(a.slots);
    const int64_t batch = a.q.size(0), rows = a.q.size(1), q_heads = a.q.size(2), dim = a.q.size(3);
    const int64_t kv_heads = a.k.size(2), rotary = a.cos.size(2);

    std::vector<float> q_weight(dim), k_weight(dim);
    if (a.q_weight)
        widen(static_cast<const T*>(a.q_weight->const_data_ptr()), a.q_weight->stride(0), dim, &q_weight[0]);
    if (a.k_weight)
        widen(static_cast<const T*>(a.k_weight->const_data_ptr()), a.k_weight->stride(0), dim, &k_weight[0]);

    const auto serve_rows = [&](int64_t begin, int64_t end) {
        std::vector<float> memory(dim + 2 * rotary);
        float *x = memory.data(), *row_cos = x + dim, *row_sin = row_cos + rotary;
        for (int64_t index = begin; index < end; ++index) {
            const int64_t b = index / rows, r = index % rows;
            widen(cos.at(b, r), cos.strides[2], rotary, row_cos);
            widen(sin.at(b, r), sin.strides[2], rotary, row_sin);
            for (int64_t h = 0; h < q_heads; ++h) {
                widen(q.at(b, r, h), q.strides[3], dim, x);
                if (a.q_weight) norm<T>(x, dim, q_weight.data(), a.eps);
                rotate<T>(x, row_cos, row_sin, rotary);
                narrow(x, dim, q_out.at(b, h, r), q_out.strides[3]);
            }
            const int32_t slot = *slots.at(b, r);
            if (slot < 0) continue;
            for (int64_t h = 0; h < kv_heads; ++h) {
                widen(k.at(b, r, h), k.strides[3], dim, x);
                if (a.k_weight) norm<T>(x, dim, k_weight.data(), a.eps);
                rotate<T>(x, row_cos, row_sin, rotary);
                narrow(x, dim, k_cache.at(b, h, slot), k_cache.strides[3]);
                const T* from = v.at(b, r, h);
                T* to = v_cache.at(b, h, slot);
                for (int64_t d = 0; d < dim; ++d)
                    std::memcpy(to + d * v_cache.strides[3], from + d * v.strides[3], sizeof(T));
            }
        }
    };
    // Below some 16k elements a thread's start costs more than its share of the work.
    const int64_t grain = 1 + 16384 / ((q_heads + 2 * kv_heads) * dim + 1);
    if (batch * rows <= grain) {
        serve_rows(0, batch * rows);
    } else {
        torch::stable::parallel_for(0, batch * rows, grain, serve_rows);
    }
}

Tensor qk_norm_rope_store(const Tensor q, const Tensor k, const Tensor v, const std::optional<Tensor> q_weight,
                          const std::optional<Tensor> k_weight, const Tensor cos, const Tensor sin, Tensor k_cache,
                          Tensor v_cache, const Tensor slots, const double eps) {
    const Arguments arguments{q, k, v, q_weight, k_weight, cos, sin, k_cache, v_cache, slots, static_cast<float>(eps)};
    check_arguments(arguments);
    Tensor out = allocate({q.size(0), q.size(2), q.size(1), q.size(3)}, q.scalar_type());
    if (q.size(0) == 0 || q.size(1) == 0 || q.size(3) == 0) return out;
    switch (q.scalar_type()) {
        case ScalarType::Float:
            serve<float>(arguments, out);
            break;
        case ScalarType::BFloat16:
            serve<torch::headeronly::BFloat16>(arguments, out);
            break;
        default:
            serve<torch::headeronly::Half>(arguments, out);
    }
    return out;
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("qk_norm_rope_store", TORCH_BOX(&simsd::qk_norm_rope_store)); }
