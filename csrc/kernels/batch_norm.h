// Entry points of the BatchNorm kernels. Torch-free: raw pointers and sizes; nothing here allocates or throws.
//
// T is the element type that dtype names; A is double for float64 and float otherwise. Tensors x, y, dy, dx, residual
// and dresidual are dense T in extent's format; all per-channel arrays are A[C], but for those declared narrow: T[C].
#pragma once

#include "cuda/status.h"
#include "types.h"

namespace normfused {

// y = act((x' - mean) * invstd * weight + bias + residual), where x' = pre_activation(x), rounded to T.
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
  bool cumulative = false;         // the momentum is 1 / *num_batches_tracked instead
  bool narrow_parameters = false;  // weight and bias are T
  bool narrow_running = false;     // running_mean and running_var are T
  Path path = Path::automatic;
  Activation pre_activation = Activation::identity;
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
  // CUDA only, as in the forward.
  bool narrow_parameters = false;
  Path path = Path::automatic;
  Activation pre_activation = Activation::identity;
};

namespace cpu {

// Whether the kernels apply a pre_activation together with these; what they do not apply, others have to before.
NORMFUSED_INLINE bool fuses_pre_activation(Activation pre_activation, Activation activation, bool residual) {
  const bool selects = pre_activation == Activation::relu || pre_activation == Activation::relu6;
  return selects && activation == Activation::identity && !residual;
}

// Bytes of workspace that forward and backward need for an input, at most.
int64_t batch_norm_workspace(const Extent& extent);
void batch_norm_forward(const BatchNormForward& args, ParallelFor parallel_for);
void batch_norm_backward(const BatchNormBackward& args, ParallelFor parallel_for);

}  // namespace cpu

namespace cuda {

// Bytes of workspace that the very same call needs on the current device, args.workspace aside; nobody need initialise
// them.
Status batch_norm_workspace(const BatchNormForward& args, int64_t* bytes);
Status batch_norm_workspace(const BatchNormBackward& args, int64_t* bytes);
Status batch_norm_forward(const BatchNormForward& args, void* stream);
Status batch_norm_backward(const BatchNormBackward& args, void* stream);

// ++*num_batches_tracked and nothing else: for a call that fails where PyTorch's own has counted the batch already.
Status count_batch(int64_t* num_batches_tracked, void* stream);

}  // namespace cuda
}  // namespace normfused
