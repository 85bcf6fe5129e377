#pragma once

#include "common/arguments/expect.h"

namespace simsd {

inline void check_attention_plan(DeviceCheck check_device, const Tensor& clock, const Tensor& birth,
                                 const Tensor& death, int64_t group, int64_t pages, const std::optional<Tensor>& kv_len,
                                 const std::optional<Tensor>& block_table) {
    constexpr const char* OP = "attention_plan";
    const Expect expect{OP, check_device, clock};
    expect("clock", clock, {ScalarType::Int}, {-1, -1}, "[B, Lq]");
    const int64_t batch = clock.size(0);
    expect("birth", birth, {ScalarType::Int}, {batch, -1}, "[B, Lk]");
    const int64_t keys = birth.size(1);
    expect("death", death, {ScalarType::Int}, {batch, keys}, "[B, Lk]");
    check(group >= 1, OP, ": group must be at least 1, got ", group);
    check(pages >= 0, OP, ": pages must be at least 0, got ", pages);
    expect("kv_len", kv_len, {ScalarType::Int}, {batch}, "[B]");
    expect("block_table", block_table, {ScalarType::Int}, {batch, -1}, "[B, n_pages]");
    if (block_table) {
        const int64_t count = block_table->size(1), page_size = count ? keys / count : 0;
        check(count * page_size == keys && (count == 0 || (page_size % 16 == 0 && 16 <= page_size && page_size <= 256)),
              OP, ": a page must hold a multiple of 16 keys, from 16 to 256, got ", keys, " keys in ", count, " pages");
    } else {
        check(pages == batch, OP, ": pages must be B = ", batch, " without a block_table, got ", pages);
    }
}

}  // namespace simsd
