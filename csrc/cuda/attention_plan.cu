// attention_plan: a block per (element, key group, row tile) looks at the lives of 2048 keys, a warp per tile of 32;
// then one block lists what is live.
//
// Floor: births and deaths once per row tile, 16 KB per 2048 keys; a prefix of 32k keys is 16 blocks. So two launches'
// latency is what it takes, once for all layers.
#include "cuda/attention/rows.h"
#include "cuda/launch.h"

namespace simsd::intervals {
namespace {

constexpr int WARPS = 16, TILES = KEY_GROUP / TILE, PER_WARP = TILES / WARPS;
constexpr int MOST_ROWS = 128;  // of a row tile
constexpr int LISTERS = 1024;
constexpr int MUCH = TILES / 2;  // live tiles

// The place of a key: page * 16 + slot / 16, slot % 16 being the key's own; -1 if there is no such page.
SIMSD_DEVICE int place_of(const Mask& m, int batch, int key) {
    const int page = m.block_table[batch * m.table_strides[0] + key / m.page_size * m.table_strides[1]];
    return page < 0 || page >= m.pages ? -1 : page * 16 + key % m.page_size / PAGE_UNIT;
}

__global__ void __launch_bounds__(WARPS* WARP) mark_tiles(const Mask m) {
    Shared shared;
    int32_t* clocks = shared.take<int32_t>(MOST_ROWS);
    uint32_t* seen = shared.take<uint32_t>(TILES);
    uint32_t* full = shared.take<uint32_t>(TILES);
    const Plan& plan = m.plan;
    const int at = block_x(), row_tile = at % plan.row_tiles, key_group = at / plan.row_tiles % plan.key_groups;
    const Rows rows =
        locate_rows(m, at / plan.row_tiles / plan.key_groups, 0, row_tile * plan.tile_rows, plan.tile_rows);
    load_clocks(m, rows, clocks);

    const int lane = lane_index(), keys = live_slots(m, rows.batch);
    int32_t births[PER_WARP], deaths[PER_WARP];
#pragma unroll
    for (int i = 0; i < PER_WARP; ++i) {
        const int tile = warp_index() * PER_WARP + i, key = key_group * KEY_GROUP + tile * TILE + lane;
        births[i] = UNSEEN;
        deaths[i] = NEVER;
        int place = 0;
        if (key < keys) {
            if (m.block_table != nullptr) place = place_of(m, rows.batch, key);
            if (place >= 0) {
                births[i] = m.birth[rows.batch * m.birth_strides[0] + key * m.birth_strides[1]];
                deaths[i] = m.death[rows.batch * m.death_strides[0] + key * m.death_strides[1]];
            }
        }
        if (row_tile == 0 && lane % PAGE_UNIT == 0) {
            TilePlaces& places = plan.places[(at / plan.row_tiles) * TILES + tile];
            places.units[lane / PAGE_UNIT] = static_cast<uint32_t>(larger(place, 0));
        }
    }
    block_barrier();
    Span span{INT32_MAX, INT32_MIN};
    for (int i = lane; i < rows.queries; i += WARP) {
        if (clocks[i] >= 0) span = {smaller(span.first, clocks[i]), larger(span.last, clocks[i])};
    }
    span = {lanes_min(span.first), lanes_max(span.last)};
#pragma unroll
    for (int i = 0; i < PER_WARP; ++i) {
        const bool all = births[i] <= span.first && deaths[i] >= span.last && span.first <= span.last;
        bool sees = all;
        if (births[i] <= span.last && deaths[i] >= span.first) {
#pragma unroll 1
            for (int q = 0; q < rows.queries && !sees; ++q) {
                sees = clocks[q] >= 0 && visible(clocks[q], births[i], deaths[i]);
            }
        }
        const uint32_t votes = ballot(sees);
        const bool whole = warp_all(all);
        const int tile = warp_index() * PER_WARP + i;
        if (lane == 0) {
            plan.seen[static_cast<int64_t>(at) * TILES + tile] = seen[tile] = votes;
            full[tile] = whole;
        }
    }
    block_barrier();
    if (warp_index() < KEY_GROUP / WINDOW) {
        const int tile = warp_index() * WARP + lane;
        const TileBits bits{ballot(seen[tile] != 0), ballot(full[tile] != 0)};
        if (lane == 0) plan.bits[2 * at + warp_index()] = bits;
    }
}

// Those with much to do come first, so that blocks which take the list in turns end together.
__global__ void __launch_bounds__(LISTERS) list_groups(const Mask m) {
    Shared shared;
    int32_t* of_warps = shared.take<int32_t>(WARP);
    const Plan& plan = m.plan;
    const int lane = lane_index(), warps = thread_count() / WARP;
    int listed = 0;
    for (int much = 1; much >= 0; --much) {
        for (int first = 0; first < plan.count; first += thread_count()) {
            const int at = first + thread_index();
            int tiles = 0;
            if (at < plan.count) {
                tiles = count_bits(plan.bits[2 * at].live) + count_bits(plan.bits[2 * at + 1].live);
                if (tiles == 0) plan.place[at] = -1;
            }
            const bool mine = tiles != 0 && (tiles > MUCH) == (much != 0);
            const uint32_t votes = ballot(mine);
            if (lane == 0) of_warps[warp_index()] = count_bits(votes);
            block_barrier();
            const int found = lane < warps ? of_warps[lane] : 0;
            const int before = warp_sum(lane < warp_index() ? found : 0);
            if (mine) {
                const int place = listed + before + count_bits(votes & ((1u << lane) - 1));
                plan.list[place] = at;
                plan.place[at] = place;
            }
            listed += warp_sum(found);
            block_barrier();
        }
    }
    // Every word is written: plans of the same mask are the same.
    for (int i = listed + thread_index(); i < plan.count; i += thread_count()) plan.list[i] = -1;
    if (thread_index() < HEADER) plan.listed[thread_index()] = thread_index() == 0 ? listed : 0;
}

}  // namespace

void launch_plan(const char* op, const Mask& mask, bool list, Stream stream) {
    const Plan& plan = mask.plan;
    const int bytes = 4 * (MOST_ROWS + 2 * TILES);
    launch(op, mark_tiles, {plan.count}, WARPS * WARP, bytes, stream, mask);
    const int threads = smaller(LISTERS, larger(1, (plan.count + WARP - 1) / WARP) * WARP);
    if (list) launch(op, list_groups, {1}, threads, 4 * WARP, stream, mask);
}

}  // namespace simsd::intervals
