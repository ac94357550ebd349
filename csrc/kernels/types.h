// The vocabulary that the binding and the kernels share. Torch-free.
#pragma once

#include <cstdint>

#include "inline.h"

namespace normfused {

enum class Dtype { float32, float64, bfloat16, float16 };

enum class Activation { identity, relu, relu6, silu, hardswish, sigmoid, leaky_relu };

enum class MemoryFormat { contiguous, channels_last };

// How the work of a CUDA call is divided. See cuda/launch_plan.h, which takes another one where that one cannot serve.
enum class Path { automatic, empty, one_kernel, two_kernels, block, cluster, cooperative };

// An input seen as N x C x S (contiguous) or N x S x C (channels_last).
struct Extent {
  int64_t N, C, S;
  MemoryFormat format;

  NORMFUSED_INLINE int64_t numel() const { return N * C * S; }
};

// Runs body(begin, end, context) over disjoint ranges that cover [0, tasks), possibly on several threads. What a task
// computes must not depend on how the tasks are divided.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t tasks, ParallelBody body, void* context);

}  // namespace normfused
