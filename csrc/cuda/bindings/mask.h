// The mask of attention as kernels take it, from the tensors that describe it.
#pragma once

#include <algorithm>
#include <optional>

#include "cuda/attention_plan.h"
#include "cuda/bindings/runtime.h"

namespace simsd {

inline const int32_t* ints(const Tensor& tensor, int64_t (&strides)[2]) {
    strides[0] = tensor.stride(0);
    strides[1] = tensor.stride(1);
    return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// `pages`: of K and V, which hold `page_size` keys each, where there is a block table. Throws where kernels cannot
// count what is given. The plan is left out.
inline void set_mask(intervals::Mask& m, const char* op, const Tensor& clock, const Tensor& birth, const Tensor& death,
                     int64_t group, int64_t page_size, int64_t pages, const std::optional<Tensor>& kv_len,
                     const std::optional<Tensor>& block_table) {
    const int64_t batch = clock.size(0), q_rows = clock.size(1), keys = birth.size(1);
    constexpr int64_t MOST = (int64_t{1} << 31) - 4096;  // rows and keys are counted in 32 bits, and words of the plan
    check(q_rows < MOST / std::max<int64_t>(group, 1) && keys < MOST &&
              intervals::plan_words(batch, group * q_rows, keys) < MOST,
          op, ": ", q_rows, " queries and ", keys, " keys are too many for one call");
    check(!block_table || pages < intervals::MOST_PAGES, op, ": cuda takes fewer than ", intervals::MOST_PAGES,
          " pages, got ", pages);
    m.clock = ints(clock, m.clock_strides);
    m.birth = ints(birth, m.birth_strides);
    m.death = ints(death, m.death_strides);
    if (kv_len) {
        m.kv_len = static_cast<const int32_t*>(kv_len->const_data_ptr());
        m.kv_len_stride = kv_len->stride(0);
    }
    if (block_table) m.block_table = ints(*block_table, m.table_strides);
    m.batch = static_cast<int32_t>(batch);
    m.group = static_cast<int32_t>(group);
    m.q_rows = static_cast<int32_t>(q_rows);
    m.keys = static_cast<int32_t>(keys);
    m.page_size = static_cast<int32_t>(page_size);
    m.pages = static_cast<int32_t>(pages);
}

}  // namespace simsd
