#include "cuda/block_verify.h"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "common/arguments/block_verify.h"
#include "cuda/bindings/runtime.h"
#include "cuda/bindings/vocabulary.h"

namespace simsd {
namespace {

constexpr const char* OP = "block_verify";

void set_logits(sample::Params& params, const Tensor& logits) {
    params.logits = logits.const_data_ptr();
    for (int axis = 0; axis < 3; ++axis) params.logits_strides[axis] = logits.stride(axis);
    params.logits_inner = static_cast<int32_t>(logits.size(1));
    params.element = element_of<sample::Element>(logits);
    params.logit_rows = params.rows = static_cast<int32_t>(logits.size(0) * logits.size(1));
    params.vocabulary = static_cast<int32_t>(logits.size(2));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> block_verify(
    const Tensor target_logits, const Tensor draft_ids, const Tensor known, const Tensor drafted,
    const Tensor temperature, const std::optional<Tensor> top_k, const std::optional<Tensor> top_p,
    const std::optional<Tensor> seed, const std::optional<Tensor> position, const std::optional<Tensor> revealed,
    const std::optional<Tensor> draft_logits, const std::optional<Tensor> coin, const std::optional<Tensor> residual,
    const std::optional<Tensor> banned, const std::string rule) {
    check_block_verify(check_same_device, target_logits, draft_ids, known, drafted, temperature, top_k, top_p, seed,
                       position, revealed, draft_logits, coin, residual, banned, rule);
    const int64_t batch = target_logits.size(0), length = target_logits.size(1), vocabulary = target_logits.size(2);
    const bool mrs = rule == "mrs";
    check_vocabulary(OP, "target_logits", vocabulary);
    check_rows(OP, batch * length);

    const OnDevice device(target_logits);
    const auto allocate = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
        return allocate_like(target_logits, sizes, type);
    };
    Tensor accepted = allocate({batch}, ScalarType::Int), bonus = allocate({batch}, ScalarType::Long);
    Tensor tokens = allocate({batch, length}, ScalarType::Long),
           target_ids = allocate({batch, length}, ScalarType::Long);
    Tensor prob = allocate({batch, length}, ScalarType::Float),
           draw_logprob = allocate({batch, length}, ScalarType::Float);
    const int64_t rows = batch * length, laws_bytes = rows * static_cast<int64_t>(sizeof(sample::Law));
    const int64_t scratch_bytes = sample::scratch_bytes(rows, vocabulary, top_k || top_p);
    Tensor scratch = allocate({mrs ? 2 : 1, scratch_bytes}, ScalarType::Byte);
    Tensor chosen = allocate({2, rows}, ScalarType::Int);
    Tensor laws = allocate({2, mrs ? laws_bytes : 0}, ScalarType::Byte);
    Tensor draft_tokens = allocate({mrs ? rows : 0}, ScalarType::Long);
    Tensor reached = allocate({mrs ? verify::reached_bytes(batch, vocabulary) : 0}, ScalarType::Byte);
    const auto bytes = [](Tensor& tensor, int64_t offset) {
        return static_cast<void*>(static_cast<char*>(tensor.mutable_data_ptr()) + offset);
    };

    verify::Params params{};
    params.mrs = mrs;
    params.batch = static_cast<int32_t>(batch);
    params.length = static_cast<int32_t>(length);
    params.target_rows = static_cast<int32_t*>(bytes(chosen, 0));
    params.draft_rows = params.target_rows + rows;
    params.reached = static_cast<double*>(bytes(reached, 0));
    const int64_t group = std::max<int64_t>(length, 1);
    params.draft_ids = per_row<int64_t>(draft_ids, group);
    params.known = per_row<int32_t>(known, group);
    params.drafted = per_row<int64_t>(drafted, group);
    params.coin = per_row<float>(coin, group);
    params.residual = per_row<float>(residual, group);
    params.accepted = static_cast<int32_t*>(bytes(accepted, 0));
    params.bonus = static_cast<int64_t*>(bytes(bonus, 0));
    params.tokens = static_cast<int64_t*>(bytes(tokens, 0));
    params.target_ids = static_cast<int64_t*>(bytes(target_ids, 0));
    params.prob = static_cast<float*>(bytes(prob, 0));
    params.draw_logprob = static_cast<float*>(bytes(draw_logprob, 0));

    sample::Params& target = params.target;
    set_logits(target, target_logits);
    target.row_index = params.target_rows;
    target.temperature = per_row<float>(temperature, group);
    target.top_k = per_row<int32_t>(top_k, group);
    target.top_p = per_row<float>(top_p, group);
    const auto mask = set_banned(target, banned);
    target.scratch = bytes(scratch, 0);
    target.token = params.target_ids;
    if (mrs) {
        params.draft = target;
        set_logits(params.draft, *draft_logits);
        params.draft.row_index = params.draft_rows;
        params.draft.token = static_cast<int64_t*>(bytes(draft_tokens, 0));
        params.draft.law = static_cast<sample::Law*>(bytes(laws, laws_bytes));
        params.draft.scratch = bytes(scratch, scratch_bytes);
        target.law = static_cast<sample::Law*>(bytes(laws, 0));
    } else if (seed) {
        target.seed = per_row<int64_t>(seed, group);
        target.position = per_row<int32_t>(position, group);
        target.revealed = per_row<int64_t>(revealed, group);
    }
    target.prob = params.prob;
    target.draw_logprob = params.draw_logprob;
    verify::launch_verify(params, device.stream());
    return {accepted, bonus, tokens, target_ids, prob, draw_logprob};
}

}  // namespace
}  // namespace simsd

SIMSD_CUDA_LIBRARY(m) { m.impl("block_verify", TORCH_BOX(&simsd::block_verify)); }
