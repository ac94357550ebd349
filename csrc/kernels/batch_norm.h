// Entry points of the BatchNorm kernels. Torch-free: raw pointers and sizes; nothing here allocates or throws.
//
// T is the element type that dtype names; A is double for float64 and float otherwise. Tensors x, y, dy, dx, residual
// and dresidual are dense T in extent's format; all per-channel arrays are A[C].
#pragma once

#include "types.h"

namespace normfused {

// y = act((x - mean) * invstd * weight + bias + residual).
struct BatchNormForward {
  Dtype dtype;
  Activation activation;
  Extent extent;
  bool training;
  double momentum;  // weight of the new value in the running statistics
  double eps;
  const void* x;
  const void* residual;  // or null
  const void* weight;    // or null
  const void* bias;      // or null
  void* running_mean;    // training: updated, or null; evaluation: read
  void* running_var;     // likewise
  void* y;
  void* mean;    // out
  void* invstd;  // out: 1 / sqrt(var + eps)
  void* workspace;
  // CUDA only; on the CPU the caller counts. Training: incremented, or null.
  int64_t* num_batches_tracked = nullptr;
  bool cumulative = false;  // the momentum is 1 / *num_batches_tracked instead
};

// Gradients through the activation and the normalisation; in training also through the statistics.
struct BatchNormBackward {
  Dtype dtype;
  Activation activation;
  Extent extent;
  bool training;
  const void* dy;
  const void* x;
  const void* residual;  // or null
  const void* weight;    // or null
  const void* bias;      // or null
  const void* mean;
  const void* invstd;
  void* dx;         // or null: not computed
  void* dweight;    // or null
  void* dbias;      // or null
  void* dresidual;  // or null
  void* workspace;
};

namespace cpu {

// Bytes of workspace that forward and backward need for an input, at most.
int64_t batch_norm_workspace(const Extent& extent);
void batch_norm_forward(const BatchNormForward& args, ParallelFor parallel_for);
void batch_norm_backward(const BatchNormBackward& args, ParallelFor parallel_for);

}  // namespace cpu

namespace cuda {

using Status = int;  // 0 is success

// Bytes of workspace that forward or backward needs on the current device, at most; nobody need initialise them.
Status batch_norm_workspace(const Extent& extent, Dtype dtype, int64_t* forward_bytes, int64_t* backward_bytes);
Status batch_norm_forward(const BatchNormForward& args, void* stream);
Status batch_norm_backward(const BatchNormBackward& args, void* stream);

}  // namespace cuda
}  // namespace normfused
