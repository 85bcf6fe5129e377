// masked_attention for many rows: a block per (KV head, tile of 16 rows for each of up to 8 warps) walks over all keys.
//
// Data path: that of masked_attention_parts.cu, with the softmax of a split in registers and, next to it, that of the
// key group which it is added to behind the split's last tile; key groups are added up in memory: the same operations
// in the same order as launch_combine's, so the same bits.
//
// Floor: SDAR-8B, a prefill of 2048 tokens (block-causal, so half of the pairs): 4 x 8192 x 2048 x 128 x 8 / 2 = 34
// GFLOP, 35 us at the 990 TFLOPS of dense bf16, against 8.4 MB of K and V, read from L2 by 64 row tiles. What bounds it
// is shared memory: 16 rows per warp make 2 products of one 16 x 16 fragment that is read, 512 bytes, so 4 warps can
// ask for 2 times what the tensor cores of an SM use.
#include "cuda/attention/block.h"
#include "cuda/launch.h"

namespace simsd::intervals {
namespace {

// A thread's share of the sum of the key groups, in memory of its own: it is touched once in 2048 keys, and registers
// have no room for it. Nothing at first.
template <int COLUMNS>
struct Total {
    static constexpr int ITEMS = COLUMNS / 8 + 1;  // of 4 floats: maxima and sums; columns
    const Params& p;
    bool begun = false;

    SIMSD_DEVICE explicit Total(const Params& params) : p(params) {}

    SIMSD_DEVICE float* item(int n) const {
        return p.scratch + ((static_cast<int64_t>(block_x()) * ITEMS + n) * thread_count() + thread_index()) * 4;
    }

    SIMSD_DEVICE void read(float (&values)[4], int n) const {
        const Bytes16 bytes = load_16_written(item(n));
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = bits_as_float(bytes.words[i]);
    }

    SIMSD_DEVICE void write(const float (&values)[4], int n) const {
        Bytes16 bytes;
#pragma unroll
        for (int i = 0; i < 4; ++i) bytes.words[i] = float_as_bits(values[i]);
        store_16(item(n), bytes);
    }

    // As `merge` does, a few columns at a time.
    SIMSD_DEVICE void add(const State<COLUMNS>& key_group) {
        float whole[4] = {NOTHING, NOTHING, 0.0f, 0.0f};
        if (begun) read(whole, 0);
        Rescale by[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            by[half] = rescale(whole[half], key_group.max[half]);
            if (key_group.sum[half] == 0.0f) continue;
            whole[half] = by[half].max;
            whole[2 + half] = merged(by[half], whole[2 + half], key_group.sum[half]);
        }
        write(whole, 0);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) {
            float out[4] = {};
            if (begun) read(out, n + 1);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (key_group.sum[i / 2] != 0.0f) out[i] = merged(by[i / 2], out[i], key_group.out[n][i]);
            }
            write(out, n + 1);
        }
        begun = true;
    }

    SIMSD_DEVICE void load(State<COLUMNS>& total) const {
        total.clear();
        if (!begun) return;
        float whole[4];
        read(whole, 0);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            total.max[half] = whole[half];
            total.sum[half] = whole[2 + half];
        }
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) read(total.out[n], n + 1);
    }
};

template <typename T, int COLUMNS>
SIMSD_DEVICE void store_rows(const Params& p, const Work& work, const Moments& moments, const State<COLUMNS>& total) {
    const Rows& rows = work.rows;
    const int lane = lane_index(), end = rows.first + rows.count;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = rows.first + warp_index() * WARP_ROWS + lane / 4 + 8 * half;
        if (row >= end) continue;
        T* out = static_cast<T*>(p.out) + out_offset(p, rows, row);
        const float weights = moments.of_half(half) >= 0 ? total.sum[half] : 0.0f, inverse = inverse_of(weights);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) {
            const int column = work.slice * COLUMNS + 8 * n + 2 * (lane % 4);
            const T low = from_float<T>(quotient(total.out[n][2 * half], weights, inverse));
            const T high = from_float<T>(quotient(total.out[n][2 * half + 1], weights, inverse));
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
    using Shape = Head<DIM>;
    const Plan& plan = p.plan;
    int rest = block_x();
    const int row_tile = plan.row_tiles - 1 - rest % plan.row_tiles;  // late rows tend to see more: first
    rest /= plan.row_tiles;
    const int slice = rest % Shape::SLICES, head = rest / Shape::SLICES;

    Block<T, DIM> block(p);
    block.start(Work(p, head / p.kv_heads, head % p.kv_heads, row_tile, slice, 0, plan.key_groups));
    State<Shape::COLUMNS> split, key_group;
    split.clear();
    key_group.clear();
    Total<Shape::COLUMNS> total(p);
    block.attend(split, [&](bool ends) {
        add_split(key_group, split);
        if (!ends || plan.key_groups == 1) return;
        total.add(key_group);
        key_group.clear();
    });
    if (plan.key_groups > 1) total.load(key_group);
    store_rows<T>(p, block.work(), block.moments(), key_group);
}

}  // namespace

int64_t walk_floats(const Params& p, int columns, int64_t blocks) {
    return p.plan.key_groups > 1 ? blocks * (columns / 8 + 1) * 4 * p.warps * WARP : 0;
}

void launch_walk(const Params& p, Element element, Stream stream) {
    with_shape(element, p.dim, [&]<typename T, int DIM>() {
        const Grid grid{static_cast<int64_t>(p.batch) * p.kv_heads * Head<DIM>::SLICES * p.plan.row_tiles};
        launch("masked_attention", attend_all<T, DIM>, grid, p.warps * WARP, Head<DIM>::shared_bytes(p.warps), stream,
               p);
    });
}

}  // namespace simsd::intervals
