// grouped_linear: rows sorted by expert, each times its expert's weight, by the product of thin_linear
// (linear/product.h): a row's bits are thin_linear's. Nothing of an expert without rows is read.
#include "common/arguments/grouped_linear.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/allocate.h"
#include "cpu/linear/product.h"

namespace simsd {
namespace linear {
namespace {

constexpr const char* OP = "grouped_linear";

// The groups that have rows.
std::vector<Group> groups_of(const Tensor& offsets, int64_t rows, int64_t expert_stride, int64_t scale_stride) {
    const int32_t* data = static_cast<const int32_t*>(offsets.const_data_ptr());
    const int64_t stride = offsets.stride(0), experts = offsets.size(0) - 1;
    check(data[0] == 0 && data[experts * stride] == rows, OP, ": offsets must run from 0 to M = ", rows, ", got ",
          data[0], " to ", data[experts * stride]);
    std::vector<Group> groups;
    for (int64_t expert = 0; expert < experts; ++expert) {
        const int64_t begin = data[expert * stride], end = data[(expert + 1) * stride];
        check(begin <= end, OP, ": offsets must not decrease, got ", end, " after ", begin, " for expert ", expert);
        if (begin < end) groups.push_back({begin, end - begin, expert * expert_stride, expert * scale_stride});
    }
    return groups;
}

Tensor grouped_linear(const Tensor x, const Tensor weight, const Tensor offsets, const std::optional<Tensor> scale) {
    check_grouped_linear(check_cpu, x, weight, offsets, scale);
    const int64_t rows = x.size(0), columns = weight.size(1), k = weight.size(2);
    const std::vector<Group> groups = groups_of(offsets, rows, weight.stride(0), scale ? scale->stride(0) : 0);
    Tensor out = allocate({rows, columns}, x.scalar_type());
    if (rows == 0 || columns == 0) return out;
    const Kernels& used = kernels();
    const Input input(used, x);
    const Weight read{weight.const_data_ptr(), weight.stride(1), weight.stride(2), k, weight_element(weight)};
    multiply({used, read, scale_of(scale), input.data(), out.mutable_data_ptr(), input.element(), columns},
             groups.data(), groups.size());
    return out;
}

}  // namespace
}  // namespace linear
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("grouped_linear", TORCH_BOX(&simsd::linear::grouped_linear)); }
