// The stored numbers, as types, and the vectors that a page is read in. Included once by each path, inside its own
// namespace.
#pragma once

#include <cstdint>
#include <cstring>

namespace kvfold {
namespace {

struct Bf16 {
    uint16_t bits;
};

struct Fp16 {
    uint16_t bits;
};

template <class Number>
struct Tag {};

}  // namespace
}  // namespace kvfold
