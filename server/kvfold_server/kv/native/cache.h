// Where the values of a slot lie, and which slots a query sees.
//
// These are plain structs with static functions: every path is compiled with its own instruction set, and a function
// that the linker could share between them might carry instructions that the machine lacks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvfold {

struct Cache {
    char *arena;
    const int32_t *tables;
    const int32_t *slot_positions;
    int64_t layers;
    int64_t blocks_per_layer;
    int64_t slots_per_layer;
    int64_t tokens_per_block;
    int64_t kv_heads;
    int64_t key_dim;
    int64_t value_dim;
    // Bytes of one head's key, of its value, of a token row and of a block, as the page format stores them.
    int64_t key_bytes;
    int64_t value_bytes;
    int64_t row_bytes;
    int64_t block_bytes;
};

// One sequence of a step, as one layer sees it. Its queries are tokens [first_token, first_token + query_count) of the
// packed batch; the last of them is the last of its `length` tokens, and lies in the last of the `slot_count` slots
// that are in use. `positions` of those slots, ascending; null if none was evicted: then slot i holds position i.
struct Sequence {
    int64_t row;
    int64_t first_token;
    int64_t query_count;
    int64_t length;
    int64_t slot_count;
    const int32_t *positions;
};

// Slots [first, stop) of a table.
struct SlotRange {
    int64_t first;
    int64_t stop;
};

// The first of `count` ascending positions that is larger than `bound`; `count` if none is.
static inline int64_t first_above(const int32_t *positions, int64_t count, int64_t bound) {
    int64_t first = 0;
    while (count > 0) {
        const int64_t half = count / 2;
        if (positions[first + half] > bound) {
            count = half;
        } else {
            first += half + 1;
            count -= half + 1;
        }
    }
    return first;
}

// The slots that a sequence's query sees. Slots ascend in position, so causality and window make a range of them.
static inline SlotRange visible_slots(const Sequence &sequence, int64_t query, int64_t window) {
    const int64_t behind = sequence.query_count - query - 1;  // tokens that follow the query's own
    const int64_t stop = sequence.slot_count - behind;
    const int64_t hidden = sequence.length - behind - window;  // the query sees positions from this one on
    if (window == 0 || hidden <= 0) return {0, stop};
    if (sequence.positions == nullptr) return {hidden, stop};
    return {first_above(sequence.positions, stop, hidden - 1), stop};
}

static inline const int32_t *block_table(const Cache &cache, int64_t row, int64_t layer) {
    return cache.tables + (row * cache.layers + layer) * cache.blocks_per_layer;
}

static inline const int32_t *table_positions(const Cache &cache, int64_t row, int64_t layer) {
    return cache.slot_positions + (row * cache.layers + layer) * cache.slots_per_layer;
}

static inline char *slot_row(const Cache &cache, const int32_t *table, int64_t slot) {
    const int64_t block = slot / cache.tokens_per_block;
    return cache.arena + table[block] * cache.block_bytes + (slot - block * cache.tokens_per_block) * cache.row_bytes;
}

static inline int64_t key_offset(const Cache &cache, int64_t kv_head) { return kv_head * cache.key_bytes; }

static inline int64_t value_offset(const Cache &cache, int64_t kv_head) {
    return cache.kv_heads * cache.key_bytes + kv_head * cache.value_bytes;
}

}  // namespace kvfold
