// Tiles of slots for decode: where their rows lie, and fetching them ahead of use.
#pragma once

#include "cache.h"
#include "scratch.h"

namespace kvfold {
namespace {

constexpr int GROUP = 16;     // slots whose dot products are made together
constexpr int MAX_TILE = 32;  // slots of a tile at most, a multiple of GROUP

// Two tiles, the one in work and the one that is being fetched, fit any second-level cache.
constexpr int64_t TILE_BYTES = 64 << 10;

// Slots of a tile; the row's size alone decides.
inline int tile_slots(const Cache &cache) { return MAX_TILE * cache.row_bytes <= TILE_BYTES ? MAX_TILE : GROUP; }

// The rows of slots [slot, slot + count); entries up to the next multiple of GROUP repeat the last row.
struct Tile {
    const char *rows[MAX_TILE];
    int64_t slot;
    int count;
};

inline int round_to_groups(int slots) { return (slots + GROUP - 1) / GROUP * GROUP; }

// Fills `tile` with up to `size` slots from `slot` on; it is empty from `stop` on.
inline void find_tile(const Cache &cache, const int32_t *table, int64_t slot, int64_t stop, int size, Tile &tile) {
    tile.slot = slot;
    tile.count = static_cast<int>(stop - slot < size ? stop - slot : size);
    if (tile.count <= 0) {
        tile.count = 0;
        return;
    }
    int64_t in_block = slot % cache.tokens_per_block;
    const char *row = slot_row(cache, table, slot);
    for (int i = 0; i < tile.count; ++i) {
        if (in_block == cache.tokens_per_block) {
            in_block = 0;
            row = slot_row(cache, table, slot + i);
        }
        tile.rows[i] = row;
        row += cache.row_bytes;
        ++in_block;
    }
    for (int i = tile.count; i < round_to_groups(tile.count); ++i) tile.rows[i] = tile.rows[tile.count - 1];
}

// Fetches what a task needs of a tile's rows, a few lines at a time between pieces of other work.
//
// Into the second-level cache: the first level can wait for too few lines at once to use the memory's whole speed, and
// blocks lie in any order, so that the processor cannot guess the next one.
class Fetcher {
  public:
    Fetcher(const Cache &cache, const Tile &tile, int64_t first_head, int64_t stop_head)
        : tile_(tile),
          keys_{key_offset(cache, first_head), key_offset(cache, stop_head)},
          values_{value_offset(cache, first_head), value_offset(cache, stop_head)},
          offset_(keys_.first) {}

    // Lines of the whole tile.
    int64_t lines() const {
        const int64_t bytes = keys_.stop - keys_.first + values_.stop - values_.first;
        return tile_.count * (bytes / CACHE_LINE + 2);
    }

    void fetch(int64_t lines) {
        for (; lines > 0 && row_ < tile_.count; --lines) {
            __builtin_prefetch(tile_.rows[row_] + offset_, 0, 2);
            offset_ += CACHE_LINE;
            if (offset_ >= keys_.stop && offset_ < values_.first) offset_ = values_.first;
            if (offset_ >= values_.stop) {
                offset_ = keys_.first;
                ++row_;
            }
        }
    }

  private:
    struct Bytes {
        int64_t first;
        int64_t stop;
    };

    const Tile &tile_;
    Bytes keys_;
    Bytes values_;
    int64_t offset_;
    int row_ = 0;
};

}  // namespace
}  // namespace kvfold
