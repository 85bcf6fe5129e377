// block_verify: judges drafted blocks straight from logits [B, L, V]; no probabilities are materialised.
//
// Two phases. Every row from `known` on gets its own verdict, in parallel: one sweep of the target row (two rows for
// mrs). Then each block is walked up to its first rejection; under mrs that one row is swept again for the residual
// draw. The Python definition is block_verify/reference.py.
#include "common/arguments/block_verify.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/strided.h"
#include "cpu/vocabulary/row.h"

namespace simsd {
namespace {

constexpr const char* OP = "block_verify";

using vocabulary::Banned;
using vocabulary::BLOCK;
using vocabulary::Cutoff;
using vocabulary::Element;
using vocabulary::Filter;
using vocabulary::Kept;
using vocabulary::Row;
using vocabulary::Summary;
using vocabulary::Workspace;

struct Logits {
    Element element;
    const void* data;
    int64_t strides[3];

    Row row(int64_t b, int64_t i, int64_t vocabulary, float temperature, const Banned& banned) const {
        const void* start = vocabulary::row_pointer(element, data, b * strides[0] + i * strides[1]);
        return {element, start, strides[2], vocabulary, vocabulary::divisor_of(temperature), &banned};
    }
};

Logits read_logits(const Tensor& tensor) {
    return {
        element_of<Element>(tensor), tensor.const_data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2)}};
}

// The softmax of a row over the ids that the filter keeps.
struct Law {
    float top = 0.0f;
    float total = 1.0f;
    Cutoff cutoff;
    bool empty = true;

    float prob(float x, int64_t id) const {
        if (empty || !cutoff.keeps(x, id)) return 0.0f;
        float padded[vocabulary::CHUNK], weight[vocabulary::CHUNK];
        std::fill(padded, padded + vocabulary::CHUNK, vocabulary::NEGATIVE_INFINITY);
        padded[0] = x;
        vocabulary::kernels().weigh(padded, vocabulary::CHUNK, top, weight);
        return weight[0] / total;
    }
    // Of an id that is kept.
    float log_prob(float x) const {
        if (empty) return vocabulary::NEGATIVE_INFINITY;
        return static_cast<float>(static_cast<double>(x) - top - std::log(static_cast<double>(total)));
    }
};

Law law_of(const Row& row, const Summary& summary, const Filter& filter, Workspace& work) {
    if (summary.empty()) return {};
    const Kept kept = vocabulary::filter_row(row, summary, filter, work);
    return {summary.top, static_cast<float>(kept.total), kept.cutoff, false};
}

// Sums of the row; keeps the row in the workspace where the filter will need it.
Summary summarise(const Row& row, const Filter& filter, Workspace& work) {
    const bool filtered = filter.active(row.vocabulary);
    if (filtered) work.x.resize((row.vocabulary + BLOCK - 1) / BLOCK * BLOCK, vocabulary::NEGATIVE_INFINITY);
    return vocabulary::summarise(row, filtered ? work.x.data() : nullptr, nullptr, nullptr);
}

// One position's verdict, before the walk decides whether it counts.
struct Verdict {
    int64_t target_id;
    float target_prob;  // of target_id
    bool accept;
    float draft_prob;                     // target's, of the drafted id
    float target_logprob, draft_logprob;  // of the same two, under what the token is drawn from
    Summary summary;
    Law target, draft;  // mrs
};

// surplus[i] = max(p - q, 0), or p alone, of ids begin .. begin + count; returns their sum.
double surplus_block(const Row& p_row, const Law& p, const Row& q_row, const Law& q, bool subtract, int64_t begin,
                     float* surplus) {
    alignas(64) float x[BLOCK], weight[BLOCK];
    const int64_t count = std::min(BLOCK, p_row.vocabulary - begin);
    int64_t padded = p_row.load(begin, count, x);
    vocabulary::kernels().weigh(x, padded, p.top, weight);
    for (int64_t i = 0; i < count; ++i) surplus[i] = p.cutoff.keeps(x[i], begin + i) ? weight[i] / p.total : 0.0f;
    if (subtract && !q.empty) {
        padded = q_row.load(begin, count, x);
        vocabulary::kernels().weigh(x, padded, q.top, weight);
        for (int64_t i = 0; i < count; ++i) {
            const float q_prob = q.cutoff.keeps(x[i], begin + i) ? weight[i] / q.total : 0.0f;
            surplus[i] = std::max(surplus[i] - q_prob, 0.0f);
        }
    }
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) sum += surplus[i];
    return sum;
}

// Inverse-CDF draw from max(p - q, 0), from p where that is empty; -1 where p is too.
int64_t residual_draw(const Row& p_row, const Law& p, const Row& q_row, const Law& q, float uniform) {
    if (p.empty) return -1;
    alignas(64) float surplus[BLOCK];
    for (const bool subtract : {true, false}) {
        std::vector<double> reached;  // after each block
        double total = 0.0;
        for (int64_t begin = 0; begin < p_row.vocabulary; begin += BLOCK) {
            total += surplus_block(p_row, p, q_row, q, subtract, begin, surplus);
            reached.push_back(total);
        }
        if (!(total > 0.0)) continue;
        const double target = uniform * total;
        const int64_t block = std::upper_bound(reached.begin(), reached.end(), target) - reached.begin();
        const int64_t begin = std::min<int64_t>(block, reached.size() - 1) * BLOCK;
        surplus_block(p_row, p, q_row, q, subtract, begin, surplus);
        double mass = block > 0 ? reached[block - 1] : 0.0;
        int64_t last = -1;
        for (int64_t i = 0; i < std::min(BLOCK, p_row.vocabulary - begin); ++i) {
            if (!(surplus[i] > 0.0f)) continue;
            last = begin + i;
            mass += surplus[i];
            if (mass > target) break;
        }
        return last;
    }
    return -1;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> block_verify(
    const Tensor target_logits, const Tensor draft_ids, const Tensor known, const Tensor drafted,
    const Tensor temperature, const std::optional<Tensor> top_k, const std::optional<Tensor> top_p,
    const std::optional<Tensor> seed, const std::optional<Tensor> position, const std::optional<Tensor> revealed,
    const std::optional<Tensor> draft_logits, const std::optional<Tensor> coin, const std::optional<Tensor> residual,
    const std::optional<Tensor> banned, const std::string rule) {
    check_block_verify(check_cpu, target_logits, draft_ids, known, drafted, temperature, top_k, top_p, seed, position,
                       revealed, draft_logits, coin, residual, banned, rule);
    const int64_t batch = target_logits.size(0), length = target_logits.size(1), vocabulary = target_logits.size(2);
    const bool mrs = rule == "mrs";
    const Banned mask(banned, vocabulary);

    const Logits target = read_logits(target_logits);
    const Logits draft = draft_logits ? read_logits(*draft_logits) : target;
    const auto ids = strided_const<int64_t, 2>(draft_ids);
    const auto known_count = strided_const<int32_t, 1>(known);
    const auto drafted_set = strided_const<int64_t, 1>(drafted);
    const auto heat = strided_const<float, 1>(temperature);
    const auto filter_of = [&](int64_t b) {
        Filter filter;
        if (top_k) filter.top_k = *strided_const<int32_t, 1>(*top_k).at(b);
        if (top_p) filter.top_p = *strided_const<float, 1>(*top_p).at(b);
        return filter;
    };
    const auto is_drafted = [&](int64_t b, int64_t i) { return (*drafted_set.at(b) >> i & 1) != 0; };
    for (int64_t b = 0; b < batch; ++b) {
        const int32_t count = *known_count.at(b);
        check(count >= 0 && count <= length, OP, ": known must be in [0, ", length, "], got ", count);
        check(mrs || seed || !(*heat.at(b) > 0.0f), OP,
              ": temperature must be 0 for rule 'match' without seed, position and revealed, got ", *heat.at(b));
    }

    const auto judge = [&](int64_t b, int64_t i, Verdict& verdict, Workspace& work) {
        const Row row = target.row(b, i, vocabulary, *heat.at(b), mask);
        const Filter filter = filter_of(b);
        const bool hot = *heat.at(b) > 0.0f;
        const int64_t drafted_id = *ids.at(b, i);
        if (!mrs || !hot) {
            NoiseKey key{};
            if (seed) {
                key = {*strided_const<int64_t, 1>(*seed).at(b), *strided_const<int32_t, 2>(*position).at(b, i),
                       *strided_const<int64_t, 2>(*revealed).at(b, i)};
            }
            const auto drawn = vocabulary::draw_row(row, filter, !mrs && hot && seed ? &key : nullptr, work);
            verdict.target_id = drawn.token;
            verdict.summary = drawn.summary;
            verdict.target_prob = verdict.draft_prob = drawn.summary.prob(drawn.x);
            verdict.target_logprob = verdict.draft_logprob = drawn.logprob;
            verdict.accept = drafted_id == drawn.token;
            return;
        }
        verdict.summary = summarise(row, filter, work);
        verdict.target_id = verdict.summary.empty() ? mask.lowest_allowed() : verdict.summary.best;
        verdict.target_prob = verdict.summary.prob(verdict.summary.top);
        verdict.target_logprob = verdict.summary.empty() ? vocabulary::NEGATIVE_INFINITY : 0.0f;
        verdict.accept = false;
        if (!is_drafted(b, i)) return;
        verdict.target = law_of(row, verdict.summary, filter, work);
        const Row draft_row = draft.row(b, i, vocabulary, *heat.at(b), mask);
        verdict.draft = law_of(draft_row, summarise(draft_row, filter, work), filter, work);
        if (drafted_id < 0 || drafted_id >= vocabulary) return;
        const float x = row.at(drafted_id);
        const float p = verdict.target.prob(x, drafted_id),
                    q = verdict.draft.prob(draft_row.at(drafted_id), drafted_id);
        verdict.accept = *strided_const<float, 2>(*coin).at(b, i) * q < p;
        verdict.draft_prob = verdict.summary.prob(x);
        verdict.draft_logprob = verdict.target.log_prob(x);
    };

    std::vector<Verdict> verdicts(batch * length);
    torch::stable::parallel_for(0, batch * length, vocabulary::rows_per_task(vocabulary),
                                [&](int64_t begin, int64_t end) {
                                    Workspace work;
                                    for (int64_t index = begin; index < end; ++index) {
                                        const int64_t b = index / length, i = index % length;
                                        if (i >= *known_count.at(b)) judge(b, i, verdicts[index], work);
                                    }
                                });

    Tensor accepted = torch::stable::new_empty(target_logits, {batch}, ScalarType::Int);
    Tensor bonus = torch::stable::new_empty(target_logits, {batch}, ScalarType::Long);
    Tensor tokens = torch::stable::new_empty(target_logits, {batch, length}, ScalarType::Long);
    Tensor target_ids = torch::stable::empty_like(tokens);
    Tensor prob = torch::stable::new_empty(target_logits, {batch, length}, ScalarType::Float);
    Tensor draw_logprob = torch::stable::empty_like(prob);
    int32_t* accepted_out = static_cast<int32_t*>(accepted.mutable_data_ptr());
    int64_t* bonus_out = static_cast<int64_t*>(bonus.mutable_data_ptr());
    int64_t* tokens_out = static_cast<int64_t*>(tokens.mutable_data_ptr());
    int64_t* target_ids_out = static_cast<int64_t*>(target_ids.mutable_data_ptr());
    float* prob_out = static_cast<float*>(prob.mutable_data_ptr());
    float* logprob_out = static_cast<float*>(draw_logprob.mutable_data_ptr());

    const auto walk = [&](int64_t b) {
        accepted_out[b] = 0;
        bonus_out[b] = -1;
        bool stopped = false;
        for (int64_t i = 0; i < length; ++i) {
            const int64_t at = b * length + i;
            if (i < *known_count.at(b)) {
                tokens_out[at] = target_ids_out[at] = *ids.at(b, i);
                prob_out[at] = 1.0f;
                logprob_out[at] = 0.0f;
                continue;
            }
            const Verdict& verdict = verdicts[at];
            target_ids_out[at] = verdict.target_id;
            prob_out[at] = verdict.target_prob;
            logprob_out[at] = verdict.target_logprob;
            if (stopped) {
                tokens_out[at] = -1;
            } else if (!is_drafted(b, i)) {
                tokens_out[at] = verdict.target_id;
            } else if (verdict.accept) {
                tokens_out[at] = *ids.at(b, i);
                prob_out[at] = verdict.draft_prob;
                logprob_out[at] = verdict.draft_logprob;
                ++accepted_out[b];
            } else {
                stopped = true;
                int64_t token = verdict.target_id;
                if (mrs && *heat.at(b) > 0.0f) {
                    const Row p_row = target.row(b, i, vocabulary, *heat.at(b), mask);
                    const Row q_row = draft.row(b, i, vocabulary, *heat.at(b), mask);
                    const float uniform = *strided_const<float, 1>(*residual).at(b);
                    const int64_t drawn = residual_draw(p_row, verdict.target, q_row, verdict.draft, uniform);
                    if (drawn >= 0) {
                        token = drawn;
                        prob_out[at] = verdict.summary.prob(p_row.at(drawn));
                        logprob_out[at] = verdict.target.log_prob(p_row.at(drawn));
                    }
                }
                tokens_out[at] = bonus_out[b] = token;
            }
        }
    };
    torch::stable::parallel_for(0, batch, vocabulary::rows_per_task(vocabulary), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) walk(b);
    });
    return {accepted, bonus, tokens, target_ids, prob, draw_logprob};
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("block_verify", TORCH_BOX(&simsd::block_verify)); }
