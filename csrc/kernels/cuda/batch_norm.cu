#include "../batch_norm.h"

#include "driver.h"

namespace normfused::cuda {
namespace {

// Evaluation: mean and invstd of the running statistics.
template <class A>
__global__ void __launch_bounds__(kBlock) use_running_stats_kernel(int64_t channels, double eps, const A* running_mean,
                                                                   const A* running_var, A* mean, A* invstd) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  mean[c] = running_mean[c];
  invstd[c] = static_cast<A>(1 / sqrt(running_var[c] + eps));
}

template <class T>
Status forward(const BatchNormForward& args, void* stream) {
  using A = Accumulator<T>;
  DeviceLimits limits;
  if (const Status status = current_limits(&limits)) return status;
  const LaunchPlan plan = plan_launches({.extent = args.extent,
                                         .dtype = args.dtype,
                                         .groups = 0,
                                         .direction = Direction::forward,
                                         .reduces = args.training,
                                         .residual = args.residual != nullptr,
                                         .aligned = aligned({args.x, args.residual, args.y}),
                                         // Who counts the batch must not race with who reads the count.
                                         .on_chip = !args.cumulative},
                                        limits);
  A* mean = static_cast<A*>(args.mean);
  A* invstd = static_cast<A*>(args.invstd);
  Stage<T> stage = {};
  stage.activation = args.activation;
  stage.x = static_cast<const T*>(args.x);
  stage.residual = static_cast<const T*>(args.residual);
  stage.out = static_cast<T*>(args.y);
  stage.weight = static_cast<const A*>(args.weight);
  stage.bias = static_cast<const A*>(args.bias);
  stage.partials = static_cast<double*>(args.workspace);
  if (!args.training) {
    LaunchConfig config;
    config.block = kBlock;
    config.grid_x = static_cast<unsigned>(divide_up(args.extent.C, kBlock));
    config.name = "use_running_stats";
    const Status status =
        launch(use_running_stats_kernel<A>, config, stream, args.extent.C, args.eps,
               static_cast<const A*>(args.running_mean), static_cast<const A*>(args.running_var), mean, invstd);
    if (status || plan.path == Path::empty) return status;
  }
  const RunningStatistics<A> running = {static_cast<A*>(args.running_mean), static_cast<A*>(args.running_var),
                                        args.momentum, args.cumulative, args.num_batches_tracked};
  return run_forward(plan, stage, args.eps, running, mean, invstd, stream);
}

template <class T>
Status backward(const BatchNormBackward& args, void* stream) {
  using A = Accumulator<T>;
  DeviceLimits limits;
  if (const Status status = current_limits(&limits)) return status;
  const bool reduces = (args.training && args.dx) || args.dweight || args.dbias;
  const LaunchPlan plan = plan_launches({.extent = args.extent,
                                         .dtype = args.dtype,
                                         .groups = 0,
                                         .direction = Direction::backward,
                                         .reduces = reduces,
                                         .residual = args.residual != nullptr,
                                         .aligned = aligned({args.dy, args.x, args.residual, args.dx, args.dresidual})},
                                        limits);
  Stage<T> stage = {};
  stage.activation = args.activation;
  stage.x = static_cast<const T*>(args.x);
  stage.dy = static_cast<const T*>(args.dy);
  stage.residual = static_cast<const T*>(args.residual);
  stage.out = static_cast<T*>(args.dx);
  stage.dresidual = static_cast<T*>(args.dresidual);
  stage.mean = static_cast<const A*>(args.mean);
  stage.invstd = static_cast<const A*>(args.invstd);
  stage.weight = static_cast<const A*>(args.weight);
  stage.bias = static_cast<const A*>(args.bias);
  stage.partials = static_cast<double*>(args.workspace);
  return run_backward(plan, stage, args.training, static_cast<A*>(args.dweight), static_cast<A*>(args.dbias), stream);
}

}  // namespace

Status batch_norm_workspace(const Extent& extent, Dtype dtype, int64_t* forward_bytes, int64_t* backward_bytes) {
  return workspace_bytes({.extent = extent, .dtype = dtype, .groups = 0, .direction = Direction::forward},
                         forward_bytes, backward_bytes);
}

Status batch_norm_forward(const BatchNormForward& args, void* stream) {
  return dispatch_dtype(args.dtype, [&](auto t) { return forward<decltype(t)>(args, stream); });
}

Status batch_norm_backward(const BatchNormBackward& args, void* stream) {
  return dispatch_dtype(args.dtype, [&](auto t) { return backward<decltype(t)>(args, stream); });
}

}  // namespace normfused::cuda
