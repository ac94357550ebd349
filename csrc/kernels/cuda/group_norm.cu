#include "../group_norm.h"

#include "driver.h"

namespace normfused::cuda {
namespace {

PlanRequest request(const GroupNormForward& args) {
  return {.extent = args.extent,
          .dtype = args.dtype,
          .groups = args.groups,
          .direction = Direction::forward,
          .aligned = aligned({args.x, args.y}),
          .path = args.path};
}

PlanRequest request(const GroupNormBackward& args) {
  return {.extent = args.extent,
          .dtype = args.dtype,
          .groups = args.groups,
          .direction = Direction::backward,
          .aligned = aligned({args.dy, args.x, args.dx}),
          // Only sums are wanted: nothing is worth holding.
          .path = args.dx ? args.path : Path::two_kernels};
}

// What both directions are given.
template <class T, class Args>
Stage<T> stage_of(const Args& args) {
  Stage<T> stage = {};
  stage.activation = args.activation;
  stage.x = static_cast<const T*>(args.x);
  stage.weight = args.weight;
  stage.bias = args.bias;
  stage.parameter_dtype = channel_dtype(args.dtype, args.narrow_parameters);
  stage.partials = static_cast<double*>(args.workspace);
  return stage;
}

template <class T>
Status forward(const GroupNormForward& args, void* stream) {
  using A = Accumulator<T>;
  LaunchPlan plan;
  if (const Status status = plan_here(request(args), &plan)) return status;
  Stage<T> stage = stage_of<T>(args);
  stage.out = static_cast<T*>(args.y);
  return run_forward(plan, stage, args.eps, {}, static_cast<A*>(args.mean), static_cast<A*>(args.rstd), stream);
}

template <class T>
Status backward(const GroupNormBackward& args, void* stream) {
  using A = Accumulator<T>;
  LaunchPlan plan;
  if (const Status status = plan_here(request(args), &plan)) return status;
  Stage<T> stage = stage_of<T>(args);
  stage.dy = static_cast<const T*>(args.dy);
  stage.out = static_cast<T*>(args.dx);
  stage.mean = static_cast<const A*>(args.mean);
  stage.invstd = static_cast<const A*>(args.rstd);
  return run_backward(plan, stage, /*through_statistics=*/true, static_cast<A*>(args.dweight),
                      static_cast<A*>(args.dbias), stream);
}

}  // namespace

Status group_norm_workspace(const GroupNormForward& args, int64_t* bytes) {
  return workspace_bytes(request(args), bytes);
}

Status group_norm_workspace(const GroupNormBackward& args, int64_t* bytes) {
  return workspace_bytes(request(args), bytes);
}

Status group_norm_forward(const GroupNormForward& args, void* stream) {
  return dispatch_dtype(args.dtype, [&](auto t) { return forward<decltype(t)>(args, stream); });
}

Status group_norm_backward(const GroupNormBackward& args, void* stream) {
  return dispatch_dtype(args.dtype, [&](auto t) { return backward<decltype(t)>(args, stream); });
}

}  // namespace normfused::cuda
