// See describe.h.
#include "cpu/attention/describe.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/element.h"
#include "cpu/allocate.h"
#include "cpu/attention/memory.h"
#include "cpu/capability.h"

namespace simsd::attention {
namespace {

std::vector<TileRange> tile_ranges(const Problem& p) {
    std::vector<TileRange> tiles(p.batch * p.tile_count);
    for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t first = 0; first < p.key_count[b]; first += TILE) {
            const int64_t last = std::min(first + TILE, p.key_count[b]);
            const int32_t* birth = p.birth + b * p.keys;
            const int32_t* death = p.death + b * p.keys;
            TileRange tile{birth[first], birth[first], death[first], death[first]};
            for (int64_t j = first + 1; j < last; ++j) {
                tile.birth_min = std::min(tile.birth_min, birth[j]);
                tile.birth_max = std::max(tile.birth_max, birth[j]);
                tile.death_min = std::min(tile.death_min, death[j]);
                tile.death_max = std::max(tile.death_max, death[j]);
            }
            tiles[b * p.tile_count + first / TILE] = tile;
        }
    }
    return tiles;
}

// The tensor's int32 [B, N] values in one contiguous run, copied to `storage` if they are not one (or if `copy`).
const int32_t* contiguous_ints(const Tensor& tensor, std::vector<int32_t>& storage, bool copy = false) {
    const auto* data = static_cast<const int32_t*>(tensor.const_data_ptr());
    if (tensor.is_contiguous() && !copy) return data;
    const int64_t rows = tensor.size(0), columns = tensor.size(1), row_stride = tensor.stride(0);
    const int64_t column_stride = tensor.stride(1);
    storage.resize(rows * columns);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) storage[i * columns + j] = data[i * row_stride + j * column_stride];
    }
    return storage.data();
}

constexpr int32_t INF = 1 << 30;  // the birth of a dead key

// Table entries that are no page become -1. Returns whether that takes the page of a key that is not dead by itself.
bool mark_holes(const Problem& p, int64_t page_count, std::vector<int32_t>& pages) {
    bool takes_keys = false;
    for (size_t i = 0; i < pages.size(); ++i) {
        if (pages[i] >= 0 && pages[i] < page_count) continue;
        pages[i] = -1;
        const int32_t* birth = p.birth + i * p.page_size;
        bool lives = false;
        for (int64_t j = 0; j < p.page_size; ++j) lives |= birth[j] != INF;
        takes_keys |= lives;
    }
    return takes_keys;
}

// Makes the keys of holes dead at every clock.
void leave_out_holes(int64_t page_size, const std::vector<int32_t>& pages, std::vector<int32_t>& births,
                     std::vector<int32_t>& deaths) {
    for (size_t i = 0; i < pages.size(); ++i) {
        if (pages[i] >= 0) continue;
        std::fill_n(births.begin() + i * page_size, page_size, std::numeric_limits<int32_t>::max());
        std::fill_n(deaths.begin() + i * page_size, page_size, std::numeric_limits<int32_t>::min());
    }
}

}  // namespace

Problem describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& clock, const Tensor& birth,
                 const Tensor& death, const std::optional<Tensor>& kv_len, std::optional<double> scale,
                 const std::optional<Tensor>& block_table, Storage& storage) {
    Problem p{};
    p.element = element_of<Element>(q);
    p.q = q.const_data_ptr();
    p.k = k.const_data_ptr();
    p.v = v.const_data_ptr();
    for (int axis = 0; axis < 4; ++axis) {
        p.q_strides[axis] = q.stride(axis);
        p.k_strides[axis] = k.stride(axis);
        p.v_strides[axis] = v.stride(axis);
    }
    p.clock = contiguous_ints(clock, storage.clocks);
    p.birth = contiguous_ints(birth, storage.births);
    p.death = contiguous_ints(death, storage.deaths);
    if (block_table) {
        p.page_size = k.size(2);
        p.pages = contiguous_ints(*block_table, storage.pages, true);
        if (mark_holes(p, k.size(0), storage.pages)) {
            p.birth = contiguous_ints(birth, storage.births, true);
            p.death = contiguous_ints(death, storage.deaths, true);
            leave_out_holes(p.page_size, storage.pages, storage.births, storage.deaths);
        }
    }
    p.batch = q.size(0);
    p.kv_heads = k.size(1);
    p.group = q.size(1) / p.kv_heads;
    p.q_rows = q.size(2);
    p.keys = birth.size(1);
    p.dim = q.size(3);
    p.tile_count = divide_up(p.keys, TILE);
    p.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(p.dim))));

    storage.key_count.assign(p.batch, p.keys);
    if (kv_len) {
        const auto* lengths = static_cast<const int32_t*>(kv_len->const_data_ptr());
        for (int64_t b = 0; b < p.batch; ++b) {
            storage.key_count[b] = std::clamp<int64_t>(lengths[b * kv_len->stride(0)], 0, p.keys);
        }
    }
    p.key_count = storage.key_count.data();
    storage.tiles = tile_ranges(p);
    p.tiles = storage.tiles.data();
    return p;
}

Tensor allocate_heads(const Tensor& x) {
    const std::array<int64_t, 4> sizes{x.size(0), x.size(1), x.size(2), x.size(3)};
    const auto at_least_one = [&](int axis) { return std::max<int64_t>(sizes[axis], 1); };
    const int64_t head = at_least_one(3), row = head * at_least_one(1);
    const std::array<int64_t, 4> strides{row * at_least_one(2), head, row, 1};
    return allocate(sizes.data(), strides.data(), 4, x.scalar_type());
}

const Kernels& kernels() {
    switch (capability()) {
#if defined(__x86_64__)
        case Capability::avx512:
            return avx512_kernels();
        case Capability::avx2:
            return avx2_kernels();
#endif
        default:
            return portable_kernels();
    }
}

}  // namespace simsd::attention
