#include "interface.h"

#include <new>

#include "context.h"
#include "paths.h"

using namespace kvfold;

namespace {

int64_t bytes_of(Number number) { return number == FLOAT32 ? 4 : 2; }

Cache lay_out(const CacheConfig &config, int64_t number_bytes) {
    Cache cache{};
    cache.arena = config.arena;
    cache.tables = config.tables;
    cache.slot_positions = config.slot_positions;
    cache.layers = config.layers;
    cache.blocks_per_layer = config.blocks_per_layer;
    cache.slots_per_layer = config.slots_per_layer;
    cache.tokens_per_block = config.tokens_per_block;
    cache.kv_heads = config.kv_heads;
    cache.key_dim = config.key_dim;
    cache.value_dim = config.value_dim;
    cache.key_bytes = config.key_dim * number_bytes;
    cache.value_bytes = config.value_dim * number_bytes;
    cache.row_bytes = config.kv_heads * (cache.key_bytes + cache.value_bytes);
    cache.block_bytes = config.tokens_per_block * cache.row_bytes;
    return cache;
}

// Runs what may need memory; nothing else can fail.
template <class Body>
int32_t guarded(Body body) {
    try {
        body();
        return OK;
    } catch (const std::bad_alloc &) {
        return OUT_OF_MEMORY;
    }
}

}  // namespace

int32_t kvfold_interface_version() { return INTERFACE_VERSION; }

int32_t kvfold_paths() {
    int32_t bits = 0;
    for (int32_t path = PLAIN; path < PATH_COUNT; ++path) bits |= path_available(Path(path)) ? 1 << path : 0;
    return bits;
}

int32_t kvfold_create(const CacheConfig *config, Context **context) {
    if (config->number < FLOAT32 || config->number > FLOAT16) return NO_SUCH_NUMBER;
    const auto number = Number(config->number);
    Path path = best_path(config->key_dim, config->value_dim);
    if (config->path != BEST_PATH) {
        path = Path(config->path);
        if (!path_available(path) || !path_fits(path, config->key_dim, config->value_dim)) return NO_SUCH_PATH;
    }
    return guarded([&] {
        auto *made = new Context{};
        made->cache = lay_out(*config, bytes_of(number));
        made->number = number;
        made->number_bytes = bytes_of(number);
        made->path = path;
        made->kernels = find_path_kernels(path, number);
        made->team = {reinterpret_cast<ParallelFunction>(config->parallel), 1};
        *context = made;
    });
}

void kvfold_destroy(Context *context) { delete context; }

int32_t kvfold_path(const Context *context) { return context->path; }

int32_t kvfold_begin(Context *context, int32_t threads, int64_t sequences, const int64_t *rows,
                     const int64_t *query_starts, const int64_t *kv_lengths, const int64_t *sources,
                     const int64_t *slot_counts) {
    context->team.threads = threads;
    return guarded([&] { begin_step(*context, sequences, rows, query_starts, kv_lengths, sources, slot_counts); });
}

int32_t kvfold_write(Context *context, int64_t layer, int64_t tokens, const char *key, int64_t key_token,
                     int64_t key_head, int64_t key_value, const char *value, int64_t value_token, int64_t value_head,
                     int64_t value_value) {
    const int64_t bytes = context->number_bytes;
    write_rows(*context, layer, tokens, {key, key_token * bytes, key_head * bytes, key_value * bytes},
               {value, value_token * bytes, value_head * bytes, value_value * bytes});
    return OK;
}

int32_t kvfold_attend(Context *context, int64_t layer, int64_t heads, int64_t window, float scaling, float softcap,
                      const float *sinks, const char *query, int64_t query_token, int64_t query_head, char *out) {
    return guarded([&] {
        Call call{};
        call.heads = heads;
        call.window = window;
        call.scaling = scaling;
        call.softcap = softcap;
        call.sinks = sinks;
        call.query = query;
        call.query_token = query_token;
        call.query_head = query_head;
        call.out = out;
        attend(*context, layer, call);
    });
}

int32_t kvfold_attend_projected(Context *context, const ProjectedCall *call) {
    const Cache &cache = context->cache;
    const Workers workers = {reinterpret_cast<void *>(context->team.parallel), context->team.threads};
    const RotateCall rotation = {{{call->query, call->query_token, cache.key_dim, call->heads},
                                  {call->key, call->key_token, cache.key_dim, cache.kv_heads}},
                                 call->cosine,
                                 call->sine,
                                 cache.key_dim};
    kvfold_rotate(&workers, context->number, &rotation, call->tokens);
    if (call->owner_tokens > 0) {
        kvfold_write(context, call->layer, call->owner_tokens, call->key, call->key_token, cache.key_dim, 1, call->value,
                     call->value_token, cache.value_dim, 1);
    }
    return kvfold_attend(context, call->layer, call->heads, call->window, call->scaling, call->softcap, call->sinks,
                         call->query, call->query_token, cache.key_dim, call->out);
}
