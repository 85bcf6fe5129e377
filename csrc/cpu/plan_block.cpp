// plan_block: from drafted blocks to the rows of one exact verification forward. Checks, growth of every lane's graph
// (plan/draft.h), the cut to the row budget, layout (plan/layout.h). The Python definition is plan_block/reference.py.
#include "common/arguments/plan_block.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/strided.h"
#include "cpu/allocate.h"
#include "cpu/plan/draft.h"
#include "cpu/plan/layout.h"
#include "cpu/reveal.h"
#include "cpu/vocabulary/row.h"

namespace simsd {
namespace {

constexpr const char* OP = "plan_block";

using plan::Drawn;
using plan::Given;
using plan::Growth;
using plan::Lane;
using plan::Layout;
using plan::State;

// Cuts the graphs to the best-scored `copies` (roots aside) of the whole batch.
void fit(std::vector<Lane>& lanes, int64_t copies) {
    struct Ranked {
        double score;
        int64_t lane, n;
        int32_t cost;
    };
    int64_t wanted = 0;
    for (Lane& lane : lanes) {
        lane.kept = lane.growth.size();
        for (int64_t n = 1; n < lane.kept; ++n) wanted += lane.growth.state(n).cost;
    }
    if (wanted <= copies) return;
    std::vector<Ranked> ranked;
    for (size_t b = 0; b < lanes.size(); ++b) {
        for (int64_t n = 1; n < lanes[b].kept; ++n) {
            const State& state = lanes[b].growth.state(n);
            ranked.push_back({state.score, static_cast<int64_t>(b), n, state.cost});
        }
        lanes[b].kept = 1;
    }
    std::sort(ranked.begin(), ranked.end(), [](const Ranked& a, const Ranked& b) {
        return std::make_tuple(-a.score, a.lane, a.n) < std::make_tuple(-b.score, b.lane, b.n);
    });
    for (const Ranked& next : ranked) {
        if (next.cost > copies) break;
        copies -= next.cost;
        lanes[next.lane].kept = next.n + 1;
    }
}

template <typename T>
std::optional<Strided<const T, 1>> view(const std::optional<Tensor>& tensor) {
    return tensor ? std::optional(strided_const<T, 1>(*tensor)) : std::nullopt;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs plan_block(const Tensor tokens, const Tensor revealed, const Tensor start, const Tensor step,
                   const Tensor blocks_left, const Tensor clean, const Tensor depth, const Tensor prob,
                   const Tensor log_odds, const Tensor entropy, const Tensor trust, const Tensor power,
                   const std::optional<Tensor> draft_logits, const std::optional<Tensor> temperature,
                   const std::optional<Tensor> top_k, const std::optional<Tensor> top_p,
                   const std::optional<Tensor> seed, const std::optional<Tensor> banned_ids, const Tensor schedule,
                   const std::string strategy_name, double threshold, double floor, int64_t mask_id, int64_t max_copies,
                   int64_t max_rows, int64_t scratch, int64_t slots, int64_t stride) {
    const auto [batch, length, ahead] =
        check_plan_block(check_cpu, tokens, revealed, start, step, blocks_left, clean, depth, prob, log_odds, entropy,
                         trust, power, draft_logits, temperature, top_k, top_p, seed, banned_ids, schedule, threshold,
                         floor, max_copies, max_rows, scratch, slots, stride);
    const Strategy strategy = parse_strategy(OP, strategy_name);

    const auto begins = strided_const<int32_t, 1>(start), so_far = strided_const<int32_t, 1>(step),
               left = strided_const<int32_t, 1>(blocks_left), depths = strided_const<int32_t, 1>(depth);
    const auto current = strided_const<int64_t, 2>(tokens);
    const auto sets = strided_const<int64_t, 1>(revealed);
    const auto trusted = strided_const<float, 1>(trust);
    std::vector<Lane> lanes;
    lanes.reserve(batch);
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t first = *begins.at(b), blocks = *left.at(b);
        check(*depths.at(b) >= 0 && *depths.at(b) <= ahead, OP, ": depth must be in [0, ", ahead, "], got ",
              *depths.at(b));
        if (first < 0) continue;
        check(first + std::max<int64_t>(blocks, 1) * length <= scratch, OP,
              ": blocks_left must be such that the last block ends by slot ", scratch, ", got ", blocks, " from slot ",
              first, " on");
        const plan::Limits limits{*depths.at(b), blocks, max_copies, *trusted.at(b), floor};
        const State root{0, static_cast<uint64_t>(*sets.at(b)) & full_set(length), *so_far.at(b), 1.0};
        int64_t known[MAX_BLOCK_LENGTH];
        for (int64_t i = 0; i < length; ++i) known[i] = root.revealed & bit(i) ? *current.at(b, i) : -1;
        lanes.push_back({b, Growth(length, limits, root, known)});
    }
    const Given statistics{strided_const<int64_t, 3>(clean), strided_const<float, 3>(prob),
                           strided_const<float, 3>(log_odds), strided_const<float, 3>(entropy),
                           strided_const<float, 2>(power)};
    // The bar that `reveal` compares float32 probabilities with.
    if (strategy == Strategy::low_confidence_dynamic) threshold = static_cast<float>(threshold);
    const plan::Rules rules{{strided_const<int32_t, 1>(schedule), schedule.size(0)}, strategy, threshold};
    if (draft_logits) {
        const Drawn drawn{element_of<vocabulary::Element>(*draft_logits),
                          strided_const<char, 4>(*draft_logits),
                          length,
                          draft_logits->size(3),
                          vocabulary::read_banned(OP, banned_ids, draft_logits->size(3)),
                          view<float>(temperature),
                          view<int32_t>(top_k),
                          view<float>(top_p),
                          view<int64_t>(seed),
                          begins,
                          strategy};
        grow(lanes, statistics, drawn, rules, length, ahead);
    } else {
        grow(lanes, statistics, rules, length);
    }
    fit(lanes, max_rows / length);

    const int64_t rows = (ahead + max_copies) * length;
    Outputs out{allocate({batch, rows}, ScalarType::Long),
                allocate({batch, rows}, ScalarType::Int),
                allocate({batch, rows}, ScalarType::Int),
                allocate({batch, rows}, ScalarType::Int),
                allocate({batch, slots}, ScalarType::Int),
                allocate({batch, slots}, ScalarType::Int),
                allocate({batch, max_copies, length}, ScalarType::Long),
                allocate({batch, max_copies}, ScalarType::Long),
                allocate({batch, max_copies}, ScalarType::Int),
                allocate({batch}, ScalarType::Int),
                allocate({batch, max_copies}, ScalarType::Float)};
    const auto ints = [](Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); };
    const auto longs = [](Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); };
    const Layout layout{length,
                        ahead,
                        max_copies,
                        mask_id,
                        scratch,
                        slots,
                        stride,
                        longs(std::get<0>(out)),
                        ints(std::get<1>(out)),
                        ints(std::get<2>(out)),
                        ints(std::get<3>(out)),
                        ints(std::get<4>(out)),
                        ints(std::get<5>(out)),
                        longs(std::get<6>(out)),
                        longs(std::get<7>(out)),
                        ints(std::get<8>(out)),
                        ints(std::get<9>(out)),
                        static_cast<float*>(std::get<10>(out).mutable_data_ptr())};
    layout.clear(batch);
    for (const Lane& lane : lanes) layout.write(lane, *begins.at(lane.index), statistics);
    return out;
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("plan_block", TORCH_BOX(&simsd::plan_block)); }
