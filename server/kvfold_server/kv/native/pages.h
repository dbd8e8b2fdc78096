// Page formats: how one head's key or value of a token is stored in its row.
//
// A format reads chunks of CHUNK_VECS vectors, in whatever order is cheapest; `arrange` brings a query into that order
// and `restore` brings a result back. Keys and values of different formats need nothing else from the kernels.
#pragma once

#include "numbers.h"

namespace kvfold {
namespace {

constexpr int CHUNK = CHUNK_VECS * LANES;

// Values as the numbers themselves.
template <class Number>
struct NumberPage {
    // Where a value lies in its vector.
    static constexpr int64_t byte(int64_t index) { return index * static_cast<int64_t>(sizeof(Number)); }

    static Chunk read(const char *vector, int64_t index) {
        return load_chunk(reinterpret_cast<const Number *>(vector) + index);
    }
    static Chunk arrange(Chunk x) { return to_page_order(Tag<Number>(), x); }
    static Chunk restore(Chunk x) { return to_natural_order(Tag<Number>(), x); }
};

template <class Number>
inline Chunk read_natural(const Number *p) {
    Chunk chunk;
    for (int v = 0; v < CHUNK_VECS; ++v) chunk.v[v] = load(p + v * LANES);
    return chunk;
}

template <class Number>
inline void write_natural(Number *p, Chunk chunk) {
    for (int v = 0; v < CHUNK_VECS; ++v) store(p + v * LANES, chunk.v[v]);
}

}  // namespace
}  // namespace kvfold
