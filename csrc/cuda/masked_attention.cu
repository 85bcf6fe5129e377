// masked_attention: which kernel serves a call, and the one that adds up the partial results of few rows.
//
// A row's bits depend on its own visible keys and their places alone. Key groups (2048 keys), splits (256) and tiles
// (32) are constants; a warp goes over all keys of a split for its 16 rows by itself, whichever kernel it belongs to
// and however many warps share the loads; splits are added to their key group and key groups to each other in ascending
// order; what a row does not see weighs exactly zero. So the choice below may depend on the GPU.
#include <cmath>

#include "cuda/attention/partials.h"
#include "cuda/launch.h"

namespace simsd::intervals {
namespace {

constexpr int WARPS = 4;
constexpr int PER_LANE = 4;     // columns
constexpr int MANY_ROWS = 256;  // whose partial results would be more bytes than K and V

struct alignas(8) Words {
    uint32_t low, high;
};

struct Sum {
    float max = NOTHING, sum = 0.0f, out[PER_LANE] = {};

    SIMSD_DEVICE void add(float added_max, float added_sum, const float (&added)[PER_LANE]) {
        if (added_sum == 0.0f) return;
        const Rescale by = rescale(max, added_max);
        max = by.max;
        sum = merged(by, sum, added_sum);
#pragma unroll
        for (int n = 0; n < PER_LANE; ++n) out[n] = merged(by, out[n], added[n]);
    }
};

// A warp per row and 128 columns. Bytes: all partial results once, 16 to a lane, 16 of them on their way at a time;
// those of a row that saw nothing of a part, too, since waiting to know that would cost more.
template <typename T, int DIM>
__global__ void __launch_bounds__(WARPS* WARP) combine_parts(const Params p) {
    constexpr int COLUMNS = DIM < 128 ? DIM : 128, AT_ONCE = 16, GROUPS = WARP / GROUP_SPLITS;
    const Plan& plan = p.plan;
    const Parts parts(p, Head<DIM>::SLICES);
    const Partials from(p);
    const int row_count = p.group * p.q_rows, lane = lane_index(), most = plan.tile_rows;
    int64_t rest = static_cast<int64_t>(block_x()) * WARPS + warp_index();
    const int column = static_cast<int>(rest % (DIM / COLUMNS)) * COLUMNS + lane * PER_LANE;
    rest /= DIM / COLUMNS;
    const int row = static_cast<int>(rest % row_count), kv_head = static_cast<int>(rest / row_count % p.kv_heads);
    const int batch = static_cast<int>(rest / row_count / p.kv_heads);
    if (batch >= p.batch) return;
    const bool loads = lane * PER_LANE < COLUMNS;

    Sum key_group, total;
    int current = 0;
    for (int first = 0; first < plan.key_groups; first += GROUPS) {
        // A lane per split; the first of them stands for a key group that was not cut.
        const int mine = first + lane / GROUP_SPLITS, split = lane % GROUP_SPLITS;
        int part = -1;
        if (mine < plan.key_groups) {
            constexpr int SPLITS = WINDOW / SPLIT, TILES = SPLIT / TILE;
            const int at = (batch * plan.key_groups + mine) * plan.row_tiles + row / most, place = plan.place[at];
            const uint32_t live = plan.bits[2 * at + split / SPLITS].live >> split % SPLITS * TILES;
            const bool cut = place >= parts.whole;
            const bool exists = cut ? (live & ((1u << TILES) - 1)) != 0 : place >= 0 && split == 0;
            if (exists) part = parts.first_of(place) + (cut ? split : 0);
        }
        float my_max = NOTHING, my_sum = 0.0f;
        const int64_t my_row = partial_row(p, part, kv_head, row % most);
        if (part >= 0) {
            my_max = load_global(from.max + my_row);
            my_sum = load_global(from.sum + my_row);
        }
        for (uint32_t left = ballot(part >= 0); left != 0;) {
            Bytes16 added[AT_ONCE];
            int lanes[AT_ONCE], count = 0;
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                lanes[i] = left ? lowest_bit(left) : 0;
                const int64_t at = shuffle(my_row, lanes[i]);
                added[i] = {};
                if (left && loads) added[i] = load_16(from.out + at * DIM + column);
                count += left != 0;
                left &= left - 1;
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const float added_max = shuffle(my_max, lanes[i]), added_sum = shuffle(my_sum, lanes[i]);
                if (i >= count) continue;
                if (first + lanes[i] / GROUP_SPLITS != current) {
                    total.add(key_group.max, key_group.sum, key_group.out);
                    key_group = {};
                    current = first + lanes[i] / GROUP_SPLITS;
                }
                float values[PER_LANE];
#pragma unroll
                for (int n = 0; n < PER_LANE; ++n) values[n] = bits_as_float(added[i].words[n]);
                key_group.add(added_max, added_sum, values);
            }
        }
    }
    total.add(key_group.max, key_group.sum, key_group.out);
    if (!loads) return;
    const Rows rows = locate_rows(p, batch, kv_head, row, 1);
    T* to = static_cast<T*>(p.out) + out_offset(p, rows, row) + column;
    const float inverse = inverse_of(total.sum);
    T out[PER_LANE];
#pragma unroll
    for (int n = 0; n < PER_LANE; ++n) out[n] = from_float<T>(quotient(total.out[n], total.sum, inverse));
    if (p.dim % PER_LANE == 0) {
        if (column < p.dim) *reinterpret_cast<Words*>(to) = {pack(out[0], out[1]), pack(out[2], out[3])};
    } else {
#pragma unroll
        for (int n = 0; n < PER_LANE; ++n) {
            if (column + n < p.dim) to[n] = out[n];
        }
    }
}

bool copies_whole_chunks(const void* data, const int64_t (&strides)[4], int dim) {
    bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[3] == 1 && dim % CHUNK == 0;
    for (int axis = 0; axis < 3; ++axis) fits = fits && strides[axis] % CHUNK == 0;
    return fits;
}

}  // namespace

int64_t prepare(Params& p, Element element, int multiprocessors) {
    if (element == Element::float32) return 0;
    int64_t floats = 0;
    with_shape(element, p.dim, [&]<typename T, int DIM>() {
        using Shape = Head<DIM>;
        const Plan& plan = p.plan;
        const int64_t rows = static_cast<int64_t>(p.group) * p.q_rows, of_each = p.kv_heads * Shape::SLICES;
        const int64_t walkers = p.batch * of_each * plan.row_tiles;
        p.warps = rows <= 2 * WARP_ROWS ? 2 : plan.tile_rows / WARP_ROWS;
        // Walking leaves no partial results but unequal work, which does not matter within a key group. Of many rows
        // they would be the larger part of the bytes, so half the blocks will do.
        p.walks = p.keys <= SPLIT || (rows > MANY_ROWS ? 2 * walkers >= multiprocessors
                                                       : plan.key_groups == 1 && walkers >= multiprocessors);
        if (p.walks) {
            floats = walk_floats(p, Shape::COLUMNS, walkers);
            return;
        }
        const int64_t resident = static_cast<int64_t>(MOST_WARPS / p.warps) * multiprocessors;
        p.blocks = static_cast<int32_t>(smaller(resident, GROUP_SPLITS * plan.count * of_each));
        p.parts = most_parts(p, Shape::SLICES);
        floats = Partials::floats(p, DIM);
    });
    return floats;
}

void launch_combine(const Params& p, Element element, Stream stream) {
    with_shape(element, p.dim, [&]<typename T, int DIM>() {
        const int64_t warps = static_cast<int64_t>(p.batch) * p.kv_heads * p.group * p.q_rows * (DIM > 128 ? 2 : 1);
        launch("masked_attention", combine_parts<T, DIM>, {(warps + WARPS - 1) / WARPS}, WARPS * WARP, 0, stream, p);
    });
}

void launch_attention(const Params& params, Element element, bool planned, Stream stream) {
    if (element == Element::float32) return launch_float(params, stream);
    Params p = params;
    if (!planned) launch_plan("masked_attention", p, !p.walks, stream);
    p.copy_q = copies_whole_chunks(p.q, p.q_strides, p.dim);
    p.copy_kv = copies_whole_chunks(p.k, p.k_strides, p.dim) && copies_whole_chunks(p.v, p.v_strides, p.dim);
    p.k_row_bytes = static_cast<int32_t>(2 * p.k_strides[2]);
    p.v_row_bytes = static_cast<int32_t>(2 * p.v_strides[2]);
    // Of a positive scale the greatest score is the greatest product's, and that of an unseen key stays -infinity.
    p.negated = p.scale < 0.0f;
    p.scale = p.scale == 0.0f ? 0x1p-126f : std::fabs(p.scale);
    if (p.walks) return launch_walk(p, element, stream);
    launch_parts(p, element, stream);
    launch_combine(p, element, stream);
}

}  // namespace simsd::intervals
