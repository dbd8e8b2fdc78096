// Storing the K and V of a step's tokens in their slots.
#include <algorithm>
#include <cstring>

#include "context.h"

namespace kvfold {
namespace {

// Copies less than this are done before other threads have woken up.
constexpr int64_t SHARED_BYTES = 1 << 18;

constexpr int64_t TOKENS_AT_ONCE = 16;

struct Copy {
    const Context *context;
    const Sequence *sequences;
    int64_t layer;
    int64_t tokens;
    Rows keys;
    Rows values;
    std::atomic<int64_t> next_token;
};

// Copies one token's heads, `dim` values each, to where they lie side by side.
void copy_heads(const Rows &rows, int64_t token, int64_t heads, int64_t dim, int64_t value_bytes, char *target) {
    const char *source = rows.data + token * rows.token;
    const int64_t head_bytes = dim * value_bytes;
    if (rows.value == value_bytes && rows.head == head_bytes) {
        std::memcpy(target, source, static_cast<size_t>(heads * head_bytes));
        return;
    }
    for (int64_t head = 0; head < heads; ++head) {
        for (int64_t d = 0; d < dim; ++d) {
            std::memcpy(target + head * head_bytes + d * value_bytes, source + head * rows.head + d * rows.value,
                        static_cast<size_t>(value_bytes));
        }
    }
}

// Copies tokens [first, stop) of the batch, all of sequence `sequence`.
void copy_tokens(const Copy &copy, int64_t sequence, int64_t first, int64_t stop) {
    const Context &context = *copy.context;
    const Cache &cache = context.cache;
    const Sequence &owner = copy.sequences[sequence];
    const int32_t *table = block_table(cache, owner.row, copy.layer);
    const int64_t first_slot = owner.slot_count - owner.query_count - owner.first_token;
    for (int64_t token = first; token < stop; ++token) {
        char *row = slot_row(cache, table, first_slot + token);
        copy_heads(copy.keys, token, cache.kv_heads, cache.key_dim, context.number_bytes, row);
        copy_heads(copy.values, token, cache.kv_heads, cache.value_dim, context.number_bytes,
                   row + value_offset(cache, 0));
    }
}

void take_tokens(void *argument) {
    Copy &copy = *static_cast<Copy *>(argument);
    const Sequence *sequences = copy.sequences;
    const Sequence *end_of_sequences = sequences + copy.context->sequence_count;
    for (;;) {
        int64_t token = copy.next_token.fetch_add(TOKENS_AT_ONCE, std::memory_order_relaxed);
        if (token >= copy.tokens) return;
        const int64_t stop = std::min(token + TOKENS_AT_ONCE, copy.tokens);
        auto after = std::upper_bound(sequences, end_of_sequences, token,
                                      [](int64_t wanted, const Sequence &s) { return wanted < s.first_token; });
        for (int64_t index = after - sequences - 1; token < stop; ++index) {
            const int64_t end = std::min(stop, sequences[index].first_token + sequences[index].query_count);
            copy_tokens(copy, index, token, end);
            token = end;
        }
    }
}

}  // namespace

void write_rows(Context &context, int64_t layer, int64_t tokens, Rows keys, Rows values) {
    Copy copy{&context, sequences_at(context, layer), layer, tokens, keys, values, {0}};
    if (tokens * context.cache.row_bytes < SHARED_BYTES) {
        take_tokens(&copy);
    } else {
        run(context.team, take_tokens, &copy);
    }
}

}  // namespace kvfold
