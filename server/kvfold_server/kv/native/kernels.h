// What the planner asks of a path: attention tasks, and the merging of their partial results.
#pragma once

#include <atomic>

#include "cache.h"
#include "interface.h"

namespace kvfold {

// A part of one sequence's attention that one thread computes. Decode: one query over slots [slots.first, slots.stop),
// all heads. Prefill: queries [first_query, first_query + query_count), over all that they see, of one KV head.
struct Task {
    bool decodes;
    int64_t sequence;
    int64_t first_query;
    int64_t query_count;
    int64_t kv_head;  // of prefill
    SlotRange slots;
    int64_t partial;  // where a decode task leaves its partial result, or NO_PARTIAL: it writes the output
    int64_t cost;
};

// One layer's attention over the whole batch.
struct Call {
    const Cache *cache;
    const Sequence *sequences;
    const int64_t *sources;  // [B]: the layer whose table each sequence reads
    const Task *tasks;
    int64_t task_count;
    const std::atomic<int64_t> *next_task;  // the one that is taken next, by any thread
    int64_t heads;
    int64_t window;
    float scaling;
    float softcap;
    const float *sinks;
    const char *query;
    int64_t query_token;
    int64_t query_head;
    char *out;
    float *partials;
};

constexpr int64_t NO_PARTIAL = -1;

// A decode query whose context several tasks share: partials [first, first + count) make its result.
struct Merge {
    int64_t sequence;
    int64_t first_partial;
    int64_t count;
};

// Floats of one head's partial result: its values not yet divided, the largest logit, and the sum of the exponentials.
static inline int64_t partial_floats(const Cache &cache) { return cache.value_dim + 2; }

using TaskKernel = void (*)(const Call &call, const Task &task, char *scratch);
using MergeKernel = void (*)(const Call &call, const Merge &merge);

// A path's functions for one page format and number of the model.
struct Kernels {
    TaskKernel decode;
    TaskKernel prefill;
    MergeKernel merge;
    int64_t (*scratch_bytes)(const Cache &cache, int64_t heads);
};

// Query rows (tokens times query heads of one KV head) of a prefill task: enough to make packing its keys cheap, few
// enough that its state stays in the second-level cache.
constexpr int64_t PREFILL_ROWS = 96;

static inline int64_t prefill_tokens(int64_t group) { return group < PREFILL_ROWS ? PREFILL_ROWS / group : 1; }

// One line for each path that the build could compile; a null table means that the path lacks the number.
const Kernels *plain_kernels(Number number);
const Kernels *avx2_kernels(Number number);
const Kernels *avx512_kernels(Number number);
const Kernels *avx512_bf16_kernels(Number number);

}  // namespace kvfold
