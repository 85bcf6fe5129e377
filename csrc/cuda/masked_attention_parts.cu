// masked_attention for few rows: as many blocks of 2, 4 or 8 warps as a GPU holds take parts of the live keys in turns,
// a key group of 2048 or a split of 256 for the 16 rows of each warp.
//
// Data path: the plan's list and bits -> K and V of live tiles, by asynchronous 16-byte copies into a ring of padded
// tiles of 32 keys, births and deaths too where not every row sees all -> tensor cores -> partial results in float32,
// which launch_combine adds up.
//
// Floor: K and V once. SDAR-8B (8 KV heads of 128, G = 4), 16 rows, 4096 keys: 8 x 4096 x 128 x 2 x 2 B = 16.8 MB, 5.0
// us at 3.35 TB/s, by 16 splits x 8 heads = 128 blocks; partial results are 16 x 130 x 4 B per 128 KB read, 6%, of a
// key group 0.8%. Operations: 4 x 16 x 4096 x 128 x 8 = 0.27 GFLOP, which needs 0.3 us of the tensor cores. So bytes in
// flight and latencies in a row (list, bits, keys) are what bounds it. Every tile is read by a block per row tile, up
// to 64 rows by one; they run at the same time, so that all but the first find it in L2.
#include "cuda/attention/partials.h"
#include "cuda/launch.h"

namespace simsd::intervals {
namespace {

struct alignas(8) Pair {
    float low, high;
};

template <typename T, int DIM>
SIMSD_DEVICE void store_part(const Params& p, const Block<T, DIM>& block, const State<Head<DIM>::COLUMNS>& state) {
    constexpr int COLUMNS = Head<DIM>::COLUMNS;
    const Partials to(p);
    const Work& work = block.work();
    const int lane = lane_index();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp_index() * WARP_ROWS + lane / 4 + 8 * half;
        if (row >= work.rows.count) continue;
        const int64_t at = partial_row(p, work.part, work.rows.kv_head, row);
        const bool sees = state.sum[half] != 0.0f && block.moments().of_half(half) >= 0;
        if (work.slice == 0 && lane % 4 == 0) {
            store_global(to.max + at, state.max[half]);
            store_global(to.sum + at, sees ? state.sum[half] : 0.0f);
        }
        if (!sees) continue;
        float* out = to.out + at * DIM + work.slice * COLUMNS + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) {
            store_global(reinterpret_cast<Pair*>(out + 8 * n), {state.out[n][2 * half], state.out[n][2 * half + 1]});
        }
    }
}

template <typename T, int DIM>
__global__ void __launch_bounds__(MOST_WARPS* WARP, 1) attend_parts(const Params p) {
    constexpr int SLICES = Head<DIM>::SLICES;
    Block<T, DIM> block(p);
    const Plan& plan = p.plan;
    const Parts parts(p, SLICES);
    const int of_each = p.kv_heads * SLICES, count = parts.count() * of_each;
    State<Head<DIM>::COLUMNS> split, sum;
    for (int next = block_x(); next < count; next += p.blocks) {
        // The first splits of all key groups that are cut, then the second ones: dead ones, which are the last ones of
        // texts, are skipped together, and no block gets more of them than another.
        const int turn = next / of_each, slice = next % SLICES, kv_head = next % of_each / SLICES;
        const bool whole = turn < parts.whole;
        const int groups = parts.listed - parts.whole, cut = whole ? 0 : (turn - parts.whole) / groups;
        const int place = turn - cut * groups, at = plan.list[place];
        const int key_group = at / plan.row_tiles % plan.key_groups;
        Work work(p, at / plan.row_tiles / plan.key_groups, kv_head, at % plan.row_tiles, slice, key_group,
                  key_group + 1);
        work.part = parts.first_of(place) + cut;
        if (!whole) {
            constexpr int SPLITS = WINDOW / SPLIT, TILES = SPLIT / TILE;
            work.within = ((1u << TILES) - 1) << cut % SPLITS * TILES;
            work.first_window += cut / SPLITS;
            work.end_window = work.first_window + 1;
            if ((plan.bits[2 * at + cut / SPLITS].live & work.within) == 0) continue;  // launch_combine knows it
        }
        block.start(work);
        split.clear();
        sum.clear();
        block.attend(split, [&](bool) { add_split(sum, split); });
        store_part(p, block, sum);
    }
}

}  // namespace

void launch_parts(const Params& p, Element element, Stream stream) {
    with_shape(element, p.dim, [&]<typename T, int DIM>() {
        launch("masked_attention", attend_parts<T, DIM>, {p.blocks}, p.warps * WARP, Head<DIM>::shared_bytes(p.warps),
               stream, p);
    });
}

}  // namespace simsd::intervals
