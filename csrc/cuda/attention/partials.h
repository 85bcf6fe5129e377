// Where the results of parts of the keys wait to be added up, and which parts there are.
#pragma once

#include "cuda/attention/block.h"

namespace simsd::intervals {

// The plan's list, cut so that blocks which take it in turns end together: what fills whole rounds is taken a key group
// at a time, which leaves the fewest partial results; what is left, split by split.
struct Parts {
    int listed, whole;  // key groups of row tiles: all that are live, those that are not cut

    SIMSD_DEVICE Parts(const Params& p, int slices) : listed(*p.plan.listed) {
        const int of_each = p.kv_heads * slices;
        whole = listed * of_each / p.blocks * p.blocks / of_each;
    }

    // Their number, and of the group at `place` in the list the (first) one.
    SIMSD_DEVICE int count() const { return whole + (listed - whole) * GROUP_SPLITS; }
    SIMSD_DEVICE int first_of(int place) const {
        return place < whole ? place : whole + (place - whole) * GROUP_SPLITS;
    }
};

// At most: a round's worth is cut.
inline int64_t most_parts(const Params& p, int slices) {
    const int64_t listed = p.plan.count, cut = p.blocks / (static_cast<int64_t>(p.kv_heads) * slices) + 1;
    return listed + (GROUP_SPLITS - 1) * (listed < cut ? listed : cut);
}

struct Partials {
    float* max;  // [parts, Hkv, rows of a tile]
    float* sum;  // [parts, Hkv, rows of a tile]; where it is 0 the row saw nothing, and `out` is not written
    float* out;  // [parts, Hkv, rows of a tile, padded D]

    SIMSD_ANYWHERE explicit Partials(const Params& p) {
        const int64_t count = p.parts * p.kv_heads * rows(p);
        max = p.scratch;
        sum = max + count;
        out = max + (2 * count + 3) / 4 * 4;
    }
    SIMSD_ANYWHERE static int rows(const Params& p) {
        const int all = p.group * p.q_rows;
        return all < p.plan.tile_rows ? all : p.plan.tile_rows;
    }
    SIMSD_ANYWHERE static int64_t floats(const Params& p, int padded_dim) {
        return p.parts * p.kv_heads * rows(p) * (padded_dim + 2) + 3;
    }
};

SIMSD_DEVICE int64_t partial_row(const Params& p, int part, int kv_head, int row) {
    return (static_cast<int64_t>(part) * p.kv_heads + kv_head) * Partials::rows(p) + row;
}

}  // namespace simsd::intervals
