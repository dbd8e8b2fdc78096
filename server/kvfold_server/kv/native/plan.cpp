#include "plan.h"

#include <algorithm>

namespace kvfold {
namespace {

// Slots of a partial result at most: long enough that starting and merging it costs 1 to 2%, short enough to occupy
// many cores.
constexpr int64_t PARTITION_SLOTS = 256;

// Partitions start at multiples of this, which is the tile of the decode kernel.
constexpr int64_t PARTITION_ALIGNMENT = 16;

// Costs in processor cycles, roughly; only their ratios matter.
constexpr int64_t DECODE_BYTES_PER_COST = 4;
constexpr int64_t PREFILL_VALUES_PER_COST = 32;

int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// The end of partition `index` of `count` in a range; the partitions are equal but for alignment.
int64_t partition_stop(SlotRange range, int64_t index, int64_t count) {
    const int64_t start = range.first / PARTITION_ALIGNMENT * PARTITION_ALIGNMENT;
    const int64_t size = divide_up(divide_up(range.stop - start, count), PARTITION_ALIGNMENT) * PARTITION_ALIGNMENT;
    return std::min(range.stop, start + (index + 1) * size);
}

void add_decode(Plan &plan, const Cache &cache, const Sequence &sequence, int64_t index) {
    const SlotRange range = visible_slots(sequence, 0, plan.window);
    const int64_t partitions = divide_up(range.stop - range.first, PARTITION_SLOTS);
    const int64_t first_partial = plan.partial_count;
    int64_t first = range.first;
    for (int64_t partition = 0; partition < partitions; ++partition) {
        const int64_t stop = partition_stop(range, partition, partitions);
        if (stop <= first) break;  // alignment left nothing for the last one
        const int64_t partial = partitions > 1 ? plan.partial_count++ : NO_PARTIAL;
        const int64_t cost = (stop - first) * cache.row_bytes / DECODE_BYTES_PER_COST;
        plan.tasks.push_back({true, index, 0, 1, 0, {first, stop}, partial, cost});
        first = stop;
    }
    if (partitions > 1) {
        plan.merge_of[index] = static_cast<int64_t>(plan.merges.size());
        plan.merges.push_back({index, first_partial, plan.partial_count - first_partial});
    }
}

void add_prefill(Plan &plan, const Cache &cache, const Sequence &sequence, int64_t index) {
    const int64_t group = plan.heads / cache.kv_heads;
    const int64_t tokens = prefill_tokens(group);
    for (int64_t first = 0; first < sequence.query_count; first += tokens) {
        const int64_t count = std::min(tokens, sequence.query_count - first);
        const SlotRange slots = {visible_slots(sequence, first, plan.window).first,
                                 visible_slots(sequence, first + count - 1, plan.window).stop};
        const int64_t values = (slots.stop - slots.first) * (cache.key_dim + cache.value_dim);
        const int64_t cost = values * (count * group + 1) / PREFILL_VALUES_PER_COST;
        for (int64_t head = 0; head < cache.kv_heads; ++head) {
            plan.tasks.push_back({false, index, first, count, head, slots, NO_PARTIAL, cost});
        }
    }
}

}  // namespace

Plan make_plan(const Cache &cache, const Sequence *sequences, int64_t count, int64_t layer, int64_t heads,
               int64_t window) {
    Plan plan{layer, window, heads, 0, 0, {}, {}, std::vector<int64_t>(static_cast<size_t>(count), NO_MERGE)};
    for (int64_t index = 0; index < count; ++index) {
        if (sequences[index].query_count == 1) {
            add_decode(plan, cache, sequences[index], index);
        } else {
            add_prefill(plan, cache, sequences[index], index);
        }
    }
    std::stable_sort(plan.tasks.begin(), plan.tasks.end(),
                     [](const Task &a, const Task &b) { return a.cost > b.cost; });
    for (const Task &task : plan.tasks) plan.total_cost += task.cost;
    return plan;
}

}  // namespace kvfold
