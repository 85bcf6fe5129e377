// A window of keys as a block of threads sees it that works without a plan: their lives, where they lie, and which of
// them no row of the block sees. What is unseen is neither loaded nor, where it shares a tile with seen keys, left to
// reach a product: zeros stand in its place, which changes no bit, since it weighs exactly zero.
#pragma once

#include "cuda/attention/rows.h"

namespace simsd::intervals {

template <int KEYS>
struct Window {
    static_assert(KEYS % 128 == 0 && KEYS / TILE <= WARP);
    static constexpr int SHARED_BYTES = 4 * (2 * KEYS + 2 * (KEYS / PAGE_UNIT) + KEYS / TILE);

    int32_t *birth, *death;  // shared [KEYS]; UNSEEN and NEVER past the end and where there is no page
    int32_t *page, *slot;    // shared [KEYS / PAGE_UNIT]; page -1: none
    uint32_t* seen;          // shared [KEYS / TILE]: by tile, which keys some row of the block sees

    SIMSD_DEVICE explicit Window(Shared& shared) {
        birth = shared.take<int32_t>(KEYS);
        death = shared.take<int32_t>(KEYS);
        page = shared.take<int32_t>(KEYS / PAGE_UNIT);
        slot = shared.take<int32_t>(KEYS / PAGE_UNIT);
        seen = shared.take<uint32_t>(KEYS / TILE);
    }

    // Reads the lives and places of keys start ... start + KEYS - 1, those before `keys`. A barrier must follow.
    SIMSD_DEVICE void fetch(const Params& p, const Rows& rows, int keys, int start) const {
#pragma unroll 1
        for (int i = thread_index(); i < KEYS / PAGE_UNIT; i += thread_count()) {
            const int key = start + i * PAGE_UNIT;
            if (p.block_table == nullptr) {
                page[i] = rows.batch;
                slot[i] = key;
                continue;
            }
            int32_t found = -1;
            if (key < keys) {
                found = p.block_table[rows.batch * p.table_strides[0] + key / p.page_size * p.table_strides[1]];
            }
            page[i] = found < p.pages ? larger(found, -1) : -1;
            slot[i] = key % p.page_size;
        }
        constexpr int AT_ONCE = 4;  // loads that do not wait for each other
#pragma unroll 1
        for (int first = thread_index(); first < KEYS; first += AT_ONCE * thread_count()) {
            int32_t births[AT_ONCE], deaths[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int local = first + i * thread_count(), key = start + local;
                births[i] = UNSEEN;
                deaths[i] = NEVER;
                if (local < KEYS && key < keys) {
                    births[i] = p.birth[rows.batch * p.birth_strides[0] + key * p.birth_strides[1]];
                    deaths[i] = p.death[rows.batch * p.death_strides[0] + key * p.death_strides[1]];
                }
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int local = first + i * thread_count();
                if (local < KEYS) {
                    birth[local] = births[i];
                    death[local] = deaths[i];
                }
            }
        }
    }

    // Finds out which keys the block's live queries see, whose moments `span` holds. A barrier must follow.
    SIMSD_DEVICE void resolve(const int32_t* clocks, int queries, const Span& span) const {
#pragma unroll 1
        for (int tile = warp_index(); tile < KEYS / TILE; tile += thread_count() / WARP) {
            const int key = tile * TILE + lane_index();
            bool sees = false;
            if (page[key / PAGE_UNIT] < 0) {
                birth[key] = UNSEEN;
                death[key] = NEVER;
            } else if (birth[key] <= span.last && death[key] >= span.first) {
#pragma unroll 1
                for (int i = 0; i < queries && !sees; ++i) {
                    sees = clocks[i] >= 0 && visible(clocks[i], birth[key], death[key]);
                }
            }
            const uint32_t votes = ballot(sees);
            if (lane_index() == 0) seen[tile] = votes;
        }
    }

    // Bit t: some row of the block sees a key of tile t (warp).
    SIMSD_DEVICE uint32_t live_tiles() const { return ballot(lane_index() < KEYS / TILE && seen[lane_index()] != 0); }
};

}  // namespace simsd::intervals
