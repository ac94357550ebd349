// The launches of a forward and a backward, chunk by chunk, for both families.
#pragma once

#include <initializer_list>

#include "../batch_norm.h"
#include "stages.h"

namespace normfused::cuda {

// Calls f(T{}) with the element type of dtype.
template <class F>
Status dispatch_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float64: return f(double{});
    case Dtype::bfloat16: return f(BFloat16{});
    case Dtype::float16: return f(Float16{});
    case Dtype::float32: break;
  }
  return f(float{});
}

inline bool aligned(std::initializer_list<const void*> tensors) {
  for (const void* tensor : tensors) {
    if (reinterpret_cast<uintptr_t>(tensor) % 16 != 0) return false;
  }
  return true;
}

// Of the per-channel arrays of a call.
inline Dtype channel_dtype(Dtype dtype, bool narrow) {
  if (narrow) return dtype;
  return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

// The plan for the current device.
inline Status plan_here(const PlanRequest& request, LaunchPlan* plan) {
  int device;
  DeviceLimits limits;
  if (const Status status = current_device(&device)) return status;
  if (const Status status = device_limits(device, &limits)) return status;
  *plan = plan_launches(request, limits);
  return 0;
}

inline Status workspace_bytes(const PlanRequest& request, int64_t* bytes) {
  LaunchPlan plan;
  if (const Status status = plan_here(request, &plan)) return status;
  *bytes = plan.workspace_bytes;
  return 0;
}

template <class T>
void set_pass(Stage<T>* stage, const Pass& pass, const Chunk& chunk) {
  stage->pass = pass;
  stage->chunk = chunk;
}

inline Chunk everything(const LaunchPlan& plan) { return {0, plan.view.matrices, 0, plan.groups}; }

// launch(units, config) for each launch of a path that holds its input. finishes: what parameters need is wanted.
template <class T, class F>
Status for_each_held_launch(const LaunchPlan& plan, const Stage<T>& stage, bool finishes, void* stream, F launch) {
  double* parameter_partials = stage.partials + plan.partials;
  auto* barriers = reinterpret_cast<unsigned*>(parameter_partials + plan.parameter_partials);
  HeldUnits units = {};
  units.exchange = exchange_of(plan.path);
  units.parameter_partials = finishes ? parameter_partials : nullptr;
  if (units.exchange == Exchange::grid) {
    if (const Status status = clear_barriers(barriers, plan.chunks(), stream)) return status;
  }
  for (int64_t i = 0; i < plan.chunks(); ++i) {
    units.first = i * plan.units_per_launch;
    units.barrier = barriers + i;
    if (const Status status = launch(units, on_chip_config(plan, i))) return status;
  }
  return 0;
}

// stage holds the tensors, partials the workspace.
template <class T>
Status run_forward(const LaunchPlan& plan, Stage<T> stage, double eps, const RunningStatistics& running,
                   Accumulator<T>* mean, Accumulator<T>* invstd, void* stream) {
  stage.groups = plan.groups;
  stage.mean = mean;
  stage.invstd = invstd;
  if (plan.path == Path::empty) {
    set_pass(&stage, plan.reduce, everything(plan));
    if (stage.chunk.matrices == 0) return 0;
    return finish_stats(stage, eps, running, mean, invstd, stream);
  }
  if constexpr (sizeof(T) < 8) {
    if (plan.on_chip()) {
      if (running.cumulative && running.num_batches_tracked) {
        // Who counts the batch must not race with who reads the count.
        if (const Status status = count_batch(running.num_batches_tracked, stream)) return status;
      }
      set_pass(&stage, plan.reduce, everything(plan));
      return for_each_held_launch(plan, stage, false, stream, [&](const HeldUnits& units, const LaunchConfig& config) {
        const bool counts = units.first == 0 && !running.cumulative;
        stage.num_batches_tracked = counts ? running.num_batches_tracked : nullptr;
        return hold_forward(stage, units, config, eps, running, mean, invstd, stream);
      });
    }
  }
  for (int64_t i = 0; i < plan.chunks(); ++i) {
    const Chunk chunk = plan.chunk(i);
    if (plan.path == Path::two_kernels) {
      set_pass(&stage, plan.reduce, chunk);
      stage.num_batches_tracked = i == 0 ? running.num_batches_tracked : nullptr;
      if (const Status status = stats(stage, stream)) return status;
      if (const Status status = finish_stats(stage, eps, running, mean, invstd, stream)) return status;
    }
    set_pass(&stage, plan.apply, chunk);
    if (const Status status = apply(stage, stream)) return status;
  }
  return 0;
}

// through_statistics: they are functions of x. workspace: where partials and then the coefficients of dx go.
template <class T>
Status run_backward(const LaunchPlan& plan, Stage<T> stage, bool through_statistics, Accumulator<T>* dweight,
                    Accumulator<T>* dbias, void* stream) {
  using A = Accumulator<T>;
  stage.groups = plan.groups;
  if constexpr (sizeof(T) < 8) {
    if (plan.on_chip()) {
      // Of GroupNorm's channels every sample has partials.
      const bool finishes = plan.parameter_partials > 0 && (dweight || dbias);
      A* own_dweight = finishes ? nullptr : dweight;
      A* own_dbias = finishes ? nullptr : dbias;
      set_pass(&stage, plan.reduce, everything(plan));
      const Status status =
          for_each_held_launch(plan, stage, finishes, stream, [&](const HeldUnits& units, const LaunchConfig& config) {
            return hold_backward(stage, units, config, through_statistics, own_dweight, own_dbias, stream);
          });
      if (status || !finishes) return status;
      stage.pass.view = plan.view;
      stage.partials += plan.partials;
      return finish_parameters(stage, dweight, dbias, stream);
    }
  }
  A* offset = reinterpret_cast<A*>(stage.partials + 2 * plan.reduce.partials());
  A* slope = offset + plan.view.matrices * plan.groups;
  const bool applies = stage.out || stage.dresidual;
  for (int64_t i = 0; i < plan.chunks(); ++i) {
    const Chunk chunk = plan.chunk(i);
    stage.offset = stage.slope = nullptr;
    if (plan.path == Path::two_kernels) {
      set_pass(&stage, plan.reduce, chunk);
      if (const Status status = backward_reduce(stage, stream)) return status;
    }
    if (!applies) continue;
    if (stage.out && through_statistics) {
      if (const Status status = finish_backward(stage, offset, slope, stream)) return status;
      stage.offset = offset;
      stage.slope = slope;
    }
    set_pass(&stage, plan.apply, chunk);
    if (const Status status = backward_apply(stage, stream)) return status;
  }
  if (!dweight && !dbias) return 0;
  set_pass(&stage, plan.reduce, everything(plan));
  return finish_parameters(stage, dweight, dbias, stream);
}

}  // namespace normfused::cuda
