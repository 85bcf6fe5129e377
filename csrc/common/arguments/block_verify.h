#pragma once

#include <string>

#include "common/arguments/expect.h"
#include "common/strategy.h"

namespace simsd {

inline void check_block_verify(DeviceCheck check_device, const Tensor& target_logits, const Tensor& draft_ids,
                               const Tensor& known, const Tensor& drafted, const Tensor& temperature,
                               const std::optional<Tensor>& top_k, const std::optional<Tensor>& top_p,
                               const std::optional<Tensor>& seed, const std::optional<Tensor>& position,
                               const std::optional<Tensor>& revealed, const std::optional<Tensor>& draft_logits,
                               const std::optional<Tensor>& coin, const std::optional<Tensor>& residual,
                               const std::optional<Tensor>& banned, const std::string& rule) {
    constexpr const char* OP = "block_verify";
    const Expect expect{OP, check_device, target_logits};
    expect.logits("target_logits", target_logits, {-1, -1, -1}, "[B, L, V]");
    const int64_t batch = target_logits.size(0), length = target_logits.size(1), vocabulary = target_logits.size(2);
    check(length <= MAX_BLOCK_LENGTH, OP, ": block length L must be at most 64, got ", length);
    check(rule == "match" || rule == "mrs", OP, ": rule must be one of match, mrs, got '", rule, "'");
    expect("draft_ids", draft_ids, {ScalarType::Long}, {batch, length}, "[B, L]");
    expect("known", known, {ScalarType::Int}, {batch}, "[B]");
    expect("drafted", drafted, {ScalarType::Long}, {batch}, "[B]");
    expect("temperature", temperature, {ScalarType::Float}, {batch}, "[B]");
    expect("top_k", top_k, {ScalarType::Int}, {batch}, "[B]");
    expect("top_p", top_p, {ScalarType::Float}, {batch}, "[B]");
    expect("seed", seed, {ScalarType::Long}, {batch}, "[B]");
    expect("position", position, {ScalarType::Int}, {batch, length}, "[B, L]");
    expect("revealed", revealed, {ScalarType::Long}, {batch, length}, "[B, L]");
    expect("coin", coin, {ScalarType::Float}, {batch, length}, "[B, L]");
    expect("residual", residual, {ScalarType::Float}, {batch}, "[B]");
    expect("draft_logits", draft_logits, FLOATS, {batch, length, vocabulary}, "[B, L, V]");
    check(rule != "mrs" || (draft_logits && coin && residual), OP, ": rule 'mrs' needs draft_logits, coin, residual");
    check(seed.has_value() == position.has_value() && seed.has_value() == revealed.has_value(), OP,
          ": seed, position and revealed go together");
    expect.banned(banned, vocabulary);
}

}  // namespace simsd
