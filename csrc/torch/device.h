// What the operators need of the device that they run on. cpu/device.cpp and cuda/device.cpp implement it, each for a
// library of its own; everything else in the binding is the same source in both.
#pragma once

#include "../kernels/batch_norm.h"
#include "../kernels/group_norm.h"
#include "checks.h"

namespace normfused::binding::device {

// As torch spells it: "cpu", "cuda".
extern const char* const kType;
// What the message starts with where memory runs out, as torch's own does: programs look for it.
extern const char* const kOutOfMemory;
// Whether the kernels read and write per-channel arrays of a 16-bit x's own dtype; otherwise the binding converts them.
extern const bool kNarrowChannels;

bool holds(const Tensor& t);

// Whether the BatchNorm kernels apply a pre_activation together with these. normfused/ops.py says the same.
bool fuses_pre_activation(Activation pre_activation, Activation activation, bool residual);

// Uninitialised memory for a large output.
Tensor empty_output(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType scalar_type,
                    const Tensor& like, int64_t bytes);

// Counts a batch in num_batches_tracked, which fails if it is not one int64 on the device of x. As in
// torch.nn.BatchNorm, what turns out to be wrong with the batch later does not undo it.
class BatchCount {
 public:
  BatchCount(const char* op, const OptionalTensor& num_batches_tracked, const Tensor& x);
  ~BatchCount();
  BatchCount(const BatchCount&) = delete;

  // Sets the weight of the batch in the running statistics; without one, the average is cumulative.
  void set_momentum(std::optional<double> momentum, BatchNormForward& args) const;
  // The kernels have run, and have counted if that was theirs to do.
  void done() { pending_ = false; }

 private:
  OptionalTensor num_batches_tracked_;
  bool pending_ = false;
};

// Run the kernels on the device of x, with the workspace that they need; throw "normfused::op: ..." if they cannot.
void run(const char* op, const Tensor& x, BatchNormForward& args);
void run(const char* op, const Tensor& x, BatchNormBackward& args);
void run(const char* op, const Tensor& x, GroupNormForward& args);
void run(const char* op, const Tensor& x, GroupNormBackward& args);

}  // namespace normfused::binding::device
