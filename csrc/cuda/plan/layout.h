// The graphs, cut to the row budget of the batch, as rows of one forward: the unrolled layout. The Python definitions
// are `_fit` and `_lay_out` in plan_block/reference.py.
#pragma once

#include "common/visibility.h"
#include "cuda/device.h"
#include "cuda/plan_block.h"
#include "cuda/warp.h"

namespace simsd::plan {

// The same in all threads (block); `room` has an entry per warp.
SIMSD_DEVICE int block_sum(int value, int32_t* room) {
    value = warp_sum(value);
    block_barrier();
    if (lane_index() == 0) room[warp_index()] = value;
    block_barrier();
    int total = 0;
    for (int warp = 0; warp < thread_count() / WARP; ++warp) total += room[warp];
    return total;
}

// What the states of the whole batch cost that rank no lower than number `state` of them all (block).
SIMSD_DEVICE int cost_down_to(const Params& p, const Taken& taken, int64_t state, int32_t* room) {
    const int64_t states = static_cast<int64_t>(p.batch) * p.max_copies;
    const double score = taken.score[state];
    int cost = 0;
    for (int64_t other = thread_index(); other < states; other += thread_count()) {
        const double rival = taken.score[other];
        if (rival > score || (rival == score && other <= state)) cost += taken.cost[other];
    }
    return block_sum(cost, room);
}

// How many copies lane `b` keeps where the best-scored of the batch share p.copies (block). Scores fall along a lane,
// and what is kept of the batch is all that ranks above its first state that does not fit: so a state is kept that fits
// together with all that rank above it, and a lane is cut at its first that is not.
SIMSD_DEVICE int kept_copies(const Params& p, const Taken& taken, int64_t b, int32_t* room) {
    const int size = taken.size[b];
    if (size == 0) return 0;
    int fits = 0, too_many = size;
    for (int probe = size - 1; too_many - fits > 1; probe = (fits + too_many) / 2) {
        const bool enough = cost_down_to(p, taken, b * p.max_copies + probe, room) <= p.copies;
        (enough ? fits : too_many) = probe;
    }
    return fits + 1;
}

// One lane's rows. Everything is worked out anew for each place that is written, so nothing is written twice.
struct Layout {
    const Params& p;
    const Taken& taken;
    int64_t b, start;
    int32_t kept, cleaned, room;

    // Blocks before the current one are in the cache, `cleaned` finished ones come along, then `kept` copies, one every
    // `room` slots.
    SIMSD_DEVICE int64_t number() const { return start / p.length; }
    SIMSD_DEVICE int64_t copy(int n) const { return b * p.max_copies + n; }
    SIMSD_DEVICE int32_t moment(int n) const {
        return static_cast<int32_t>((number() + taken.block[copy(n)]) * p.stride + 1 + n);
    }
    SIMSD_DEVICE int32_t finished_moment(int block) const {
        return static_cast<int32_t>((number() + block) * p.stride + 1 + p.max_copies);
    }

    SIMSD_DEVICE void write_slot(int32_t slot) const {
        int32_t birth = INF, death = INF;
        const int32_t length = p.length;
        const int64_t within = slot - start;
        if (kept > 0 && within < 0) {
            birth = static_cast<int32_t>(slot / length * p.stride);
        } else if (within >= 0 && within < static_cast<int64_t>(cleaned) * length) {
            birth = finished_moment(static_cast<int32_t>(within) / length);
        } else if (slot >= p.scratch) {
            const int32_t behind = slot - static_cast<int32_t>(p.scratch);
            const int32_t n = behind / room, i = behind % room;
            if (n < kept && i < length) birth = death = moment(n);
        }
        p.out.birth[b * p.slots + slot] = birth;
        p.out.death[b * p.slots + slot] = death;
    }

    SIMSD_DEVICE void write_row(int32_t row, int32_t rows) const {
        const int32_t length = p.length, group = row / length, i = row % length, n = group - p.ahead;
        int64_t token = 0, position = 0, slot = -1;
        int32_t clock = -1;
        if (group < cleaned) {
            token = *p.clean.at(b, group, i);
            position = slot = start + row;
            clock = finished_moment(group);
        } else if (n >= 0 && n < kept) {
            token = taken.tokens[copy(n) * length + i];
            if (token < 0) token = p.mask_id;
            position = start + taken.block[copy(n)] * length + i;
            slot = p.scratch + n * room + i;
            clock = moment(n);
        }
        const int64_t at = b * rows + row;
        p.out.tokens[at] = token;
        p.out.positions[at] = static_cast<int32_t>(position);
        p.out.slots[at] = static_cast<int32_t>(slot);
        p.out.clock[at] = clock;
    }

    SIMSD_DEVICE void write_state(int32_t place) const {
        const int64_t at = copy(0) * p.length + place;
        const int64_t token = place / p.length < kept ? taken.tokens[at] : 0;
        p.out.states[at] = token < 0 ? 0 : token;
    }

    SIMSD_DEVICE void write_copy(int n) const {
        const bool live = n < kept;
        p.out.revealed[copy(n)] = live ? static_cast<int64_t>(taken.revealed[copy(n)]) : 0;
        p.out.block[copy(n)] = live ? taken.block[copy(n)] : -1;
        p.out.reach[copy(n)] = live ? static_cast<float>(taken.reach[copy(n)]) : 0.0f;
    }
};

}  // namespace simsd::plan
