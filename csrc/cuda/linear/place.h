// What a block of a product's kernel finds to do.
#pragma once

#include "cuda/device.h"
#include "cuda/linear/params.h"

namespace simsd::linear {
namespace {

constexpr int WARPS = 8;  // of a block

// The rows of x and the weight that a block multiplies.
struct Place {
    int64_t row, end;                     // its first row; rows from `end` on are another's
    int64_t column_tile;                  // which of the columns' tiles
    int64_t weight_offset, scale_offset;  // in elements
};

// Row tiles of one weight tile are neighbours.
template <int TILE>
SIMSD_DEVICE Place place_of(const Params& p) {
    return {static_cast<int64_t>(block_x() % p.row_tiles) * TILE, p.rows, block_x() / p.row_tiles, 0, 0};
}

// As above, over the row tiles of all experts in turn; without rows where there are fewer tiles than the grid has room
// for. Every warp finds the block's expert for itself: a lane counts the tiles of some neighbouring experts. Warp.
template <int TILE>
SIMSD_DEVICE Place place_of(const GroupedParams& p) {
    const int tile = block_x() % p.row_tiles, share = (p.experts + WARP - 1) / WARP;
    const int first = lane_index() * share, last = first + share < p.experts ? first + share : p.experts;
    const auto offset = [&](int expert) { return p.offsets[expert * p.offsets_stride]; };
    const auto tiles_of = [&](int expert) { return (offset(expert + 1) - offset(expert) + TILE - 1) / TILE; };
    int tiles = 0;
#pragma unroll 4
    for (int expert = first; expert < last; ++expert) tiles += tiles_of(expert);
    int until = tiles;  // of this lane's experts and all before them
#pragma unroll
    for (int delta = 1; delta < WARP; delta *= 2) {
        const int before = shuffle_up(until, delta);
        if (lane_index() >= delta) until += before;
    }
    const int owner = lowest_bit(ballot(until > tile));
    if (owner < 0) return {};
    int expert = first, row = 0, end = 0;
    if (lane_index() == owner) {
        int before = until - tiles;
        for (; tile >= before + tiles_of(expert); ++expert) before += tiles_of(expert);
        row = offset(expert) + (tile - before) * TILE;
        end = offset(expert + 1);
        expect(row >= 0 && end <= p.rows, "grouped_linear: offsets must run from 0 to M and not decrease");
    }
    expert = shuffle(expert, owner);
    return {shuffle(row, owner), shuffle(end, owner), block_x() / p.row_tiles, expert * p.expert_stride,
            expert * p.scale_expert_stride};
}

}  // namespace
}  // namespace simsd::linear
