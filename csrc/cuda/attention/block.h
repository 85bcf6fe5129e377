// A block of threads over a window of keys: while its warps compute on one tile, the next ones are on their way.
//
// Head sizes run in the next of 64, 96, 128 and 256 columns. 256 columns of output do not fit a warp's registers next
// to the queries, so blocks compute 128 each, or 64 where they carry two states, from the same scores.
#pragma once

#include "cuda/attention/products.h"

namespace simsd::intervals {

// Padded D, and the columns of V that a block computes.
template <int DIM, int WIDEST = 128>
struct Head {
    static constexpr int COLUMNS = DIM < WIDEST ? DIM : WIDEST;
    static constexpr int SLICES = DIM / COLUMNS;
    // Enough to have 35 to 46 KB on their way while one is used, and to leave room for 3 or 4 blocks on an H100.
    static constexpr int STAGES = DIM == 64 ? 6 : DIM == 96 || COLUMNS == 64 ? 4 : 3;
    static constexpr int K_ELEMENTS = TILE * ROW_STRIDE<DIM>;
    static constexpr int STAGE_ELEMENTS = K_ELEMENTS + TILE * ROW_STRIDE<COLUMNS>;

    template <int KEYS>
    static constexpr int shared_bytes(int warps) {
        return 2 * STAGES * STAGE_ELEMENTS + Window<KEYS>::SHARED_BYTES + 4 * WARP_ROWS * warps;
    }
};

constexpr int MOST_WARPS = 8;

template <typename T, int DIM, int KEYS, typename Shape = Head<DIM>>
class Block {
    static_assert(Shape::STAGES * Shape::STAGE_ELEMENTS >= MOST_WARPS * WARP_ROWS * ROW_STRIDE<DIM>);

  public:
    // `head`: of B * Hkv; `slice`: of V's columns.
    SIMSD_DEVICE Block(const Params& p, int head, int row_tile, int slice) : p_(p), window_(shared_) {
        const int most = thread_count() / WARP * WARP_ROWS;
        rows_ = locate_rows(p, head, row_tile * most, most);
        first_column_ = slice * Shape::COLUMNS;
        stages_ = shared_.template take<T>(Shape::STAGES * Shape::STAGE_ELEMENTS);
        clocks_ = shared_.template take<int32_t>(most);
    }

    SIMSD_DEVICE const Rows& rows() const { return rows_; }
    SIMSD_DEVICE const Queries<T, DIM>& queries() const { return queries_; }
    SIMSD_DEVICE int first_column() const { return first_column_; }

    // Reads the queries and the first window's lives. Where all queries are dead, no key is left in rows().
    SIMSD_DEVICE void start(int first_key) {
        load_queries<T, DIM>(stages_, p_, rows_, thread_count() / WARP * WARP_ROWS);
        copy_commit();
        load_clocks(p_, rows_, clocks_);
        window_.fetch(p_, rows_, first_key);
        copy_wait<0>();
        block_barrier();
        const Span span = span_of(clocks_, rows_.queries);
        if (span.first > span.last) rows_.keys = 0;
        queries_.load(p_, rows_, stages_ + warp_index() * WARP_ROWS * ROW_STRIDE<DIM>, clocks_);
        window_.resolve(clocks_, rows_.queries, span);
        block_barrier();
    }

    // Reads another window's lives.
    SIMSD_DEVICE void move(int first_key) {
        block_barrier();
        window_.fetch(p_, rows_, first_key);
        block_barrier();
        window_.resolve(clocks_, rows_.queries, span_of(clocks_, rows_.queries));
        block_barrier();
    }

    // Adds the window's keys to `state`; calls after_split() behind the last live tile of each split.
    template <typename AfterSplit>
    SIMSD_DEVICE void attend(State<Shape::COLUMNS>& state, AfterSplit after_split) {
        uint32_t to_load = window_.live_tiles(), to_do = to_load;
        // Negative while the ring is being filled.
        for (int stage = 1 - Shape::STAGES; to_do != 0; stage = stage + 1 == Shape::STAGES ? 0 : stage + 1) {
            const bool filled = stage >= 0;
            if (filled) {
                copy_wait<Shape::STAGES - 2>();
                block_barrier();  // the tile is there for all, and nobody reads any more what is overwritten below
            }
            load_next(to_load, stage > 0 ? stage - 1 : stage + Shape::STAGES - 1);
            if (!filled) continue;

            const int tile = lowest_bit(to_do);
            to_do &= to_do - 1;
            const T* k = stages_ + stage * Shape::STAGE_ELEMENTS;
            add_tile<T, DIM>(state, queries_, k, k + Shape::K_ELEMENTS, window_.birth + tile * TILE,
                             window_.death + tile * TILE, p_.scale);
            const uint32_t split = ((1u << (SPLIT / TILE)) - 1) << (tile / (SPLIT / TILE) * (SPLIT / TILE));
            if ((to_do & split) == 0) after_split();
        }
    }

  private:
    SIMSD_DEVICE void load_next(uint32_t& to_load, int stage) {
        if (to_load != 0) {
            constexpr int THREADS = ROW_THREADS<DIM>;
            const int tile = lowest_bit(to_load);
            to_load &= to_load - 1;
            T* k = stages_ + stage * Shape::STAGE_ELEMENTS;
            const T* k_head = static_cast<const T*>(p_.k) + rows_.kv_head * p_.k_strides[1];
            const T* v_head = static_cast<const T*>(p_.v) + rows_.kv_head * p_.v_strides[1];
            load_tile<T, DIM, THREADS>(k, k_head, p_.k_strides, p_.dim, p_.copy_k, window_, tile);
            load_tile<T, Shape::COLUMNS, THREADS>(k + Shape::K_ELEMENTS, v_head + first_column_ * p_.v_strides[3],
                                                  p_.v_strides, p_.dim - first_column_, p_.copy_v, window_, tile);
        }
        copy_commit();
    }

    const Params& p_;
    Shared shared_;
    Window<KEYS> window_;
    Rows rows_;
    int first_column_;
    T* stages_;
    int32_t* clocks_;
    Queries<T, DIM> queries_;
};

// Calls `use` with the kernel's element type and number of columns as a type and a constant.
template <typename Use>
void with_shape(Element element, int dim, Use use) {
    const auto with_dim = [&](auto type) {
        using T = decltype(type);
        if (dim <= 64) return use.template operator()<T, 64>();
        if (dim <= 96) return use.template operator()<T, 96>();
        if (dim <= 128) return use.template operator()<T, 128>();
        return use.template operator()<T, 256>();
    };
    element == Element::bfloat16 ? with_dim(Bfloat16{}) : with_dim(Float16{});
}

}  // namespace simsd::intervals
