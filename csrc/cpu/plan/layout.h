// The graphs as rows of one forward: the unrolled layout.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/copies.h"
#include "common/visibility.h"
#include "cpu/plan/draft.h"

namespace simsd::plan {

// Where everything goes. R = (K + C) * L rows: K finished blocks as drafted, then C copies.
struct Layout {
    int64_t length, ahead, max_copies, mask_id, scratch, slots, stride;
    int64_t* tokens;  // [B, R]
    int32_t *positions, *slot, *clock;
    int32_t *birth, *death;  // [B, slots]
    int64_t* states;         // [B, C, L]
    int64_t* revealed;       // [B, C]
    int32_t* block;
    int32_t* cleaned;  // [B]
    float* reach;      // [B, C]

    int64_t rows() const { return (ahead + max_copies) * length; }

    // All dead.
    void clear(int64_t batch) const {
        std::fill_n(tokens, batch * rows(), 0);
        std::fill_n(positions, batch * rows(), 0);
        std::fill_n(slot, batch * rows(), -1);
        std::fill_n(clock, batch * rows(), -1);
        std::fill_n(birth, batch * slots, INF);
        std::fill_n(death, batch * slots, INF);
        std::fill_n(states, batch * max_copies * length, 0);
        std::fill_n(revealed, batch * max_copies, 0);
        std::fill_n(block, batch * max_copies, -1);
        std::fill_n(cleaned, batch, 0);
        std::fill_n(reach, batch * max_copies, 0.0f);
    }

    // Block-sized group number `group` of rows, of the block at `position`, which writes from slot `at` on.
    void rows_at(int64_t b, int64_t group, int64_t position, int64_t at, int64_t moment, bool stays) const {
        const int64_t first = b * rows() + group * length;
        for (int64_t i = 0; i < length; ++i) {
            positions[first + i] = static_cast<int32_t>(position + i);
            slot[first + i] = static_cast<int32_t>(at + i);
            clock[first + i] = birth[b * slots + at + i] = static_cast<int32_t>(moment);
            death[b * slots + at + i] = stays ? INF : static_cast<int32_t>(moment);
        }
    }

    void write(const Lane& lane, int64_t start, const Given& given) const {
        const int64_t b = lane.index, number = start / length, room = copy_stride(length);
        for (int64_t p = 0; p < start; ++p) birth[b * slots + p] = static_cast<int32_t>(p / length * stride);
        for (int64_t n = 0; n < lane.kept; ++n) {
            const State& state = lane.growth.state(n);
            const int64_t* seen = lane.growth.tokens(n);
            const int64_t copy = b * max_copies + n, ticks = (number + state.block) * stride;
            rows_at(b, ahead + n, start + state.block * length, scratch + n * room, ticks + 1 + n, false);
            for (int64_t i = 0; i < length; ++i) {
                tokens[b * rows() + (ahead + n) * length + i] = seen[i] < 0 ? mask_id : seen[i];
                states[copy * length + i] = std::max<int64_t>(seen[i], 0);
            }
            revealed[copy] = static_cast<int64_t>(state.revealed);
            block[copy] = static_cast<int32_t>(state.block);
            reach[copy] = static_cast<float>(state.reach);
            if (state.cost < 2) continue;
            const int64_t before = state.block - 1, place = start + before * length;
            rows_at(b, before, place, place, (number + before) * stride + 1 + max_copies, true);
            for (int64_t i = 0; i < length; ++i) {
                tokens[b * rows() + before * length + i] = *given.clean.at(b, before, i);
            }
            cleaned[b] = std::max(cleaned[b], block[copy]);
        }
    }
};

}  // namespace simsd::plan
