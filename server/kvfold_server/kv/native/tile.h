// Groups of slots for decode: where their rows lie, and fetching them ahead of use.
#pragma once

#include "cache.h"
#include "scratch.h"

namespace kvfold {
namespace {

// Slots that are worked on together. Blocks hold a multiple of them (kvfold_scheduler/geometry.py), so that the rows of
// a tile lie side by side.
constexpr int GROUP = 16;

// Bytes of the smallest page of memory that has an address of its own to look up.
constexpr int64_t OS_PAGE = 4096;

// GROUP slots of a table, of which those in `seen` count.
struct Tile {
    const char *rows;
    SlotRange seen;

    bool is_whole() const { return seen.first == 0 && seen.stop == GROUP; }
};

// The tile from `slot` on, a multiple of GROUP; at least one of its slots is among `slots`.
inline Tile find_tile(const Cache &cache, const int32_t *table, SlotRange slots, int64_t slot) {
    const int64_t first = slots.first - slot;
    const int64_t stop = slots.stop - slot;
    return {slot_row(cache, table, slot), {first > 0 ? first : 0, stop < GROUP ? stop : GROUP}};
}

// Where the rows of a tile lie, from its first one on. Those that do not count are not read, since they may hold
// anything: the nearest one that counts stands for them.
struct RowOffsets {
    int64_t of[GROUP];

    RowOffsets(const Cache &cache, SlotRange seen) {
        for (int64_t i = 0; i < GROUP; ++i) {
            const int64_t row = i < seen.first ? seen.first : i < seen.stop ? i : seen.stop - 1;
            of[i] = row * cache.row_bytes;
        }
    }
};

// How many slots before it is read a tile's pages are looked up.
constexpr int64_t LOOK_UP_SLOTS = 8 * GROUP;

// Looks up the addresses of a tile's pages: that may take longer than reading memory, so it comes long before the lines
// are fetched. Always inlined: GCC drops calls of functions that only fetch.
[[gnu::always_inline]] inline void look_up_pages(const Cache &cache, const Tile &tile) {
    for (int64_t byte = 0; byte < GROUP * cache.row_bytes; byte += OS_PAGE) __builtin_prefetch(tile.rows + byte, 0, 2);
}

// One head's keys, or values, in the rows of a tile, and what to fetch while they are read, line by line: the same
// piece of the next tile, from memory to the second-level cache, and the piece that is read after this one, from there
// to the first level.
//
// Memory's whole speed needs more lines on their way at once than the first level can wait for, and blocks lie in any
// order, so that the processor cannot guess them. It drops fetches to the second level that come faster than memory
// answers: they go with the reading, evenly, and each line is asked for again when the piece after it is read.
//
// Where keys and values differ in size, some lines are asked for once only, and some that nobody needs are fetched.
struct Piece {
    const char *data;
    const char *next[2];  // for rows with even and with odd numbers
    const char *again;
    const char *soon;
    const int64_t *offsets;

    const char *row(int i) const { return data + offsets[i]; }

    // Fetches ahead for the line at `byte` of row `i`.
    [[gnu::always_inline]] void fetch(int i, int64_t byte) const {
        const int64_t offset = offsets[i] + byte;
        __builtin_prefetch(next[i % 2] + offset, 0, 2);
        __builtin_prefetch(again + offset, 0, 2);
        __builtin_prefetch(soon + offset, 0, 3);
    }
};

}  // namespace
}  // namespace kvfold
