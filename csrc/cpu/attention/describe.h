// From the tensors of a call to what the kernels are given.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "cpu/attention/problem.h"

namespace simsd::attention {

// What a Problem points to besides the tensors themselves.
struct Storage {
    std::vector<int32_t> clocks, births, deaths, pages;
    std::vector<int64_t> key_count;
    std::vector<TileRange> tiles;
};

// All of the call but its result. The arguments must have been checked.
Problem describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& clock, const Tensor& birth,
                 const Tensor& death, const std::optional<Tensor>& kv_len, std::optional<double> scale,
                 const std::optional<Tensor>& block_table, Storage& storage);

// An uninitialised [B, H, L, D] like `x`, with a row's heads side by side.
Tensor allocate_heads(const Tensor& x);

// Those of the instruction set in use.
const Kernels& kernels();

}  // namespace simsd::attention
