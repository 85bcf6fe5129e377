// masked_attention for many rows: a block per (KV head, tile of 16 rows for each of up to 8 warps) walks over all keys.
//
// Data path: that of masked_attention_splits.cu, with the softmax of a split in registers and, next to it, the total
// that it is added to behind the split's last tile: the same operations in the same order as launch_combine's, so the
// same bits. Lives are looked at 1024 keys at a time; only there does the ring of tiles run empty.
//
// Floor: SDAR-8B, a prefill of 2048 tokens (block-causal, so half of the pairs): 4 x 8192 x 2048 x 128 x 8 / 2 = 34
// GFLOP, 35 us at the 990 TFLOPS of dense bf16, against 8.4 MB of K and V, read from L2 by 64 row tiles. What bounds it
// is shared memory: 16 rows per warp make 2 products of one 16 x 16 fragment that is read, 512 bytes, so 4 warps can
// ask for 2 times what the tensor cores of an SM use.
#include "cuda/attention/block.h"
#include "cuda/launch.h"

namespace simsd::intervals {
namespace {

constexpr int WINDOW = 4 * SPLIT;

// Two states of 16 x 128 and queries of 256 columns would be a register or two more than there are.
template <int DIM>
using WalkHead = Head<DIM, DIM == 256 ? 64 : 128>;

template <typename T, int COLUMNS>
SIMSD_DEVICE void store_rows(const Params& p, const Rows& rows, const int32_t (&clock)[2], int first_column,
                             const State<COLUMNS>& total) {
    const int lane = lane_index(), end = rows.first + rows.count;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = rows.first + warp_index() * WARP_ROWS + lane / 4 + 8 * half;
        if (row >= end) continue;
        T* out = static_cast<T*>(p.out) + out_offset(p, rows, row);
        const float inverse = inverse_of(total.sum[half]);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) {
            const int column = first_column + 8 * n + 2 * (lane % 4);
            const bool sees = clock[half] >= 0 && total.sum[half] != 0.0f;
            const T low = from_float<T>(sees ? product(total.out[n][2 * half], inverse) : 0.0f);
            const T high = from_float<T>(sees ? product(total.out[n][2 * half + 1], inverse) : 0.0f);
            if (p.dim % 2 == 0) {
                if (column < p.dim) *reinterpret_cast<uint32_t*>(out + column) = pack(low, high);
            } else {
                if (column < p.dim) out[column] = low;
                if (column + 1 < p.dim) out[column + 1] = high;
            }
        }
    }
}

template <typename T, int DIM>
__global__ void __launch_bounds__(MOST_WARPS* WARP, 1) attend_all(const Params p) {
    using Shape = WalkHead<DIM>;
    int rest = block_x();
    const int row_tile = p.row_tiles - 1 - rest % p.row_tiles;  // late rows tend to see more: first
    rest /= p.row_tiles;
    const int slice = rest % Shape::SLICES, head = rest / Shape::SLICES;

    Block<T, DIM, WINDOW, Shape> block(p, head, row_tile, slice);
    block.start(0);
    State<Shape::COLUMNS> total, state;
    total.clear();
    state.clear();
    for (int first_key = 0; first_key < block.rows().keys; first_key += WINDOW) {
        if (first_key > 0) block.move(first_key);
        block.attend(state, [&] {
            merge(total, state);
            state.clear();
        });
    }
    store_rows<T>(p, block.rows(), block.queries().clock, block.first_column(), total);
}

}  // namespace

void launch_walk(const Params& params, Element element, Stream stream) {
    Params p = params;
    const int rows = p.group * p.q_rows;
    int warps = 2;
    while (warps < MOST_WARPS && warps * WARP_ROWS < rows) warps *= 2;
    p.row_tiles = (rows + warps * WARP_ROWS - 1) / (warps * WARP_ROWS);
    with_shape(element, p.dim, [&]<typename T, int DIM>() {
        const Grid grid{p.heads * WalkHead<DIM>::SLICES * p.row_tiles};
        launch("masked_attention", attend_all<T, DIM>, grid, warps * WARP,
               WalkHead<DIM>::template shared_bytes<WINDOW>(warps), stream, p);
    });
}

}  // namespace simsd::intervals
