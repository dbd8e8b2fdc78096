// What lives from step to step: the cache's layout, the current step, its plans, and the threads' scratch memory.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "kernels.h"
#include "plan.h"
#include "team.h"

namespace kvfold {

struct FreeMemory {
    void operator()(void *memory) const;
};

// Memory that begins at a cache line. It grows and never shrinks.
class Buffer {
  public:
    // At least `bytes` bytes; what was there is lost. Throws std::bad_alloc.
    char *reserve(int64_t bytes);

  private:
    std::unique_ptr<char, FreeMemory> memory_;
    int64_t bytes_ = 0;
};

struct Context {
    Cache cache;
    Number number;
    int64_t number_bytes;
    Path path;
    const Kernels *kernels;
    Team team;

    int64_t sequence_count;           // B
    std::vector<Sequence> sequences;  // [B], alike at every layer; [layers, B] once slots were evicted
    bool layers_differ;               // whether slots were evicted
    std::vector<int64_t> sources;     // [layers, B]
    std::vector<Plan> plans;          // made when a layer first needs one
    std::unique_ptr<std::atomic<int64_t>[]> pending;
    int64_t pending_size = 0;
    Buffer partials;
    Buffer scratch;
};

void begin_step(Context &context, int64_t count, const int64_t *rows, const int64_t *query_starts,
                const int64_t *kv_lengths, const int64_t *sources, const int64_t *slot_counts);

// [B], as the layer sees them.
const Sequence *sequences_at(const Context &context, int64_t layer);

// Runs all tasks of a layer. `call` lacks what the context knows.
void attend(Context &context, int64_t layer, Call call);

// Strides are in bytes.
struct Rows {
    const char *data;
    int64_t token;
    int64_t head;
    int64_t value;
};

void write_rows(Context &context, int64_t layer, int64_t tokens, Rows keys, Rows values);

}  // namespace kvfold
