// block_verify.graph: walks the target's own path through the drafted states of its blocks, from logits [N, V].
//
// All lanes walk in step: each round draws the masked positions of the states that the lanes stand at, in parallel over
// (lane, position), then moves every lane on. A copy that no walk visits costs nothing. The output row of the block
// that a lane is in doubles as its current state. The Python definition is block_verify/graph_reference.py.
#include "common/arguments/graph_verify.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/strided.h"
#include "cpu/allocate.h"
#include "cpu/reveal.h"
#include "cpu/vocabulary/row.h"

namespace simsd {
namespace {

constexpr const char* OP = "block_verify.graph";
constexpr int32_t DENOISED = 1, DRAFTED = 2;  // origin
constexpr int64_t PROGRESS = 7;

using vocabulary::Filter;
using vocabulary::Row;
using vocabulary::Workspace;

// The draft graph, as plan_block lays it out, and what the draft proposed.
struct Graph {
    Strided<const int32_t, 3> rows;
    Strided<const int64_t, 3> states, clean;
    Strided<const int64_t, 2> revealed;
    Strided<const int32_t, 2> block;
    Strided<const int32_t, 1> cleaned, depth;
    int64_t copies, ahead, length;

    uint64_t set(int64_t b, int64_t c) const { return static_cast<uint64_t>(*revealed.at(b, c)) & full_set(length); }
};

// Outputs, contiguous [B, K + 2, L].
struct Text {
    int64_t* tokens;
    int32_t* steps;
    float* prob;
    int32_t* origin;
};

// Where one lane is.
struct Walk {
    bool alive;
    int64_t at = 0;     // copy
    int64_t block = 0;  // number of the block
    int64_t step;
    uint64_t revealed;
    int32_t last = -1;
    int32_t finished = 0, committed = 0, taken = 0, judged = 0, accepted = 0;
};

// One position's draw at one state.
struct Task {
    int64_t lane, position, row;
};

// What the target draws at the states that the lanes stand at, by lane and position.
struct Actions {
    std::vector<int64_t> token;
    std::vector<float> prob, log_odds, entropy;

    explicit Actions(int64_t size) : token(size), prob(size), log_odds(size), entropy(size) {}

    Statistics of(int64_t offset) const {
        return {{prob.data() + offset, {1}}, {log_odds.data() + offset, {1}}, {entropy.data() + offset, {1}}};
    }
};

// The copy of the state that the lane is in: the first with the same block, set and revealed tokens; -1: none.
int64_t find(const Graph& graph, int64_t b, const Walk& walk, const int64_t* tokens) {
    for (int64_t c = 0; c < graph.copies; ++c) {
        if (*graph.block.at(b, c) != walk.block || graph.set(b, c) != walk.revealed) continue;
        int64_t i = 0;
        while (i < graph.length && (!(walk.revealed & bit(i)) || *graph.states.at(b, c, i) == tokens[i])) ++i;
        if (i == graph.length) return c;
    }
    return -1;
}

// Reveals `chosen` in lane b and goes on to the next copy, or ends the walk.
void advance(const Graph& graph, int64_t b, uint64_t chosen, const Actions& actions, const Text& text, Walk& walk) {
    const int64_t length = graph.length;
    const int64_t current = (b * (graph.ahead + 2) + walk.block) * length, drawn = b * length;
    const bool proposed = walk.block < std::min<int64_t>(*graph.depth.at(b), graph.ahead);
    for (int64_t i = 0; i < length; ++i) {
        if (!(chosen & bit(i))) continue;
        const int64_t token = actions.token[drawn + i];
        text.tokens[current + i] = token;
        text.steps[current + i] = static_cast<int32_t>(walk.step + 1);
        text.prob[current + i] = actions.prob[drawn + i];
        text.origin[current + i] = walk.at == 0 ? DENOISED : DRAFTED;
        walk.judged += proposed;
        walk.accepted += proposed && token == *graph.clean.at(b, walk.block, i);
    }
    walk.revealed |= chosen;
    walk.last = static_cast<int32_t>(walk.at);
    ++walk.taken;
    ++walk.step;
    if (walk.revealed == full_set(length)) {
        // Rows of the next block saw this one as drafted: only then are they this walk's.
        bool held = walk.block < std::min<int64_t>(*graph.cleaned.at(b), graph.ahead);
        for (int64_t i = 0; held && i < length; ++i) {
            held = text.tokens[current + i] == *graph.clean.at(b, walk.block, i);
        }
        ++walk.finished;
        walk.committed += held;
        ++walk.block;
        walk.revealed = 0;
        walk.step = 0;
        if (!held) {
            walk.alive = false;
            return;
        }
    }
    walk.at = find(graph, b, walk, text.tokens + (b * (graph.ahead + 2) + walk.block) * length);
    walk.alive = walk.at >= 0;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> block_verify_graph(
    const Tensor target_logits, const Tensor rows, const Tensor states, const Tensor revealed, const Tensor block,
    const Tensor clean, const Tensor cleaned, const Tensor depth, const Tensor start, const Tensor step,
    const Tensor step_map, const Tensor prob, const Tensor origin, const Tensor temperature,
    const std::optional<Tensor> top_k, const std::optional<Tensor> top_p, const std::optional<Tensor> seed,
    const std::optional<Tensor> banned_ids, const Tensor schedule, const std::string strategy_name, double threshold) {
    const auto [count, vocabulary, batch, copies, length, ahead] =
        check_graph_verify(check_cpu, target_logits, rows, states, revealed, block, clean, cleaned, depth, start, step,
                           step_map, prob, origin, temperature, top_k, top_p, seed, banned_ids, schedule);
    const auto element = element_of<vocabulary::Element>(target_logits);
    const auto banned = vocabulary::read_banned(OP, banned_ids, vocabulary);
    const Strategy strategy = parse_strategy(OP, strategy_name);
    const auto heat = strided_const<float, 1>(temperature);
    for (int64_t b = 0; b < batch; ++b) {
        check(seed || !(*heat.at(b) > 0.0f), OP, ": temperature must be 0 without seed, got ", *heat.at(b));
    }

    Tensor progress = allocate({batch, PROGRESS}, ScalarType::Int);
    Tensor set_out = allocate({batch}, ScalarType::Long);
    Tensor tokens_out = allocate({batch, ahead + 2, length}, ScalarType::Long);
    Tensor steps_out = allocate({batch, ahead + 2, length}, ScalarType::Int);
    Tensor prob_out = allocate({batch, ahead + 2, length}, ScalarType::Float);
    Tensor origin_out = allocate({batch, ahead + 2, length}, ScalarType::Int);
    const Text text{
        static_cast<int64_t*>(tokens_out.mutable_data_ptr()), static_cast<int32_t*>(steps_out.mutable_data_ptr()),
        static_cast<float*>(prob_out.mutable_data_ptr()), static_cast<int32_t*>(origin_out.mutable_data_ptr())};
    const int64_t size = batch * (ahead + 2) * length;
    std::fill(text.tokens, text.tokens + size, 0);
    std::fill(text.steps, text.steps + size, 0);
    std::fill(text.prob, text.prob + size, 1.0f);
    std::fill(text.origin, text.origin + size, 0);

    const Graph graph{strided_const<int32_t, 3>(rows),
                      strided_const<int64_t, 3>(states),
                      strided_const<int64_t, 3>(clean),
                      strided_const<int64_t, 2>(revealed),
                      strided_const<int32_t, 2>(block),
                      strided_const<int32_t, 1>(cleaned),
                      strided_const<int32_t, 1>(depth),
                      copies,
                      ahead,
                      length};
    const auto first_step = strided_const<int32_t, 1>(step), begins = strided_const<int32_t, 1>(start);
    const auto step_so_far = strided_const<int32_t, 2>(step_map), origin_so_far = strided_const<int32_t, 2>(origin);
    const auto prob_so_far = strided_const<float, 2>(prob);
    const Schedule counts{strided_const<int32_t, 1>(schedule), schedule.size(0)};

    const bool nothing = copies == 0 || length == 0;
    std::vector<Walk> walks(batch);
    for (int64_t b = 0; b < batch; ++b) {
        Walk& walk = walks[b];
        walk.alive = !nothing && *graph.block.at(b, 0) >= 0;
        walk.step = nothing ? 0 : *first_step.at(b);
        walk.revealed = nothing ? 0 : graph.set(b, 0);
        for (int64_t i = 0; !nothing && i < length; ++i) {
            const int64_t at = b * (ahead + 2) * length + i;
            if (walk.revealed & bit(i)) text.tokens[at] = *graph.states.at(b, 0, i);
            text.steps[at] = *step_so_far.at(b, i);
            text.prob[at] = *prob_so_far.at(b, i);
            text.origin[at] = *origin_so_far.at(b, i);
        }
    }

    Actions actions(batch * length);
    const void* data = target_logits.const_data_ptr();
    const int64_t row_stride = target_logits.stride(0), id_stride = target_logits.stride(1);
    const auto draw = [&](const Task& task, Workspace& work) {
        const int64_t b = task.lane, at = walks[b].at;
        const Row row{element,
                      vocabulary::row_pointer(element, data, task.row * row_stride),
                      id_stride,
                      vocabulary,
                      vocabulary::divisor_of(*heat.at(b)),
                      &banned};
        Filter filter;
        if (top_k) filter.top_k = *strided_const<int32_t, 1>(*top_k).at(b);
        if (top_p) filter.top_p = *strided_const<float, 1>(*top_p).at(b);
        NoiseKey key{};
        if (*heat.at(b) > 0.0f) {
            key.seed = *strided_const<int64_t, 1>(*seed).at(b);
            key.position = static_cast<int32_t>(*begins.at(b) + *graph.block.at(b, at) * length + task.position);
            key.revealed = strategy == Strategy::sequential ? 0 : static_cast<int64_t>(graph.set(b, at));
        }
        const auto drawn = vocabulary::draw_row(row, filter, *heat.at(b) > 0.0f ? &key : nullptr, work);
        const int64_t out = b * length + task.position;
        actions.token[out] = drawn.token;
        actions.prob[out] = drawn.summary.prob(drawn.x);
        actions.log_odds[out] = drawn.summary.log_odds(drawn.token, drawn.x);
        actions.entropy[out] = drawn.summary.entropy();
    };

    // A step that reveals nothing leaves a walk at its copy, so the rounds are bounded here and not by the graph.
    std::vector<Task> tasks;
    tasks.reserve(batch * length);
    for (int64_t round = 0; round < copies; ++round) {
        tasks.clear();
        bool walking = false;
        for (int64_t b = 0; b < batch; ++b) {
            Walk& walk = walks[b];
            walk.alive = walk.alive && walk.step >= 0 && walk.step < counts.steps;
            walking = walking || walk.alive;
            for (int64_t i = 0; walk.alive && i < length; ++i) {
                if (walk.revealed & bit(i)) continue;
                const int64_t row = *graph.rows.at(b, walk.at, i);
                check(row >= 0 && row < count, OP, ": rows must be in [0, ", count,
                      ") at masked positions of copies that the walk visits, got ", row);
                tasks.push_back({b, i, row});
            }
        }
        if (!walking) break;
        torch::stable::parallel_for(0, tasks.size(), vocabulary::rows_per_task(vocabulary),
                                    [&](int64_t begin, int64_t end) {
                                        Workspace work;
                                        for (int64_t n = begin; n < end; ++n) draw(tasks[n], work);
                                    });
        for (int64_t b = 0; b < batch; ++b) {
            Walk& walk = walks[b];
            if (!walk.alive) continue;
            const uint64_t chosen =
                reveal_set(strategy, walk.revealed, length, walk.step, counts, actions.of(b * length), threshold);
            advance(graph, b, chosen, actions, text, walk);
        }
    }

    int32_t* progress_data = static_cast<int32_t*>(progress.mutable_data_ptr());
    int64_t* sets = static_cast<int64_t*>(set_out.mutable_data_ptr());
    for (int64_t b = 0; b < batch; ++b) {
        const Walk& walk = walks[b];
        const int32_t line[PROGRESS] = {
            walk.finished, walk.committed, walk.taken, walk.last, static_cast<int32_t>(walk.step),
            walk.judged,   walk.accepted};
        std::copy(line, line + PROGRESS, progress_data + b * PROGRESS);
        sets[b] = static_cast<int64_t>(walk.revealed);
    }
    return {progress, set_out, tokens_out, steps_out, prob_out, origin_out};
}

}  // namespace
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("block_verify.graph", TORCH_BOX(&simsd::block_verify_graph)); }
