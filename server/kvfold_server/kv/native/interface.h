// The C interface of the native library, which Python calls through ctypes: attention (kv/backends/native.py), and what
// layers compute between their matrix products (layer_ops.py).
//
// One context serves one arena. A step is `begin`, then for each layer `write` and `attend`; calls of one context must
// not overlap. Functions that can fail return 0 or one of the error codes below; nothing throws across this boundary.
#pragma once

#include <cstdint>

#define KVFOLD_EXPORT extern "C" __attribute__((visibility("default")))

namespace kvfold {

// Raised whenever a signature or a struct below changes; the Python side refuses a library of another version.
constexpr int32_t INTERFACE_VERSION = 5;

enum Error : int32_t { OK = 0, OUT_OF_MEMORY = 1, NO_SUCH_PATH = 2, NO_SUCH_NUMBER = 3 };

// How one value of K, V, query and output is stored.
enum Number : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// Instruction sets, from the most portable to the most special.
enum Path : int32_t { PLAIN = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, PATH_COUNT = 4, BEST_PATH = -1 };

// The arena and the block tables; see kvfold_server/kv/arena.py and kvfold_scheduler/block_tables.py. `slot_positions`
// [rows, layers, slots_per_layer] is null where nothing is ever evicted. The memory stays the caller's and must outlive
// the context. `parallel` is GOMP_parallel of the OpenMP runtime that the process already runs, or null: then
// everything runs on the calling thread.
struct CacheConfig {
    char *arena;
    const int32_t *tables;
    const int32_t *slot_positions;
    void *parallel;
    int64_t layers;
    int64_t blocks_per_layer;
    int64_t slots_per_layer;
    int64_t tokens_per_block;
    int64_t kv_heads;
    int64_t key_dim;
    int64_t value_dim;
    int32_t number;
    int32_t path;
};

struct Context;

// The threads that share the rows of the functions below; `parallel` as in CacheConfig.
struct Workers {
    void *parallel;
    int32_t threads;
};

// out = x / rms(x) * (weight + weight_offset) for rows of `width` values, contiguous; out may be in. x is in or, unless
// addend is null, in + addend, which goes to sum. `round_first` rounds to the model's numbers before the weight comes in,
// as most models do.
struct NormCall {
    const char *in;
    const char *addend;
    char *sum;
    const char *weight;
    char *out;
    int64_t width;
    float epsilon;
    float weight_offset;
    int32_t round_first;
};

enum Activation : int32_t { SILU = 0, GELU_TANH = 1 };

// out [rows, width] = activation(gate) * up; gate_up [rows, 2 * width] holds both side by side.
struct GateCall {
    const char *gate_up;
    char *out;
    int64_t width;
    int32_t activation;
};

// Heads of `dim` values, rotated in place. Strides are in values, of token and head; the dimensions lie side by side.
struct RotatedHeads {
    char *data;
    int64_t token;
    int64_t head;
    int64_t heads;
};

// Queries and keys, by the cosines and sines [tokens, dim] of their positions.
struct RotateCall {
    RotatedHeads parts[2];
    const char *cosine;
    const char *sine;
    int64_t dim;
};

// Rows [rows, width] in 8 bits: out * steps[row], less the zero point, is the row multiplied in blocks of `block` values
// by the Hadamard matrix of that size (1 and -1, Sylvester's order). `block` is a power of two of at most LARGEST_BLOCK
// that divides the width. The step of a row that holds something that is no finite number is no number either.
struct QuantizeCall {
    const char *in;
    uint8_t *out;
    float *steps;
    int64_t width;
    int64_t block;
};

constexpr int64_t LARGEST_BLOCK = 64;
constexpr int32_t ZERO_POINT = 128;
constexpr int32_t MOST_STEPS = 127;  // from the zero point, either way

// out [rows, width] = in * steps[row] + bias; bias [width] or null.
struct RestoreCall {
    const float *in;
    const float *steps;
    const char *bias;
    char *out;
    int64_t width;
};

// What a layer's projections gave for a step's tokens, and the positions by which queries and keys are rotated. Heads of
// `key_dim` or `value_dim` values lie side by side; strides, of tokens, are in values. The rest is as in `attend`.
struct ProjectedCall {
    int64_t layer;
    int64_t tokens;
    int64_t owner_tokens;
    int64_t heads;
    int64_t window;
    float scaling;
    float softcap;
    const float *sinks;
    char *query;
    int64_t query_token;
    char *key;
    int64_t key_token;
    const char *value;
    int64_t value_token;
    const char *cosine;
    const char *sine;
    char *out;
};

}  // namespace kvfold

KVFOLD_EXPORT int32_t kvfold_interface_version();

// Bit p is set if this machine can run path p and the library was built with it.
KVFOLD_EXPORT int32_t kvfold_paths();

// Creates a context. `config->path` is a path, or BEST_PATH for the fastest one that fits the machine and the head
// dimensions; a named path that does not fit them is refused.
KVFOLD_EXPORT int32_t kvfold_create(const kvfold::CacheConfig *config, kvfold::Context **context);

KVFOLD_EXPORT void kvfold_destroy(kvfold::Context *context);

// The path that the context uses.
KVFOLD_EXPORT int32_t kvfold_path(const kvfold::Context *context);

// Takes over a step's layout (copied): B sequences; rows [B], query_starts [B + 1], kv_lengths [B], sources [layers,
// B]. slot_counts [layers, B], or null if nothing was evicted; it needs the context's slot_positions.
KVFOLD_EXPORT int32_t kvfold_begin(kvfold::Context *context, int32_t threads, int64_t sequences, const int64_t *rows,
                                   const int64_t *query_starts, const int64_t *kv_lengths, const int64_t *sources,
                                   const int64_t *slot_counts);

// Stores K and V of the first `tokens` tokens in the tables of `layer`. Strides are in values, of token, head,
// dimension.
KVFOLD_EXPORT int32_t kvfold_write(kvfold::Context *context, int64_t layer, int64_t tokens, const char *key,
                                   int64_t key_token, int64_t key_head, int64_t key_value, const char *value,
                                   int64_t value_token, int64_t value_head, int64_t value_value);

// Attends with query [N, heads, key_dim] (strides in values; the last one is 1) and fills out [N, heads, value_dim],
// contiguous. window: 0 for none. softcap: 0 for none. sinks [heads] or null.
KVFOLD_EXPORT int32_t kvfold_attend(kvfold::Context *context, int64_t layer, int64_t heads, int64_t window,
                                    float scaling, float softcap, const float *sinks, const char *query,
                                    int64_t query_token, int64_t query_head, char *out);

// Rotates queries and keys in place, stores K and V of the owners' tokens, and attends.
KVFOLD_EXPORT int32_t kvfold_attend_projected(kvfold::Context *context, const kvfold::ProjectedCall *call);

// A layer's functions between its matrix products, on `rows` rows of numbers of the kind `number`.
KVFOLD_EXPORT int32_t kvfold_rms_norm(const kvfold::Workers *workers, int32_t number, const kvfold::NormCall *call,
                                      int64_t rows);
KVFOLD_EXPORT int32_t kvfold_gate(const kvfold::Workers *workers, int32_t number, const kvfold::GateCall *call,
                                  int64_t rows);
KVFOLD_EXPORT int32_t kvfold_rotate(const kvfold::Workers *workers, int32_t number, const kvfold::RotateCall *call,
                                    int64_t rows);
KVFOLD_EXPORT int32_t kvfold_quantize(const kvfold::Workers *workers, int32_t number, const kvfold::QuantizeCall *call,
                                      int64_t rows);
KVFOLD_EXPORT int32_t kvfold_restore(const kvfold::Workers *workers, int32_t number, const kvfold::RestoreCall *call,
                                     int64_t rows);
