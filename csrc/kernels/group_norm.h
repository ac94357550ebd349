// Entry points of the GroupNorm kernels; types and conventions as in batch_norm.h.
#pragma once

#include "cuda/status.h"
#include "types.h"

namespace normfused {

// y = act((x - mean) * rstd * weight + bias), the statistics per sample and group.
struct GroupNormForward {
  Dtype dtype;
  Activation activation;
  Extent extent;
  int64_t groups;
  double eps;
  const void* x;
  const void* weight;  // or null
  const void* bias;    // or null
  void* y;
  void* mean;  // out, A[N, groups]
  void* rstd;  // out, A[N, groups]: 1 / sqrt(var + eps)
  void* workspace;
  // CUDA only.
  bool narrow_parameters = false;  // weight and bias are T
  Path path = Path::automatic;
};

struct GroupNormBackward {
  Dtype dtype;
  Activation activation;
  Extent extent;
  int64_t groups;
  const void* dy;
  const void* x;
  const void* weight;  // or null
  const void* bias;    // or null
  const void* mean;
  const void* rstd;
  void* dx;       // or null: not computed
  void* dweight;  // or null
  void* dbias;    // or null
  void* workspace;
  // CUDA only, as in the forward.
  bool narrow_parameters = false;
  Path path = Path::automatic;
};

namespace cpu {

int64_t group_norm_workspace(const Extent& extent, int64_t groups);
void group_norm_forward(const GroupNormForward& args, ParallelFor parallel_for);
void group_norm_backward(const GroupNormBackward& args, ParallelFor parallel_for);

}  // namespace cpu

namespace cuda {

Status group_norm_workspace(const GroupNormForward& args, int64_t* bytes);
Status group_norm_workspace(const GroupNormBackward& args, int64_t* bytes);
Status group_norm_forward(const GroupNormForward& args, void* stream);
Status group_norm_backward(const GroupNormBackward& args, void* stream);

}  // namespace cuda
}  // namespace normfused
