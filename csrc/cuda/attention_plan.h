// What a mask leaves to read, found out once for all layers: which keys some row of a tile of rows sees.
//
// Keys come in tiles of 32, windows of 32 tiles and key groups of two windows; rows in tiles of as many as a block of
// threads has. An (element, key group, row tile) is numbered (element * key_groups + key group) * row_tiles + row tile.
#pragma once

#include <cstdint>

#include "cuda/numbers.h"
#include "cuda/stream.h"

namespace simsd::intervals {

constexpr int TILE = 32;         // keys that are loaded together; a warp classifies a tile with one vote
constexpr int SPLIT = 256;       // keys that one softmax runs over before it is added to its key group's
constexpr int GROUP_SPLITS = 8;  // whose sum is added to the others of a row
constexpr int KEY_GROUP = GROUP_SPLITS * SPLIT;
constexpr int WINDOW = 32 * TILE;
constexpr int PAGE_UNIT = 16;  // keys that lie in one page for certain
constexpr int HEADER = 4;      // words of a plan before its arrays
constexpr int MOST_PAGES = 1 << 27;

// Bit t: of a window's tile t some live row sees a key; all live rows see all keys.
struct alignas(8) TileBits {
    uint32_t live, full;
};

// Where each 16 keys of a tile lie: page * 16 + their first slot / 16.
struct alignas(8) TilePlaces {
    uint32_t units[TILE / PAGE_UNIT];
};

// Rows of a row tile: 128 share the keys that are read, but 64 fill a GPU where there are few rows and keys (of 8 KV
// heads 132 multiprocessors).
inline int tile_rows(int64_t batch, int64_t rows, int64_t keys) {
    const int64_t blocks = batch * ((keys + SPLIT - 1) / SPLIT) * ((rows + 127) / 128);
    return rows <= 64 || blocks < 16 ? 64 : 128;
}

struct Plan {
    int32_t tile_rows, row_tiles, key_groups, count;  // count: of (element, key group, row tile)s
    int32_t* listed;                                  // how many of them have a live tile
    TileBits* bits;                                   // [count, 2]: of both windows
    TilePlaces* places;                               // [B, key_groups, 64], where there is a block table
    uint32_t* seen;                                   // [count, 64]: by tile, which keys some live row sees
    int32_t* list;                                    // the live ones
    int32_t* place;                                   // [count]: where they are in the list, -1 for the others
};

// Strides count elements.
struct Mask {
    const int32_t* clock;        // [B, Lq]
    const int32_t* birth;        // [B, Lk]
    const int32_t* death;        // [B, Lk]
    const int32_t* kv_len;       // [B] or null
    const int32_t* block_table;  // [B, n_pages] or null
    int64_t clock_strides[2], birth_strides[2], death_strides[2], kv_len_stride, table_strides[2];
    int32_t batch, group, q_rows, keys;  // group: query heads per KV head
    int32_t page_size, pages;            // of K and V, where there is a block table
    Plan plan;
};

// Words of the plan for B x (group * Lq) packed rows and B x Lk keys, fewer than 2^31:
// simsd_kernels/attention_plan/size.py says the same to a compiler.
inline int64_t plan_words(int64_t batch, int64_t rows, int64_t keys) {
    constexpr int64_t TILES = KEY_GROUP / TILE;
    const int64_t of_tile = tile_rows(batch, rows, keys), row_tiles = (rows + of_tile - 1) / of_tile;
    const int64_t key_groups = batch * ((keys + KEY_GROUP - 1) / KEY_GROUP);
    return HEADER + (4 + TILES + 2) * key_groups * row_tiles + 2 * TILES * key_groups;
}

// How the plan lies in `words`, aligned to 8 bytes.
inline Plan plan_in(int32_t* words, int64_t batch, int64_t rows, int64_t keys) {
    constexpr int TILES = KEY_GROUP / TILE;
    Plan plan;
    plan.tile_rows = tile_rows(batch, rows, keys);
    plan.row_tiles = static_cast<int32_t>((rows + plan.tile_rows - 1) / plan.tile_rows);
    plan.key_groups = static_cast<int32_t>((keys + KEY_GROUP - 1) / KEY_GROUP);
    plan.count = static_cast<int32_t>(batch * plan.key_groups * plan.row_tiles);
    plan.listed = words;
    plan.bits = reinterpret_cast<TileBits*>(words + HEADER);
    plan.places = reinterpret_cast<TilePlaces*>(plan.bits + 2 * plan.count);
    plan.seen = reinterpret_cast<uint32_t*>(plan.places + TILES * batch * plan.key_groups);
    plan.list = reinterpret_cast<int32_t*>(plan.seen + static_cast<int64_t>(TILES) * plan.count);
    plan.place = plan.list + plan.count;
    return plan;
}

// Writes mask.plan; without `list` all of it but the list.
void launch_plan(const char* op, const Mask& mask, bool list, Stream stream);

}  // namespace simsd::intervals
