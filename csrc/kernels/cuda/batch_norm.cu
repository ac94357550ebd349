#include "../batch_norm.h"

#include "driver.h"
#include "elements.cuh"

namespace normfused::cuda {
namespace {

// Evaluation: mean and invstd of the running statistics.
template <class A>
__global__ void __launch_bounds__(kBlock)
    use_running_stats_kernel(int64_t channels, double eps, RunningStatistics running, A* mean, A* invstd) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  mean[c] = load_channel<A>(running.mean, running.dtype, c);
  invstd[c] = static_cast<A>(1 / sqrt(load_channel<A>(running.var, running.dtype, c) + eps));
}

__global__ void count_batch_kernel(int64_t* num_batches_tracked) {
  if (threadIdx.x == 0) ++*num_batches_tracked;
}

PlanRequest request(const BatchNormForward& args) {
  return {.extent = args.extent,
          .dtype = args.dtype,
          .groups = 0,
          .direction = Direction::forward,
          .reduces = args.training,
          .residual = args.residual != nullptr,
          .aligned = aligned({args.x, args.residual, args.y}),
          .path = args.path};
}

PlanRequest request(const BatchNormBackward& args) {
  return {.extent = args.extent,
          .dtype = args.dtype,
          .groups = 0,
          .direction = Direction::backward,
          .reduces = (args.training && args.dx) || args.dweight || args.dbias,
          .residual = args.residual != nullptr,
          .aligned = aligned({args.dy, args.x, args.residual, args.dx, args.dresidual}),
          // Only sums are wanted: nothing is worth holding.
          .path = args.dx || args.dresidual ? args.path : Path::two_kernels};
}

// What both directions are given.
template <class T, class Args>
Stage<T> stage_of(const Args& args) {
  Stage<T> stage = {};
  stage.activation = args.activation;
  stage.pre_activation = args.pre_activation;
  stage.x = static_cast<const T*>(args.x);
  stage.residual = static_cast<const T*>(args.residual);
  stage.weight = args.weight;
  stage.bias = args.bias;
  stage.parameter_dtype = channel_dtype(args.dtype, args.narrow_parameters);
  stage.partials = static_cast<double*>(args.workspace);
  return stage;
}

template <class T>
Status forward(const BatchNormForward& args, void* stream) {
  using A = Accumulator<T>;
  LaunchPlan plan;
  if (const Status status = plan_here(request(args), &plan)) return status;
  A* mean = static_cast<A*>(args.mean);
  A* invstd = static_cast<A*>(args.invstd);
  Stage<T> stage = stage_of<T>(args);
  stage.out = static_cast<T*>(args.y);
  const RunningStatistics running = {
      args.running_mean, args.running_var, channel_dtype(args.dtype, args.narrow_running),
      args.momentum,     args.cumulative,  args.num_batches_tracked};
  if (!args.training) {
    LaunchConfig config;
    config.block = kBlock;
    config.grid_x = static_cast<unsigned>(divide_up(args.extent.C, kBlock));
    config.name = "use_running_stats";
    const Status status =
        launch(use_running_stats_kernel<A>, config, stream, args.extent.C, args.eps, running, mean, invstd);
    if (status || plan.path == Path::empty) return status;
  }
  return run_forward(plan, stage, args.eps, running, mean, invstd, stream);
}

template <class T>
Status backward(const BatchNormBackward& args, void* stream) {
  using A = Accumulator<T>;
  LaunchPlan plan;
  if (const Status status = plan_here(request(args), &plan)) return status;
  Stage<T> stage = stage_of<T>(args);
  stage.dy = static_cast<const T*>(args.dy);
  stage.out = static_cast<T*>(args.dx);
  stage.dresidual = static_cast<T*>(args.dresidual);
  stage.mean = static_cast<const A*>(args.mean);
  stage.invstd = static_cast<const A*>(args.invstd);
  return run_backward(plan, stage, args.training, static_cast<A*>(args.dweight), static_cast<A*>(args.dbias), stream);
}

}  // namespace

Status batch_norm_workspace(const BatchNormForward& args, int64_t* bytes) {
  return workspace_bytes(request(args), bytes);
}

Status batch_norm_workspace(const BatchNormBackward& args, int64_t* bytes) {
  return workspace_bytes(request(args), bytes);
}

Status batch_norm_forward(const BatchNormForward& args, void* stream) {
  return dispatch_dtype(args.dtype, [&](auto t) { return forward<decltype(t)>(args, stream); });
}

Status batch_norm_backward(const BatchNormBackward& args, void* stream) {
  return dispatch_dtype(args.dtype, [&](auto t) { return backward<decltype(t)>(args, stream); });
}

Status count_batch(int64_t* num_batches_tracked, void* stream) {
  LaunchConfig config;
  config.name = "count_batch";
  return launch(count_batch_kernel, config, stream, num_batches_tracked);
}

}  // namespace normfused::cuda
