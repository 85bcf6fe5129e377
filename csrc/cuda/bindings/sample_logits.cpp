#include "cuda/sample_logits.h"

#include <optional>
#include <tuple>

#include "common/arguments/sample_logits.h"
#include "cuda/bindings/runtime.h"
#include "cuda/bindings/vocabulary.h"

namespace simsd {
namespace {

constexpr const char* OP = "sample_logits";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample_logits(const Tensor logits, const Tensor temperature,
                                                                         const Tensor top_k, const Tensor top_p,
                                                                         const Tensor seed, const Tensor position,
                                                                         const Tensor revealed,
                                                                         const std::optional<Tensor> banned) {
    check_sample_logits(check_same_device, logits, temperature, top_k, top_p, seed, position, revealed, banned);
    const int64_t rows = logits.size(0), vocabulary = logits.size(1);
    check_vocabulary(OP, "logits", vocabulary);
    check_rows(OP, rows);

    const OnDevice device(logits);
    Tensor token = allocate_like(logits, {rows}, ScalarType::Long);
    const auto statistic = [&] { return allocate_like(logits, {rows}, ScalarType::Float); };
    Tensor prob = statistic(), log_odds = statistic(), entropy = statistic(), logsumexp = statistic();
    Tensor draw_logprob = statistic();
    if (rows == 0) return {token, prob, log_odds, entropy, logsumexp, draw_logprob};
    Tensor scratch = allocate_like(logits, {sample::scratch_bytes(rows, vocabulary, true)}, ScalarType::Byte);

    sample::Params params{};
    params.logits = logits.const_data_ptr();
    params.logits_strides[0] = logits.stride(0);
    params.logits_strides[2] = logits.stride(1);
    params.logits_inner = 1;
    params.element = element_of<sample::Element>(logits);
    params.logit_rows = params.rows = static_cast<int32_t>(rows);
    params.vocabulary = static_cast<int32_t>(vocabulary);
    params.temperature = per_row<float>(temperature);
    params.top_k = per_row<int32_t>(top_k);
    params.top_p = per_row<float>(top_p);
    params.seed = per_row<int64_t>(seed);
    params.position = per_row<int32_t>(position);
    params.revealed = per_row<int64_t>(revealed);
    const auto mask = set_banned(params, banned);
    params.token = static_cast<int64_t*>(token.mutable_data_ptr());
    params.prob = static_cast<float*>(prob.mutable_data_ptr());
    params.log_odds = static_cast<float*>(log_odds.mutable_data_ptr());
    params.entropy = static_cast<float*>(entropy.mutable_data_ptr());
    params.logsumexp = static_cast<float*>(logsumexp.mutable_data_ptr());
    params.draw_logprob = static_cast<float*>(draw_logprob.mutable_data_ptr());
    params.scratch = scratch.mutable_data_ptr();
    sample::launch_sample(params, device.stream());
    return {token, prob, log_odds, entropy, logsumexp, draw_logprob};
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("sample_logits", TORCH_BOX(&simsd::sample_logits)); }
