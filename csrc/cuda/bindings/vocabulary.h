// What the bindings of ops over the vocabulary share: checks, and tensors as values per row.
#pragma once

#include <optional>

#include "control/view.h"
#include "cuda/bindings/runtime.h"
#include "cuda/sample_logits.h"

namespace simsd {

constexpr int64_t MOST_IDS = int64_t{1} << 30;  // ids and rows are 32-bit numbers on the device

// The vocabulary's size is checked against what the device can count; all else by common/arguments.
inline void check_vocabulary(const char* op, const char* name, int64_t vocabulary) {
    check(vocabulary <= MOST_IDS, op, ": ", name, " must have at most ", MOST_IDS, " vocabulary entries, got ",
          vocabulary);
}

inline void check_rows(const char* op, int64_t rows) {
    check(rows <= MOST_IDS, op, ": draws at most ", MOST_IDS, " rows at once, got ", rows);
}

// Returns what must live until the launches: the mask, whose words lie side by side.
[[nodiscard]] inline std::optional<Tensor> set_banned(sample::Params& params, const std::optional<Tensor>& banned) {
    if (!banned) return banned;
    const Tensor mask = torch::stable::contiguous(*banned);
    params.banned = static_cast<const uint32_t*>(mask.const_data_ptr());
    return mask;
}

// One value for each of `group` neighbouring rows, from [rows / group]; or one for each row, from [rows / group,
// group].
template <typename T>
sample::PerRow<T> per_row(const Tensor& values, int64_t group = 1) {
    const int64_t within = values.dim() == 2 ? values.stride(1) : 0;
    return {static_cast<const T*>(values.const_data_ptr()), {values.stride(0), within}, static_cast<int32_t>(group)};
}

template <typename T>
sample::PerRow<T> per_row(const std::optional<Tensor>& values, int64_t group) {
    return values ? per_row<T>(*values, group) : sample::PerRow<T>{};
}

// One setting of a slot for each of its `group` rows.
template <typename T>
sample::PerRow<T> per_row(const control::View<const T, 1>& values, int64_t group) {
    return {values.data, {values.strides[0], 0}, static_cast<int32_t>(group)};
}

}  // namespace simsd
