// A block of threads and its rows: while its warps compute on one tile of keys, the next ones are on their way.
//
// Head sizes run in the next of 64, 96, 128 and 256 columns. Two states of 256 columns do not fit a warp's registers
// next to the queries, so blocks compute 64 of them each, from the same scores.
#pragma once

#include "cuda/attention/products.h"

namespace simsd::intervals {

// What a block works on.
struct Work {
    Rows rows;
    int slice;  // of V's columns
    int part;   // where attend_parts puts the result
    int first_window, end_window;
    uint32_t within;  // of a window's tiles, those that count
    int bits;         // of the row tile in the element's first window, in the plan

    // Row tile `row_tile`, the windows of key groups first ... end - 1.
    SIMSD_DEVICE Work(const Params& p, int batch, int kv_head, int row_tile, int slice, int first, int end)
        : rows(locate_rows(p, batch, kv_head, row_tile * p.plan.tile_rows, p.plan.tile_rows)),
          slice(slice),
          part(0),
          first_window(2 * first),
          end_window(2 * end),
          within(~0u),
          bits(2 * (batch * p.plan.key_groups * p.plan.row_tiles + row_tile)) {}
};

// Padded D, and the columns of V that a block computes.
template <int DIM>
struct Head {
    static constexpr int COLUMNS = DIM < 256 ? DIM : 64;
    static constexpr int SLICES = DIM / COLUMNS;
    // Enough to have 35 to 46 KB on their way while one is used, and to leave room for 3 or 4 blocks on an H100.
    static constexpr int STAGES = DIM == 64 ? 6 : DIM == 96 || DIM == 256 ? 4 : 3;
    static constexpr int K_ELEMENTS = TILE * ROW_STRIDE<DIM>, V_ELEMENTS = TILE * ROW_STRIDE<COLUMNS>;
    static constexpr int STAGE_ELEMENTS = K_ELEMENTS + V_ELEMENTS + 2 * TILE * 2;  // and births and deaths

    static constexpr int shared_bytes(int warps) {
        return 2 * STAGES * STAGE_ELEMENTS + (4 * WARP_ROWS + static_cast<int>(sizeof(Moments))) * warps +
               16 * ((static_cast<int>(sizeof(Work)) + 15) / 16);
    }
};

constexpr int MOST_WARPS = 8;

// Live tiles in ascending order, those of one window at a time.
struct Tiles {
    int window, at;       // at: the window's bits in the plan
    uint32_t left, full;  // of the window's tiles: those to come; those that every row sees whole

    // To the next window that has any; false where there is none.
    SIMSD_DEVICE bool next_window(const Plan& plan, const Work& work) {
        while (left == 0 && ++window < work.end_window) {
            at = work.bits + (window >> 1) * 2 * plan.row_tiles + (window & 1);
            left = plan.bits[at].live & work.within;
            full = plan.bits[at].full;
        }
        return left != 0;
    }
};

template <typename T, int DIM>
class Block {
    using Shape = Head<DIM>;
    static_assert(Shape::STAGES * Shape::STAGE_ELEMENTS >= MOST_WARPS * WARP_ROWS * ROW_STRIDE<DIM>);

  public:
    SIMSD_DEVICE explicit Block(const Params& p) : p_(p) {
        stages_ = shared_.template take<T>(Shape::STAGES * Shape::STAGE_ELEMENTS);
        clocks_ = shared_.template take<int32_t>(thread_count() / WARP * WARP_ROWS);
        moments_ = shared_.template take<Moments>(thread_count() / WARP);
        work_ = shared_.template take<Work>(1);
    }

    SIMSD_DEVICE const Work& work() const { return *work_; }
    // Of the warp's rows.
    SIMSD_DEVICE Moments& moments() const { return moments_[warp_index()]; }

    // Reads the queries and begins to load keys.
    SIMSD_DEVICE void start(const Work& work) {
        block_barrier();  // nobody reads any more what is overwritten
        // In shared memory, since registers are short and it is looked at between windows alone.
        if (thread_index() == 0) *work_ = work;
        block_barrier();
        const int most = thread_count() / WARP * WARP_ROWS;
        // Behind the stages that are filled first, if there is room.
        const int size = most * ROW_STRIDE<DIM>;
        const bool apart = size <= Shape::STAGE_ELEMENTS;
        T* rows = stages_ + (apart ? (Shape::STAGES - 1) * Shape::STAGE_ELEMENTS : 0);
        load_queries<T, DIM>(rows, p_, work.rows, most);
        for (int i = thread_index(); i < work.rows.queries; i += thread_count()) {
            copy_async_4(clocks_ + i, clock_address(p_, work.rows, i));
        }
        copy_commit();

        loader_.start(p_, work.rows, work.slice * Shape::COLUMNS);
        to_do_ = to_load_ = {work.first_window - 1, 0, 0, 0};
        look_ahead();
        if (apart) fill();
        apart ? copy_wait<Shape::STAGES - 1>() : copy_wait<0>();
        block_barrier();
        moments().set(p_, work.rows, clocks_);
        queries_.load(rows + warp_index() * WARP_ROWS * ROW_STRIDE<DIM>, p_.negated);
        if (!apart) {
            block_barrier();
            fill();
        }
    }

    // Adds the keys to `state`; calls after_split(whether that was the key group's last one) behind the last live tile
    // of each split.
    template <typename AfterSplit>
    SIMSD_DEVICE void attend(State<Shape::COLUMNS>& state, AfterSplit after_split) {
        bool more = to_do_.next_window(p_.plan, *work_);
        int read = 0, write = Shape::STAGES - 1;
        while (more) {
            copy_wait<Shape::STAGES - 2>();
            block_barrier();  // the tile is there for all, and nobody reads any more what is overwritten below
            load_next(stages_ + write * Shape::STAGE_ELEMENTS);
            write = read;

            const int tile = lowest_bit(to_do_.left);
            to_do_.left &= to_do_.left - 1;
            const T* k = stages_ + read * Shape::STAGE_ELEMENTS;
            const int32_t* lives = reinterpret_cast<const int32_t*>(k + Shape::K_ELEMENTS + Shape::V_ELEMENTS);
            add_tile<T, DIM>(state, queries_, moments(), k, k + Shape::K_ELEMENTS, lives, lives + TILE,
                             to_do_.full >> tile & 1, p_.scale);
            read = read + 1 == Shape::STAGES ? 0 : read + 1;
            constexpr int TILES = SPLIT / TILE;
            if ((to_do_.left >> tile / TILES * TILES & ((1u << TILES) - 1)) == 0) {
                const int key_group = to_do_.window / 2;
                more = to_do_.next_window(p_.plan, *work_);
                after_split(!more || to_do_.window / 2 != key_group);
            }
        }
    }

  private:
    SIMSD_DEVICE void fill() {
#pragma unroll 1
        for (int stage = 0; stage < Shape::STAGES - 1; ++stage) load_next(stages_ + stage * Shape::STAGE_ELEMENTS);
    }

    // What is known of a tile's keys is read one tile before it is needed.
    SIMSD_DEVICE void look_ahead() {
        tile_ = -1;
        if (!to_load_.next_window(p_.plan, *work_)) return;
        tile_ = lowest_bit(to_load_.left);
        to_load_.left &= to_load_.left - 1;
        full_ = to_load_.full >> tile_ & 1;
        if (!full_) seen_ = p_.plan.seen[to_load_.at * WARP + tile_];
        tile_ += to_load_.window * WARP;
        if (p_.block_table != nullptr) {
            places_ = p_.plan.places[work_->rows.batch * p_.plan.key_groups * (KEY_GROUP / TILE) + tile_];
        }
    }

    SIMSD_DEVICE void load_next(T* stage) {
        if (tile_ >= 0) {
            const char *row, *other;
            if (p_.block_table == nullptr) {
                row = loader_.locate(tile_ * TILE);
                other = loader_.locate(tile_ * TILE + PAGE_UNIT);
            } else {
                row = loader_.locate(p_, places_.units[0] / 16, places_.units[0] % 16 * PAGE_UNIT);
                other = loader_.locate(p_, places_.units[1] / 16, places_.units[1] % 16 * PAGE_UNIT);
            }
            loader_.load(p_, stage, row, other, full_, seen_);
            if (!full_) load_lives(reinterpret_cast<int32_t*>(stage + Shape::K_ELEMENTS + Shape::V_ELEMENTS));
            look_ahead();
        }
        copy_commit();
    }

    SIMSD_DEVICE void load_lives(int32_t* to) const {
        if (thread_index() >= 2 * TILE) return;
        const bool deaths = thread_index() / TILE;
        const int lane = lane_index(), key = tile_ * TILE + lane;
        const int64_t (&strides)[2] = deaths ? p_.death_strides : p_.birth_strides;
        to += thread_index();
        if (seen_ >> lane & 1) {
            copy_async_4(to, (deaths ? p_.death : p_.birth) + work_->rows.batch * strides[0] + key * strides[1]);
        } else {
            *to = deaths ? NEVER : UNSEEN;
        }
    }

    const Params& p_;
    Shared shared_;
    T* stages_;
    int32_t* clocks_;  // of the queries
    Moments* moments_;
    Work* work_;
    Queries<T, DIM> queries_;
    Loader<T, DIM, Shape::COLUMNS, Shape::K_ELEMENTS> loader_;
    Tiles to_do_, to_load_;
    int tile_;  // the next to load, of all; -1: none
    bool full_;
    uint32_t seen_;      // where it is not full
    TilePlaces places_;  // where there is a block table
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
