// What the draft says of its blocks, and the growth of all lanes' graphs by it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/strided.h"
#include "cpu/plan/growth.h"
#include "cpu/vocabulary/row.h"

namespace simsd::plan {

using vocabulary::Filter;
using vocabulary::Row;
using vocabulary::Workspace;

// The statistics that the draft gave for its blocks.
struct Given {
    Strided<const int64_t, 3> clean;
    Strided<const float, 3> prob, log_odds, entropy;
    Strided<const float, 2> power;

    void read(int64_t b, int64_t block, int64_t length, Proposal& proposal) const {
        for (int64_t i = 0; i < length; ++i) {
            proposal.token[i] = *clean.at(b, block, i);
            proposal.prob[i] = *prob.at(b, block, i);
            proposal.log_odds[i] = *log_odds.at(b, block, i);
            proposal.entropy[i] = *entropy.at(b, block, i);
        }
        proposal.power = *power.at(b, block);
    }
};

// The draft's logits, from which the tokens of each state are drawn with the noise of that state.
struct Drawn {
    vocabulary::Element element;
    Strided<const char, 4> logits;  // strides in elements; `data` is of any element type
    int64_t length, ids;
    vocabulary::Banned banned;
    std::optional<Strided<const float, 1>> temperature;
    std::optional<Strided<const int32_t, 1>> top_k;
    std::optional<Strided<const float, 1>> top_p;
    std::optional<Strided<const int64_t, 1>> seed;
    Strided<const int32_t, 1> start;
    Strategy strategy;

    float heat(int64_t b) const { return temperature ? *temperature->at(b) : 0.0f; }

    // Whether all states of a block have the same draws.
    bool same_everywhere(int64_t b) const { return strategy == Strategy::sequential || !(heat(b) > 0.0f); }

    void draw(int64_t b, const State& state, int64_t i, Proposal& proposal, Workspace& work) const {
        const auto& strides = logits.strides;
        const int64_t offset = b * strides[0] + state.block * strides[1] + i * strides[2];
        const Row row{element,
                      vocabulary::row_pointer(element, logits.data, offset),
                      strides[3],
                      ids,
                      vocabulary::divisor_of(heat(b)),
                      &banned};
        Filter filter;
        if (top_k) filter.top_k = *top_k->at(b);
        if (top_p) filter.top_p = *top_p->at(b);
        NoiseKey key{};
        if (seed) key.seed = *seed->at(b);
        key.position = static_cast<int32_t>(*start.at(b) + state.block * length + i);
        key.revealed = strategy == Strategy::sequential ? 0 : static_cast<int64_t>(state.revealed);
        const auto drawn = vocabulary::draw_row(row, filter, heat(b) > 0.0f ? &key : nullptr, work);
        proposal.token[i] = drawn.token;
        proposal.prob[i] = drawn.summary.prob(drawn.x);
        proposal.log_odds[i] = drawn.summary.log_odds(drawn.token, drawn.x);
        proposal.entropy[i] = drawn.summary.entropy();
    }
};

struct Lane {
    int64_t index;
    Growth growth;
    int64_t kept = 1;
};

// Whether tokens are block `block` as the draft finishes it.
inline auto finishes(const Given& given, int64_t b, int64_t block, int64_t length) {
    return [&given, b, block, length](const int64_t* tokens) {
        for (int64_t i = 0; i < length; ++i) {
            if (tokens[i] != *given.clean.at(b, block, i)) return false;
        }
        return true;
    };
}

inline void grow(std::vector<Lane>& lanes, const Given& given, const Rules& rules, int64_t length) {
    Proposal proposal;
    for (Lane& lane : lanes) {
        Growth& growth = lane.growth;
        for (; !growth.complete(); growth.advance()) {
            if (!growth.expands()) continue;
            const int64_t block = growth.newest().block;
            given.read(lane.index, block, length, proposal);
            growth.expand(proposal, rules, finishes(given, lane.index, block, length));
        }
    }
}

// All lanes grow in step, so that the rows of all their newest states are drawn in parallel.
inline void grow(std::vector<Lane>& lanes, const Given& given, const Drawn& drawn, const Rules& rules, int64_t length,
                 int64_t ahead) {
    struct Task {
        int64_t lane, position, proposal;
    };
    std::vector<Task> tasks;
    // Per lane, one proposal for every block where its states share them, else one for the newest state.
    std::vector<Proposal> proposals(lanes.size() * ahead);
    std::vector<char> ready(lanes.size() * ahead, 0);
    const auto home = [&](int64_t n) {
        return n * ahead + (drawn.same_everywhere(lanes[n].index) ? lanes[n].growth.newest().block : 0);
    };
    for (bool growing = true; growing;) {
        growing = false;
        tasks.clear();
        for (size_t n = 0; n < lanes.size(); ++n) {
            const Growth& growth = lanes[n].growth;
            if (!growth.expands() || ready[home(n)]) continue;
            for (int64_t i = 0; i < length; ++i) {
                if (!(growth.newest().revealed & bit(i))) tasks.push_back({static_cast<int64_t>(n), i, home(n)});
            }
            // The first state of a block that comes up has the fewest positions revealed.
            ready[home(n)] = drawn.same_everywhere(lanes[n].index);
        }
        torch::stable::parallel_for(
            0, tasks.size(), vocabulary::rows_per_task(drawn.ids), [&](int64_t begin, int64_t end) {
                Workspace work;
                for (int64_t t = begin; t < end; ++t) {
                    const Task& task = tasks[t];
                    const Lane& lane = lanes[task.lane];
                    drawn.draw(lane.index, lane.growth.newest(), task.position, proposals[task.proposal], work);
                }
            });
        for (size_t n = 0; n < lanes.size(); ++n) {
            Growth& growth = lanes[n].growth;
            if (growth.complete()) continue;
            if (growth.expands()) {
                const int64_t block = growth.newest().block;
                proposals[home(n)].power = *given.power.at(lanes[n].index, block);
                growth.expand(proposals[home(n)], rules, finishes(given, lanes[n].index, block, length));
            }
            growth.advance();
            growing = true;
        }
    }
}

}  // namespace simsd::plan
