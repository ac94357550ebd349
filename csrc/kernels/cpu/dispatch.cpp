// Chooses the instruction set once, at load, and forwards the entry points to it.
#include "../batch_norm.h"
#include "../group_norm.h"
#include "partition.h"
#include "processor.h"

#if defined(__linux__)
#include <unistd.h>

#include <cstdio>
#endif

namespace normfused::cpu {

#define NORMFUSED_DECLARE(set)                                          \
  namespace set {                                                       \
  void batch_norm_forward(const BatchNormForward& args, ParallelFor);   \
  void batch_norm_backward(const BatchNormBackward& args, ParallelFor); \
  void group_norm_forward(const GroupNormForward& args, ParallelFor);   \
  void group_norm_backward(const GroupNormBackward& args, ParallelFor); \
  }

NORMFUSED_DECLARE(baseline)
#if defined(__x86_64__)
NORMFUSED_DECLARE(avx2)
NORMFUSED_DECLARE(avx512)
#endif

namespace {

struct Kernels {
  const char* instruction_set;
  void (*batch_norm_forward)(const BatchNormForward&, ParallelFor);
  void (*batch_norm_backward)(const BatchNormBackward&, ParallelFor);
  void (*group_norm_forward)(const GroupNormForward&, ParallelFor);
  void (*group_norm_backward)(const GroupNormBackward&, ParallelFor);
};

#define NORMFUSED_KERNELS(set) \
  {#set, set::batch_norm_forward, set::batch_norm_backward, set::group_norm_forward, set::group_norm_backward}

constexpr Kernels kKernels[] = {
#if defined(__x86_64__)
    NORMFUSED_KERNELS(avx512),
    NORMFUSED_KERNELS(avx2),
#endif
    NORMFUSED_KERNELS(baseline),
};

bool supported([[maybe_unused]] const Kernels& kernels) {
#if defined(__x86_64__)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (kernels.batch_norm_forward == avx512::batch_norm_forward) {
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (kernels.batch_norm_forward == avx2::batch_norm_forward) return has_avx2;
#endif
  return true;
}

const Kernels* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const Kernels* kernels = kKernels;
  while (!supported(*kernels)) ++kernels;
  return kernels;
}

int64_t find_last_cache_bytes() {
  int64_t bytes = 0;
#if defined(__linux__)
  // What a core can reach. The C library's number may be that of a whole socket of such caches.
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    long long size = 0;
    char unit = 0;
    if (std::fscanf(file, "%lld%c", &size, &unit) == 2 && unit == 'K') bytes = int64_t{size} << 10;
    std::fclose(file);
  }
#endif
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (bytes <= 0) bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  // Of a larger one, which more cores share, a program gets no more than that. (Measured.)
  constexpr int64_t kMost = int64_t{64} << 20;
  return bytes > kMost ? kMost : bytes > 0 ? bytes : int64_t{32} << 20;
}

bool find_asks_ahead() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

const int64_t last_cache = find_last_cache_bytes();
const bool asks = find_asks_ahead();

const Kernels* const chosen = best();
// What a test may set with use_instruction_set.
const Kernels* current = chosen;

// float64 has no kernels for AVX-512: they would be a fifth of its code and, measured, hardly faster than AVX2's.
const Kernels& kernels_for(Dtype dtype) {
#if defined(__x86_64__)
  if (dtype == Dtype::float64 && current->batch_norm_forward == avx512::batch_norm_forward) return kKernels[1];
#endif
  return *current;
}

}  // namespace

int64_t last_cache_bytes() { return last_cache; }
bool asks_ahead() { return asks; }

const char* instruction_set() { return current->instruction_set; }

bool use_instruction_set(const char* name) {
  for (const Kernels& kernels : kKernels) {
    if (__builtin_strcmp(kernels.instruction_set, name) == 0 && supported(kernels)) {
      current = &kernels;
      return true;
    }
  }
  return false;
}

int64_t batch_norm_workspace(const Extent& extent) { return batch_norm_workspace_bytes(extent); }

int64_t group_norm_workspace(const Extent& extent, int64_t groups) {
  return group_norm_workspace_bytes(extent, groups);
}

void batch_norm_forward(const BatchNormForward& args, ParallelFor parallel_for) {
  kernels_for(args.dtype).batch_norm_forward(args, parallel_for);
}

void batch_norm_backward(const BatchNormBackward& args, ParallelFor parallel_for) {
  kernels_for(args.dtype).batch_norm_backward(args, parallel_for);
}

void group_norm_forward(const GroupNormForward& args, ParallelFor parallel_for) {
  kernels_for(args.dtype).group_norm_forward(args, parallel_for);
}

void group_norm_backward(const GroupNormBackward& args, ParallelFor parallel_for) {
  kernels_for(args.dtype).group_norm_backward(args, parallel_for);
}

}  // namespace normfused::cpu
