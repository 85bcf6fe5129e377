// thin_linear: y = x W^T for few rows, each row's bits independent of all other rows, of N and of strides.
//
// Order of summation. K is cut into chunks of 64, dealt out to 8 warps in turn. 16-bit elements: a warp adds its chunks
// with m16n8k16 products, ascending, and the block adds the 8 warps' sums, ascending. An output is one element of such
// products, whatever tile it lies in. float32: a lane adds with FMAs what it finds at 4 consecutive k in every 128,
// ascending, and the warp adds the lanes as a tree. Past K both operands are zeros. All of these are constants.
//
// Data path, 16-bit. The weight is the products' 16-row operand, x the 8-column one: up to 8 rows of x cost one product
// per 16 x 16 weights, and no tensor core works for rows that are not there. In a step of 32 k lane (g, t) takes
// k = 8t .. 8t + 7 of rows g: 16 bytes, which serve as the k pairs of two products. The hardware thinks of them as
// other k, but of the same ones in both operands. So what a lane copies (cp.async, global to shared memory) is what
// that lane reads: the ring of stages needs no barrier. Warps share nothing until they add up.
//
// Floor: the weight once, 2 N K bytes. SDAR-8B, 4096 x 4096: 33.6 MB, 10.0 us at 3.35 TB/s; 12288 x 4096: 30 us;
// the vocabulary, 151936 x 4096: 372 us. Products: 8 rows cost 2 x 8 x N x K = 0.27 GFLOP for those 33.6 MB, nothing.
// What bounds it is bytes in flight: 20 KB per SM at 800 ns of latency. A block holds up to 96 KB of stages: 8 rows of
// 4096 x 4096 are 256 blocks, two to an SM, with 112 KB of weights on their way. From L2 come also x, once per block:
// with 16 M columns and 8 R rows per block R / (2 M) of the weight's bytes (1.25 to 1.5 of the weight in all for up to
// 16 rows, 3 for 64 rows). That bounds 64 rows: 100 MB at some 5.5 TB/s, 18 us. More than 64 rows: row tiles of one
// weight tile are neighbours, so that all but the first find it in L2.
//
// Data path, float32 (CUDA cores): a warp takes 4 columns and up to 8 rows, registers only; x from L1 after the first
// warp of a block has read it. 8 rows of 4096 x 4096: 67 MB, 20 us; 0.27 GFLOP, 4 us.
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/thin_linear.h"
#include "cuda/warp.h"

namespace simsd::linear {
namespace {

constexpr int WARPS = 8;         // also: slices of K
constexpr int CHUNK = 64;        // k that a warp takes in turn: 128 bytes of a row of the weight, a cache line
constexpr int STEP = 32;         // k per stage
constexpr int PIECE = 8;         // 16-bit elements in 16 bytes
constexpr int RING = 96 * 1024;  // bytes of stages per block; sm_120 has 99 KB
constexpr int MOST_STAGES = 8;
constexpr int MOST_ROW_TILES = 8;  // of 8 rows, per block

// Columns from which a block takes 32 of them rather than 16: still some 96 blocks with several rows, where x's bytes
// count, and several waves of blocks with few.
constexpr int64_t WIDE_FROM[] = {8192, 3072};

constexpr int least(int a, int b) { return a < b ? a : b; }

// A block of `ROWS` tiles of 8 rows by `COLUMNS` tiles of 16 columns.
template <int ROWS, int COLUMNS>
struct Tile {
    static constexpr int LOADS = 2 * COLUMNS + ROWS;  // of 16 bytes, per lane and stage: the weight's rows, then x's
    static constexpr int STAGES = least(MOST_STAGES, RING / (WARPS * WARP * LOADS * 16));
    static constexpr int BYTES = WARPS * STAGES * LOADS * WARP * 16;
    static constexpr int OUTPUTS = ROWS * 8 * COLUMNS * 16;
    static_assert(STAGES >= 2 && WARPS * OUTPUTS * 4 <= BYTES);
};

// 8 elements of a row from `k` on, zeros past `end`, as a copy into shared memory of this lane's own.
template <bool Vector, typename T>
SIMSD_DEVICE void fetch(Bytes16* to, const T* row, int64_t k, int64_t end, int64_t stride, bool exists) {
    if constexpr (Vector) {
        const bool inside = exists && k < end;
        copy_async_16(to, inside ? row + k : row, inside);
    } else {
        Bytes16 piece;
#pragma unroll
        for (int i = 0; i < PIECE / 2; ++i) {
            const int64_t at = k + 2 * i;
            const T low = exists && at < end ? row[at * stride] : T{0};
            const T high = exists && at + 1 < end ? row[(at + 1) * stride] : T{0};
            piece.words[i] = pack(low, high);
        }
        *to = piece;
    }
}

template <typename T, int ROWS, int COLUMNS, bool Vector>
__global__ void __launch_bounds__(WARPS* WARP, ROWS < MOST_ROW_TILES ? 2 : 1) multiply(const Params p) {
    using Sizes = Tile<ROWS, COLUMNS>;
    Shared shared;
    Bytes16* memory = shared.take<Bytes16>(Sizes::BYTES / 16);
    const int warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
    const int row_tiles = static_cast<int>((p.rows + ROWS * 8 - 1) / (ROWS * 8));
    const int64_t row = static_cast<int64_t>(block_x() % row_tiles) * (ROWS * 8);
    const int64_t column = static_cast<int64_t>(block_x() / row_tiles) * (COLUMNS * 16);

    Bytes16* ring = memory + warp * (Sizes::STAGES * Sizes::LOADS * WARP) + lane;  // [stage][load][lane]
    const T* weight = static_cast<const T*>(p.weight) + (column + g) * p.weight_stride;
    const T* x = static_cast<const T*>(p.x) + (row + g) * p.k;
    const int64_t chunks = (p.k + CHUNK - 1) / CHUNK;
    const int64_t steps = chunks > warp ? (chunks - warp + WARPS - 1) / WARPS * (CHUNK / STEP) : 0;

    const auto copy = [&](int64_t step, int stage) {
        const int64_t k = (step / (CHUNK / STEP) * WARPS + warp) * CHUNK + step % (CHUNK / STEP) * STEP + t * PIECE;
        Bytes16* to = ring + stage * (Sizes::LOADS * WARP);
#pragma unroll
        for (int i = 0; i < 2 * COLUMNS; ++i) {
            const bool exists = column + g + 8 * i < p.columns;
            const T* from = exists ? weight + 8 * i * p.weight_stride : static_cast<const T*>(p.weight);
            fetch<Vector>(to + i * WARP, from, k, p.k, p.k_stride, exists);
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const bool exists = row + g + 8 * i < p.rows;
            const T* from = exists ? x + 8 * i * p.k : static_cast<const T*>(p.x);
            fetch<Vector>(to + (2 * COLUMNS + i) * WARP, from, k, p.k, 1, exists);
        }
    };

    float sums[COLUMNS][ROWS][4] = {};
#pragma unroll
    for (int step = 0; step < Sizes::STAGES - 1; ++step) {
        if (step < steps) copy(step, step);
        copy_commit();
    }
    int stage = 0, free = Sizes::STAGES - 1;
    for (int64_t step = 0; step < steps; ++step) {
        copy_wait<Sizes::STAGES - 2>();
        if (step + Sizes::STAGES - 1 < steps) copy(step + Sizes::STAGES - 1, free);
        copy_commit();
        const Bytes16* here = ring + stage * (Sizes::LOADS * WARP);
        Bytes16 w[2 * COLUMNS];
#pragma unroll
        for (int i = 0; i < 2 * COLUMNS; ++i) w[i] = here[i * WARP];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Bytes16 b = here[(2 * COLUMNS + r) * WARP];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    const uint32_t a[4] = {w[2 * c].words[2 * half], w[2 * c + 1].words[2 * half],
                                           w[2 * c].words[2 * half + 1], w[2 * c + 1].words[2 * half + 1]};
                    multiply_add<T>(sums[c][r], a, b.words[2 * half], b.words[2 * half + 1]);
                }
            }
        }
        free = stage;
        stage = stage + 1 == Sizes::STAGES ? 0 : stage + 1;
    }
    copy_wait<0>();
    block_barrier();

    // The warps' sums, [warp][row][column], where the ring was.
    float* partial = reinterpret_cast<float*>(memory);
    constexpr int WIDTH = COLUMNS * 16;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float* to = partial + warp * Sizes::OUTPUTS + (8 * r + 2 * t) * WIDTH + 16 * c + g;
            to[0] = sums[c][r][0];
            to[WIDTH] = sums[c][r][1];
            to[8] = sums[c][r][2];
            to[WIDTH + 8] = sums[c][r][3];
        }
    }
    block_barrier();
    for (int i = thread_index(); i < Sizes::OUTPUTS; i += WARPS * WARP) {
        float total = partial[i];
#pragma unroll
        for (int other = 1; other < WARPS; ++other) total += partial[other * Sizes::OUTPUTS + i];
        const int64_t r = row + i / WIDTH, c = column + i % WIDTH;
        if (r < p.rows && c < p.columns) static_cast<T*>(p.out)[r * p.columns + c] = from_float<T>(total);
    }
}

constexpr int FLOATS = 4;        // that a lane takes at a time
constexpr int WARP_COLUMNS = 4;  // float32: columns of a warp

// `Again`: others of the block will read the same, so it is to stay in L1.
template <bool Vector, bool Again>
SIMSD_DEVICE void read(float (&to)[FLOATS], const float* row, int64_t k, int64_t end, int64_t stride, bool exists) {
    if constexpr (Vector) {
        Bytes16 piece = {};
        if (exists && k < end) piece = Again ? *reinterpret_cast<const Bytes16*>(row + k) : load_16(row + k);
#pragma unroll
        for (int i = 0; i < FLOATS; ++i) to[i] = bits_as_float(piece.words[i]);
    } else {
#pragma unroll
        for (int i = 0; i < FLOATS; ++i) to[i] = exists && k + i < end ? row[(k + i) * stride] : 0.0f;
    }
}

template <int ROWS, bool Vector>
__global__ void __launch_bounds__(WARPS* WARP) multiply_float32(const Params p) {
    const int row_tiles = static_cast<int>((p.rows + ROWS - 1) / ROWS);
    const int64_t row = static_cast<int64_t>(block_x() % row_tiles) * ROWS;
    const int64_t column = (static_cast<int64_t>(block_x() / row_tiles) * WARPS + warp_index()) * WARP_COLUMNS;
    const float* weight = static_cast<const float*>(p.weight) + column * p.weight_stride;
    const float* x = static_cast<const float*>(p.x) + row * p.k;
    float sums[ROWS * WARP_COLUMNS] = {};
#pragma unroll 2
    for (int64_t k = lane_index() * FLOATS; k < p.k; k += WARP * FLOATS) {
        float w[WARP_COLUMNS][FLOATS];
#pragma unroll
        for (int c = 0; c < WARP_COLUMNS; ++c) {
            read<Vector, false>(w[c], weight + c * p.weight_stride, k, p.k, p.k_stride, column + c < p.columns);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float a[FLOATS];
            read<Vector, true>(a, x + r * p.k, k, p.k, 1, row + r < p.rows);
#pragma unroll
            for (int c = 0; c < WARP_COLUMNS; ++c) {
#pragma unroll
                for (int i = 0; i < FLOATS; ++i) {
                    sums[r * WARP_COLUMNS + c] = fused(a[i], w[c][i], sums[r * WARP_COLUMNS + c]);
                }
            }
        }
    }
    float mine = 0.0f;  // lane r * 4 + c keeps that output
#pragma unroll
    for (int i = 0; i < ROWS * WARP_COLUMNS; ++i) {
        const float total = warp_sum(sums[i]);
        if (lane_index() == i) mine = total;
    }
    const int64_t r = row + lane_index() / WARP_COLUMNS, c = column + lane_index() % WARP_COLUMNS;
    if (lane_index() < ROWS * WARP_COLUMNS && r < p.rows && c < p.columns) {
        static_cast<float*>(p.out)[r * p.columns + c] = mine;
    }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, int ROWS, int COLUMNS, bool Vector>
void launch_tile(const Params& p, Stream stream) {
    const Grid grid{divide_up(p.rows, ROWS * 8) * divide_up(p.columns, COLUMNS * 16)};
    launch("thin_linear", multiply<T, ROWS, COLUMNS, Vector>, grid, WARPS * WARP, Tile<ROWS, COLUMNS>::BYTES, stream,
           p);
}

template <typename T, int ROWS>
void launch_rows(const Params& p, Stream stream) {
    if (ROWS < MOST_ROW_TILES && p.rows > ROWS * 8) {
        launch_rows<T, least(2 * ROWS, MOST_ROW_TILES)>(p, stream);
    } else if (p.columns >= WIDE_FROM[ROWS > 1]) {
        launch_tile<T, ROWS, 2, true>(p, stream);
    } else {
        launch_tile<T, ROWS, 1, true>(p, stream);
    }
}

template <int ROWS, bool Vector>
void launch_float32(const Params& p, Stream stream) {
    if (Vector && ROWS < 8 && p.rows > ROWS) return launch_float32<least(2 * ROWS, 8), Vector>(p, stream);
    const Grid grid{divide_up(p.rows, ROWS) * divide_up(p.columns, WARPS * WARP_COLUMNS)};
    launch("thin_linear", multiply_float32<ROWS, Vector>, grid, WARPS * WARP, 0, stream, p);
}

// Whether every 16 bytes that a lane takes are aligned and lie within one row.
bool aligned(const Params& p, int element_bytes) {
    const auto fits = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
    const bool rows_fit = p.weight_stride * element_bytes % 16 == 0 || p.columns == 1;
    return fits(p.x) && fits(p.weight) && rows_fit && p.k_stride == 1 && p.k * element_bytes % 16 == 0;
}

template <typename T>
void launch_16_bit(const Params& p, Stream stream) {
    // Strided and unaligned weights come through the same steps, an element at a time.
    aligned(p, 2) ? launch_rows<T, 1>(p, stream) : launch_tile<T, MOST_ROW_TILES, 1, false>(p, stream);
}

}  // namespace

void launch_thin_linear(const Params& params, Element element, Stream stream) {
    switch (element) {
        case Element::float32:
            return aligned(params, 4) ? launch_float32<1, true>(params, stream)
                                      : launch_float32<8, false>(params, stream);
        case Element::bfloat16:
            return launch_16_bit<Bfloat16>(params, stream);
        case Element::float16:
            return launch_16_bit<Float16>(params, stream);
    }
}

}  // namespace simsd::linear
