#pragma once

#include "common/arguments/masked_attention.h"

namespace simsd {

inline void check_masked_attention_backward(DeviceCheck check_device, const Tensor& dout, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& clock,
                                            const Tensor& birth, const Tensor& death,
                                            const std::optional<Tensor>& kv_len) {
    constexpr const char* OP = "masked_attention_backward";
    check_masked_attention(check_device, q, k, v, clock, birth, death, kv_len, std::nullopt, OP);
    const Expect expect{OP, check_device, q};
    const std::initializer_list<int64_t> shape{q.size(0), q.size(1), q.size(2), q.size(3)};
    expect("dout", dout, {q.scalar_type()}, shape, "[B, Hq, Lq, D]");
    expect("out", out, {q.scalar_type()}, shape, "[B, Hq, Lq, D]");
}

}  // namespace simsd
