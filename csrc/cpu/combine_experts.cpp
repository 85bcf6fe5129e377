// combine_experts: every token's weighted sum of its experts' rows (layer/kernel.h).
#include "common/arguments/combine_experts.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

#include "common/strided.h"
#include "cpu/allocate.h"
#include "cpu/layer/row.h"

namespace simsd {
namespace layer {
namespace {

constexpr int64_t SERIAL_ELEMENTS = 65536;  // that are read; as the other loops over rows have it

float read_float(const Tensor& tensor, int64_t offset) {
    const void* data = tensor.const_data_ptr();
    switch (tensor.scalar_type()) {
        case ScalarType::BFloat16:
            return static_cast<const torch::headeronly::BFloat16*>(data)[offset];
        case ScalarType::Half:
            return static_cast<const torch::headeronly::Half*>(data)[offset];
        default:
            return static_cast<const float*>(data)[offset];
    }
}

Tensor combine_experts(const Tensor y, const Tensor weights, const Tensor places) {
    check_combine_experts(check_cpu, y, weights, places);
    const int64_t tokens = places.size(0), choices = places.size(1), size = y.size(1), bytes = y.element_size();
    const auto place_of = strided_const<int32_t, 2>(places);
    for (int64_t m = 0; m < tokens; ++m) {
        for (int64_t c = 0; c < choices; ++c) {
            const int32_t place = *place_of.at(m, c);
            check(place >= 0 && place < y.size(0), "combine_experts: places must be in [0, S) = [0, ", y.size(0),
                  "), got ", place);
        }
    }
    Tensor out = allocate({tokens, size}, y.scalar_type());
    if (tokens == 0 || size == 0) return out;
    const auto serve_row = kernels().combine_experts[static_cast<int>(element_of<Element>(y))];
    const char* data = static_cast<const char*>(y.const_data_ptr());
    char* out_data = static_cast<char*>(out.mutable_data_ptr());
    const auto serve = [&](int64_t begin, int64_t end) {
        std::vector<const void*> rows(choices);
        std::vector<float> factors(choices);
        for (int64_t m = begin; m < end; ++m) {
            for (int64_t c = 0; c < choices; ++c) {
                rows[c] = data + *place_of.at(m, c) * y.stride(0) * bytes;
                factors[c] = read_float(weights, m * weights.stride(0) + c * weights.stride(1));
            }
            serve_row(rows.data(), factors.data(), choices, y.stride(1), size, out_data + m * size * bytes);
        }
    };
    const int64_t grain = SERIAL_ELEMENTS / (size * (choices + 1)) + 1;
    if (tokens <= grain) {
        serve(0, tokens);
    } else {
        torch::stable::parallel_for(0, tokens, grain, serve);
    }
    return out;
}

}  // namespace
}  // namespace layer
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("combine_experts", TORCH_BOX(&simsd::layer::combine_experts)); }
