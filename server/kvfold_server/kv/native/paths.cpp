#include "paths.h"

namespace kvfold {
namespace {

struct PathEntry {
    bool built;
    int64_t chunk;  // values that are read together
    const Kernels *(*kernels)(Number number);
    const LayerKernels *(*layer_kernels)(Number number);
};

constexpr PathEntry PATHS[PATH_COUNT] = {
    {true, 1, plain_kernels, plain_layer_kernels},
#ifdef KVFOLD_WITH_AVX2
    {true, 16, avx2_kernels, avx2_layer_kernels},
#else
    {false, 16, nullptr, nullptr},
#endif
#ifdef KVFOLD_WITH_AVX512
    {true, 32, avx512_kernels, avx512_layer_kernels},
#else
    {false, 32, nullptr, nullptr},
#endif
#ifdef KVFOLD_WITH_AVX512_BF16
    {true, 32, avx512_bf16_kernels, avx512_bf16_layer_kernels},
#else
    {false, 32, nullptr, nullptr},
#endif
};

bool processor_has(Path path) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    switch (path) {
        case AVX2: return avx2;
        case AVX512: return avx512;
        case AVX512_BF16: return avx512 && __builtin_cpu_supports("avx512bf16");
        default: return path == PLAIN;
    }
#else
    return path == PLAIN;
#endif
}

}  // namespace

bool path_available(Path path) {
    return path >= PLAIN && path < PATH_COUNT && PATHS[path].built && processor_has(path);
}

bool path_fits(Path path, int64_t first_width, int64_t second_width) {
    return first_width % PATHS[path].chunk == 0 && second_width % PATHS[path].chunk == 0;
}

Path best_path(int64_t first_width, int64_t second_width) {
    for (int32_t path = PATH_COUNT - 1; path > PLAIN; --path) {
        if (path_available(Path(path)) && path_fits(Path(path), first_width, second_width)) return Path(path);
    }
    return PLAIN;
}

const LayerKernels *find_layer_kernels(Path path, Number number) { return PATHS[path].layer_kernels(number); }

const Kernels *find_path_kernels(Path path, Number number) { return PATHS[path].kernels(number); }

}  // namespace kvfold
