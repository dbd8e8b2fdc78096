#include "context.h"

#include <cstdlib>
#include <new>

namespace kvfold {
namespace {

constexpr int64_t CACHE_LINE = 64;

Plan &plan_for(Context &context, int64_t layer, int64_t heads, int64_t window) {
    const int64_t served = context.layers_differ ? layer : EVERY_LAYER;
    for (Plan &plan : context.plans) {
        if (plan.layer == served && plan.heads == heads && plan.window == window) return plan;
    }
    context.plans.push_back(
        make_plan(context.cache, sequences_at(context, layer), context.sequence_count, served, heads, window));
    return context.plans.back();
}

struct Run {
    const Call *call;
    const Plan *plan;
    const Kernels *kernels;
    std::atomic<int64_t> *pending;  // for each merge of the plan, tasks that are not done
    char *scratch;
    int64_t scratch_stride;
    std::atomic<int64_t> next_task;
    std::atomic<int64_t> next_thread;
};

// One thread takes tasks until none is left. Whoever does the last task of a split query merges its partial results.
void take_tasks(void *argument) {
    Run &run = *static_cast<Run *>(argument);
    const std::vector<Task> &tasks = run.plan->tasks;
    const int64_t thread = run.next_thread.fetch_add(1, std::memory_order_relaxed);
    char *scratch = run.scratch + thread * run.scratch_stride;
    for (;;) {
        const int64_t index = run.next_task.fetch_add(1, std::memory_order_relaxed);
        if (index >= static_cast<int64_t>(tasks.size())) return;
        const Task &task = tasks[index];
        if (!task.decodes) {
            run.kernels->prefill(*run.call, task, scratch);
            continue;
        }
        run.kernels->decode(*run.call, task, scratch);
        if (task.partial == NO_PARTIAL) continue;
        const int64_t merge = run.plan->merge_of[task.sequence];
        if (run.pending[merge].fetch_sub(1, std::memory_order_acq_rel) == 1) {
            run.kernels->merge(*run.call, run.plan->merges[merge]);
        }
    }
}

}  // namespace

void FreeMemory::operator()(void *memory) const { std::free(memory); }

char *Buffer::reserve(int64_t bytes) {
    if (bytes > bytes_) {
        const int64_t rounded = (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
        memory_.reset(static_cast<char *>(std::aligned_alloc(CACHE_LINE, static_cast<size_t>(rounded))));
        bytes_ = memory_ ? rounded : 0;
        if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
}

void begin_step(Context &context, int64_t count, const int64_t *rows, const int64_t *query_starts,
                const int64_t *kv_lengths, const int64_t *sources, const int64_t *slot_counts) {
    const Cache &cache = context.cache;
    context.plans.clear();
    context.sequences.clear();
    context.sequence_count = count;
    context.layers_differ = slot_counts != nullptr;
    for (int64_t layer = 0; layer < (context.layers_differ ? cache.layers : 1); ++layer) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t queries = query_starts[i + 1] - query_starts[i];
            Sequence sequence = {rows[i], query_starts[i], queries, kv_lengths[i], kv_lengths[i], nullptr};
            if (context.layers_differ) sequence.slot_count = slot_counts[layer * count + i];
            if (sequence.slot_count < sequence.length) {
                sequence.positions = table_positions(cache, rows[i], sources[layer * count + i]);
            }
            context.sequences.push_back(sequence);
        }
    }
    context.sources.assign(sources, sources + cache.layers * count);
}

const Sequence *sequences_at(const Context &context, int64_t layer) {
    return context.sequences.data() + (context.layers_differ ? layer * context.sequence_count : 0);
}

void attend(Context &context, int64_t layer, Call call) {
    const Plan &plan = plan_for(context, layer, call.heads, call.window);
    const auto merges = static_cast<int64_t>(plan.merges.size());
    if (merges > context.pending_size) {
        context.pending = std::make_unique<std::atomic<int64_t>[]>(static_cast<size_t>(merges));
        context.pending_size = merges;
    }
    for (int64_t i = 0; i < merges; ++i) context.pending[i].store(plan.merges[i].count, std::memory_order_relaxed);

    const int64_t partial_bytes = partial_floats(context.cache) * call.heads * static_cast<int64_t>(sizeof(float));
    const int64_t needed = context.kernels->scratch_bytes(context.cache, call.heads);
    const int64_t stride = (needed + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    call.cache = &context.cache;
    call.sequences = sequences_at(context, layer);
    call.sources = context.sources.data() + layer * context.sequence_count;
    call.partials = reinterpret_cast<float *>(context.partials.reserve(plan.partial_count * partial_bytes));
    char *scratch = context.scratch.reserve(stride * context.team.threads);

    Run work{&call, &plan, context.kernels, context.pending.get(), scratch, stride, {0}, {0}};
    call.tasks = plan.tasks.data();
    call.task_count = static_cast<int64_t>(plan.tasks.size());
    call.next_task = &work.next_task;
    if (plan.total_cost < SHARED_COST) {
        take_tasks(&work);
    } else {
        run(context.team, take_tasks, &work);
    }
}

}  // namespace kvfold
