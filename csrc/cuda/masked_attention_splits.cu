// masked_attention for few rows: a block of 2 or 4 warps per (KV head, tile of 16 rows per warp, split of 256 keys).
//
// Data path: lives of the split's keys and clocks of the rows -> which keys and tiles anybody sees -> K and V of those
// by asynchronous 16-byte copies into a ring of padded tiles of 32 keys -> tensor cores -> partial results in float32,
// which launch_combine adds up in the order of the splits.
//
// Floor: K and V once. SDAR-8B (8 KV heads of 128, G = 4), 16 rows, 4096 keys: 8 x 4096 x 128 x 2 x 2 B = 16.8 MB, 5.0
// us at 3.35 TB/s, by 16 splits x 8 heads = 128 blocks; 8 B of lives per key add 1.6% per head, from L2
// after the first; partial results are 16 x 130 x 4 B per 128 KB read, 6%. Operations: 4 x 16 x 4096 x 128 x 8 = 0.27
// GFLOP, which needs 0.3 us of the tensor cores. So bytes in flight and the two latencies in a row (lives, then keys)
// are what bounds it. At 256 rows (a lattice of 64 rows) partials are as many bytes as K and V, but stay in L2.
#include "cuda/attention/partials.h"
#include "cuda/launch.h"

namespace simsd::intervals {
namespace {

constexpr int WARPS = 4;

struct alignas(8) Pair {
    float low, high;
};

template <typename T, int DIM>
__global__ void __launch_bounds__(WARPS* WARP, DIM < 128 ? 3 : 2) attend_split(const Params p) {
    using Shape = Head<DIM>;
    // Blocks that share K and V are neighbours.
    int rest = block_x();
    const int row_tile = rest % p.row_tiles;
    rest /= p.row_tiles;
    const int slice = rest % Shape::SLICES;
    rest /= Shape::SLICES;
    const int split = rest % p.splits, head = rest / p.splits;

    Block<T, DIM, SPLIT> block(p, head, row_tile, slice);
    const Rows& rows = block.rows();
    if (split * SPLIT >= rows.keys) return;  // launch_combine does not look at it either
    block.start(split * SPLIT);
    State<Shape::COLUMNS> state;
    state.clear();
    block.attend(state, [] {});

    const Partials to(p);
    const int lane = lane_index(), end = rows.first + rows.count;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(state.sum[half]);
        const int row = rows.first + warp_index() * WARP_ROWS + lane / 4 + 8 * half;
        if (row >= end) continue;
        const int64_t at = partial_row(p, head, split, row);
        const bool sees = total != 0.0f && block.queries().clock[half] >= 0;
        if (slice == 0 && lane % 4 == 0) {
            to.max[at] = state.max[half];
            to.sum[at] = sees ? total : 0.0f;
        }
        if (!sees) continue;
        float* out = to.out + at * DIM + slice * Shape::COLUMNS + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < Shape::COLUMNS / 8; ++n) {
            *reinterpret_cast<Pair*>(out + 8 * n) = {state.out[n][2 * half], state.out[n][2 * half + 1]};
        }
    }
}

}  // namespace

void launch_splits(const Params& params, Element element, Stream stream) {
    Params p = params;
    const int rows = p.group * p.q_rows;
    const int warps = rows <= 2 * WARP_ROWS ? 2 : WARPS;  // a warp without rows still halves the other's loads
    p.row_tiles = (rows + warps * WARP_ROWS - 1) / (warps * WARP_ROWS);
    with_shape(element, p.dim, [&]<typename T, int DIM>() {
        const Grid grid{p.heads * p.splits * Head<DIM>::SLICES * p.row_tiles};
        launch("masked_attention", attend_split<T, DIM>, grid, warps * WARP,
               Head<DIM>::template shared_bytes<SPLIT>(warps), stream, p);
    });
}

}  // namespace simsd::intervals
