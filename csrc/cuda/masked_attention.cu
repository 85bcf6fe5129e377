// masked_attention: which kernel serves a call, and the one that adds up the splits of few rows.
//
// A row's bits depend on its own visible keys and their places alone. Splits (256 keys) and tiles (32) are constants; a
// warp walks over all keys of a split for its 16 rows by itself, whichever kernel it belongs to and however many warps
// share the loads; splits are added in ascending order; what a row does not see weighs exactly zero. So the choice
// below may depend on the GPU.
#include "cuda/attention/partials.h"
#include "cuda/launch.h"

namespace simsd::intervals {
namespace {

constexpr int64_t MOST_SCRATCH_FLOATS = 1 << 23;
constexpr int WARPS = 4;
constexpr int PER_LANE = 4;  // columns

int splits_of(const Params& p) { return (p.keys + SPLIT - 1) / SPLIT; }

int padded_dim(int dim) { return dim <= 64 ? 64 : dim <= 96 ? 96 : dim <= 128 ? 128 : 256; }

// A warp per row and 128 columns. Bytes: all partial results once, 16 to a lane, 4 splits on their way at a time.
template <typename T, int DIM>
__global__ void __launch_bounds__(WARPS* WARP) combine_splits(const Params p) {
    constexpr int AT_ONCE = 4;
    const int row_count = p.group * p.q_rows, lane = lane_index();
    int rest = block_x() * WARPS + warp_index();  // scratch_floats keeps it small
    const int slice = rest % Head<DIM>::SLICES;
    rest /= Head<DIM>::SLICES;
    const int head = rest / row_count, row = rest % row_count;
    if (head >= p.heads) return;
    const Rows rows = locate_rows(p, head, row, 1);
    const int splits = (rows.keys + SPLIT - 1) / SPLIT, column = slice * Head<DIM>::COLUMNS + lane * PER_LANE;
    const bool loads = lane * PER_LANE < Head<DIM>::COLUMNS;

    const Partials from(p);
    float max = NOTHING, total = 0.0f, out[PER_LANE] = {};
    for (int first = 0; first < splits; first += WARP) {
        float my_max = NOTHING, my_sum = 0.0f;
        if (first + lane < splits) {
            my_max = from.max[partial_row(p, head, first + lane, row)];
            my_sum = from.sum[partial_row(p, head, first + lane, row)];
        }
        for (uint32_t left = ballot(my_sum != 0.0f); left != 0;) {
            Bytes16 added[AT_ONCE];
            int lanes[AT_ONCE], count = 0;
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                lanes[i] = left ? lowest_bit(left) : 0;
                if (left && loads) {
                    added[i] = load_16(from.out + partial_row(p, head, first + lanes[i], row) * DIM + column);
                }
                count += left != 0;
                left &= left - 1;
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const float added_max = shuffle(my_max, lanes[i]), added_sum = shuffle(my_sum, lanes[i]);
                if (i >= count) continue;
                const Rescale by = rescale(max, added_max);
                max = by.max;
                total = merged(by, total, added_sum);
#pragma unroll
                for (int n = 0; n < PER_LANE; ++n) out[n] = merged(by, out[n], bits_as_float(added[i].words[n]));
            }
        }
    }
    if (!loads) return;
    T* to = static_cast<T*>(p.out) + out_offset(p, rows, row);
    const float inverse = inverse_of(total);
#pragma unroll
    for (int n = 0; n < PER_LANE; ++n) {
        if (column + n < p.dim) to[column + n] = from_float<T>(total != 0.0f ? product(out[n], inverse) : 0.0f);
    }
}

bool copies_whole_chunks(const void* data, const int64_t (&strides)[4], int dim) {
    bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[3] == 1 && dim % CHUNK == 0;
    for (int axis = 0; axis < 3; ++axis) fits = fits && strides[axis] % CHUNK == 0;
    return fits;
}

}  // namespace

int64_t scratch_floats(const Params& p, Element element, int multiprocessors) {
    const int64_t rows = static_cast<int64_t>(p.group) * p.q_rows, splits = splits_of(p);
    if (element == Element::float32 || splits <= 1 || rows == 0) return 0;
    // Blocks of 4 warps that walk over all keys: two per multiprocessor are enough of them.
    const int64_t walkers = p.heads * ((rows + 4 * WARP_ROWS - 1) / (4 * WARP_ROWS));
    if (walkers >= 2 * multiprocessors) return 0;
    const int64_t floats = p.heads * splits * rows * (padded_dim(p.dim) + 2) + 3;
    return floats <= MOST_SCRATCH_FLOATS ? floats : 0;
}

void launch_combine(const Params& p, Element element, Stream stream) {
    with_shape(element, p.dim, [&]<typename T, int DIM>() {
        const int64_t warps = p.heads * p.group * p.q_rows * Head<DIM>::SLICES;
        launch("masked_attention", combine_splits<T, DIM>, {(warps + WARPS - 1) / WARPS}, WARPS * WARP, 0, stream, p);
    });
}

void launch_attention(const Params& params, Element element, Stream stream) {
    if (element == Element::float32) return launch_float(params, stream);
    Params p = params;
    p.splits = splits_of(p);
    p.copy_q = copies_whole_chunks(p.q, p.q_strides, p.dim);
    p.copy_k = copies_whole_chunks(p.k, p.k_strides, p.dim);
    p.copy_v = copies_whole_chunks(p.v, p.v_strides, p.dim);
    if (p.partials == nullptr) return launch_walk(p, element, stream);
    launch_splits(p, element, stream);
    launch_combine(p, element, stream);
}

}  // namespace simsd::intervals
