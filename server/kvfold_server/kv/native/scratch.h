// Carves a thread's scratch memory into arrays.
#pragma once

#include <cstdint>

namespace kvfold {
namespace {

constexpr int64_t CACHE_LINE = 64;

inline int64_t round_to_lines(int64_t bytes) { return (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE; }

// The next `count` elements of a scratch area, aligned to a cache line; moves `position` behind them.
template <class Element>
inline Element *take(char *&position, int64_t count) {
    Element *array = reinterpret_cast<Element *>(position);
    position += round_to_lines(count * static_cast<int64_t>(sizeof(Element)));
    return array;
}

}  // namespace
}  // namespace kvfold
