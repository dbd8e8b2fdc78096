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
    int64_t layers;
    int64_t blocks_per_layer;
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

// One sequence of a step. Its queries are tokens [first_token, first_token + query_count) of the packed batch; the last
// of them is the last of its `length` tokens.
struct Sequence {
    int64_t row;
    int64_t first_token;
    int64_t query_count;
    int64_t length;
};

// Slots [first, stop) of a table.
struct SlotRange {
    int64_t first;
    int64_t stop;
};

// The slots that a sequence's query sees. A slot's index is its token's position, so causality and window make a range.
static inline SlotRange visible_slots(const Sequence &sequence, int64_t query, int64_t window) {
    const int64_t stop = sequence.length - sequence.query_count + query + 1;
    const int64_t first = window > 0 && stop > window ? stop - window : 0;
    return {first, stop};
}

static inline const int32_t *block_table(const Cache &cache, int64_t row, int64_t layer) {
    return cache.tables + (row * cache.layers + layer) * cache.blocks_per_layer;
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
