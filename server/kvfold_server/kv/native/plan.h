// Cuts a step's attention into tasks.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace kvfold {

// The tasks of all layers that have the same window, heads and slots in use, the costliest first.
struct Plan {
    int64_t layer;  // the only one that it serves, or EVERY_LAYER
    int64_t window;
    int64_t heads;
    int64_t total_cost;
    int64_t partial_count;
    std::vector<Task> tasks;
    std::vector<Merge> merges;
    std::vector<int64_t> merge_of;  // [B]: index into `merges`, or NO_MERGE
};

constexpr int64_t NO_MERGE = -1;
constexpr int64_t EVERY_LAYER = -1;

// How a sequence is cut into partial results depends on that sequence alone, so that its output does not depend, to the
// last bit, on what else is in the batch or on the number of threads.
Plan make_plan(const Cache &cache, const Sequence *sequences, int64_t count, int64_t layer, int64_t heads,
               int64_t window);

}  // namespace kvfold
