// sample_logits: argmax or seeded Gumbel-max over rows of logits [R, V], with their softmax statistics. One sweep over
// the vocabulary per row; noise only at temperature > 0; a whole row is held only where top-k or top-p asks for it.
#include "common/arguments/sample_logits.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "common/strided.h"
#include "cpu/vocabulary/row.h"

namespace simsd {
namespace {

constexpr const char* OP = "sample_logits";

using vocabulary::Draw;
using vocabulary::Filter;
using vocabulary::Row;
using vocabulary::Workspace;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sample_logits(const Tensor logits, const Tensor temperature,
                                                                         const Tensor top_k, const Tensor top_p,
                                                                         const Tensor seed, const Tensor position,
                                                                         const Tensor revealed,
                                                                         const std::optional<Tensor> banned) {
    check_sample_logits(check_cpu, logits, temperature, top_k, top_p, seed, position, revealed, banned);
    const int64_t rows = logits.size(0), vocabulary = logits.size(1);
    const auto element = element_of<vocabulary::Element>(logits);
    const vocabulary::Banned mask(banned, vocabulary);

    Tensor token = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
    Tensor prob = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
    Tensor log_odds = torch::stable::empty_like(prob), entropy = torch::stable::empty_like(prob);
    Tensor logsumexp = torch::stable::empty_like(prob), draw_logprob = torch::stable::empty_like(prob);

    const auto heats = strided_const<float, 1>(temperature);
    const auto ks = strided_const<int32_t, 1>(top_k);
    const auto ps = strided_const<float, 1>(top_p);
    const auto seeds = strided_const<int64_t, 1>(seed);
    const auto places = strided_const<int32_t, 1>(position);
    const auto sets = strided_const<int64_t, 1>(revealed);
    const void* data = logits.const_data_ptr();
    const int64_t row_stride = logits.stride(0), id_stride = logits.stride(1);
    int64_t* tokens = static_cast<int64_t*>(token.mutable_data_ptr());
    float* probs = static_cast<float*>(prob.mutable_data_ptr());
    float* odds = static_cast<float*>(log_odds.mutable_data_ptr());
    float* entropies = static_cast<float*>(entropy.mutable_data_ptr());
    float* totals = static_cast<float*>(logsumexp.mutable_data_ptr());
    float* logprobs = static_cast<float*>(draw_logprob.mutable_data_ptr());

    torch::stable::parallel_for(0, rows, vocabulary::rows_per_task(vocabulary), [&](int64_t begin, int64_t end) {
        Workspace work;
        for (int64_t r = begin; r < end; ++r) {
            const float heat = *heats.at(r);
            const Row row{element,
                          vocabulary::row_pointer(element, data, r * row_stride),
                          id_stride,
                          vocabulary,
                          vocabulary::divisor_of(heat),
                          &mask};
            const NoiseKey key{*seeds.at(r), *places.at(r), *sets.at(r)};
            const Draw draw =
                vocabulary::draw_row(row, Filter{*ks.at(r), *ps.at(r)}, heat > 0.0f ? &key : nullptr, work);
            tokens[r] = draw.token;
            probs[r] = draw.summary.prob(draw.x);
            odds[r] = draw.summary.log_odds(draw.token, draw.x);
            entropies[r] = draw.summary.entropy();
            totals[r] = draw.summary.logsumexp();
            logprobs[r] = draw.logprob;
        }
    });
    return {token, prob, log_odds, entropy, logsumexp, draw_logprob};
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("sample_logits", TORCH_BOX(&simsd::sample_logits)); }
