// Tensors [..., D] of up to four dimensions, as rows.
#pragma once

#include "common/check.h"
#include "common/rows.h"

namespace simsd {

inline void check_rows(const char* op, const char* name, const Tensor& tensor, const char* letters) {
    check(tensor.dim() >= 1 && tensor.dim() <= MAX_LEADING + 1, op, ": ", name, " must be ", letters,
          " of 1 to 4 dimensions, got ", shape_text(tensor));
}

// Neighbouring dimensions that lie evenly in all tensors become one. The shapes must have been checked.
template <typename... Others>
Rows<1 + sizeof...(Others)> rows_of(const Tensor& first, const Others&... others) {
    constexpr int TENSORS = 1 + sizeof...(Others);
    const Tensor* tensors[] = {&first, &others...};
    Rows<TENSORS> rows{1, {1, 1, 1}, {}, {}};
    const int64_t last = first.dim() - 1;
    for (int t = 0; t < TENSORS; ++t) rows.element_strides[t] = tensors[t]->stride(last);
    int to = MAX_LEADING - 1;
    for (int64_t axis = last - 1; axis >= 0; --axis) {
        const int64_t size = first.size(axis);
        rows.count *= size;
        if (size == 1) continue;
        bool even = true;
        for (int t = 0; t < TENSORS; ++t) {
            even = even && tensors[t]->stride(axis) == rows.sizes[to] * rows.strides[t][to];
        }
        if (rows.sizes[to] > 1 && !even) --to;
        if (rows.sizes[to] == 1) {
            for (int t = 0; t < TENSORS; ++t) rows.strides[t][to] = tensors[t]->stride(axis);
        }
        rows.sizes[to] *= size;
    }
    return rows;
}

}  // namespace simsd
