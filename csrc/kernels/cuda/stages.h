// The four stages that both families share: stats, apply, backward_reduce, backward_apply, and what finishes a
// reduction. BatchNorm is the case of one matrix whose groups are single channels.
#pragma once

#include "device.cuh"
#include "launch_plan.h"

namespace normfused::cuda {

template <class T>
struct Stage {
  using A = Accumulator<T>;
  Pass pass;
  Chunk chunk;
  int64_t groups;  // per matrix
  Activation activation, pre_activation;
  const T* x;
  const T* dy;
  const T* residual;  // or null
  T* out;             // y or dx, or null
  T* dresidual;       // or null
  const A* mean;      // [matrices][groups], and invstd
  const A* invstd;
  const void* weight;  // parameter_dtype[channels], or null
  const void* bias;    // or null
  Dtype parameter_dtype;
  const A* offset;  // [matrices][groups], or null: the gradient does not go through the statistics
  const A* slope;
  int64_t* num_batches_tracked;  // stats: incremented, or null
  double* partials;              // [matrices][splits][channels] of what the stage reduces

  NORMFUSED_INLINE int64_t depth() const { return pass.view.channels / groups; }
};

struct RunningStatistics {
  void* mean;  // dtype[channels], or null
  void* var;   // likewise
  Dtype dtype;
  double momentum;
  bool cumulative;               // the momentum is 1 / *num_batches_tracked
  int64_t* num_batches_tracked;  // incremented here only if the batch is empty
};

// The units that a launch holds on chip.
struct HeldUnits {
  Exchange exchange;
  int64_t first;               // of the launch
  double* parameter_partials;  // [N][splits][channels][2], or null: GroupNorm, backward
  unsigned* barrier;           // of a cooperative launch, 0 before it
};

template <class T>
Status stats(const Stage<T>& stage, void* stream);
template <class T>
Status apply(const Stage<T>& stage, void* stream);
template <class T>
Status backward_reduce(const Stage<T>& stage, void* stream);
template <class T>
Status backward_apply(const Stage<T>& stage, void* stream);

// All stages of a direction in one, statistics, parameter gradients (BatchNorm) and all. Not in float64.
template <class T>
Status hold_forward(const Stage<T>& stage, const HeldUnits& units, LaunchConfig config, double eps,
                    const RunningStatistics& running, Accumulator<T>* mean, Accumulator<T>* invstd, void* stream);
template <class T>
Status hold_backward(const Stage<T>& stage, const HeldUnits& units, LaunchConfig config, bool through_statistics,
                     Accumulator<T>* dweight, Accumulator<T>* dbias, void* stream);
// Sets the barriers of cooperative launches to 0.
Status clear_barriers(unsigned* barriers, int64_t count, void* stream);

// Partials of stats to mean and invstd of the chunk's groups; without values both are 0 and nothing is running.
template <class T>
Status finish_stats(const Stage<T>& stage, double eps, const RunningStatistics& running, Accumulator<T>* mean,
                    Accumulator<T>* invstd, void* stream);
// Partials of backward_reduce to offset and slope of the chunk's groups.
template <class T>
Status finish_backward(const Stage<T>& stage, Accumulator<T>* offset, Accumulator<T>* slope, void* stream);
// Partials of backward_reduce, of all chunks, to dweight and dbias, either of which may be null.
template <class T>
Status finish_parameters(const Stage<T>& stage, Accumulator<T>* dweight, Accumulator<T>* dbias, void* stream);

}  // namespace normfused::cuda
