#include "../group_norm.h"

#include "driver.h"

namespace normfused::cuda {
namespace {

template <class T>
Status forward(const GroupNormForward& args, void* stream) {
  using A = Accumulator<T>;
  DeviceLimits limits;
  if (const Status status = current_limits(&limits)) return status;
  const LaunchPlan plan = plan_launches({.extent = args.extent,
                                         .dtype = args.dtype,
                                         .groups = args.groups,
                                         .direction = Direction::forward,
                                         .aligned = aligned({args.x, args.y})},
                                        limits);
  Stage<T> stage = {};
  stage.activation = args.activation;
  stage.x = static_cast<const T*>(args.x);
  stage.out = static_cast<T*>(args.y);
  stage.weight = static_cast<const A*>(args.weight);
  stage.bias = static_cast<const A*>(args.bias);
  stage.partials = static_cast<double*>(args.workspace);
  return run_forward(plan, stage, args.eps, {}, static_cast<A*>(args.mean), static_cast<A*>(args.rstd), stream);
}

template <class T>
Status backward(const GroupNormBackward& args, void* stream) {
  using A = Accumulator<T>;
  DeviceLimits limits;
  if (const Status status = current_limits(&limits)) return status;
  const LaunchPlan plan = plan_launches({.extent = args.extent,
                                         .dtype = args.dtype,
                                         .groups = args.groups,
                                         .direction = Direction::backward,
                                         .aligned = aligned({args.dy, args.x, args.dx})},
                                        limits);
  Stage<T> stage = {};
  stage.activation = args.activation;
  stage.x = static_cast<const T*>(args.x);
  stage.dy = static_cast<const T*>(args.dy);
  stage.out = static_cast<T*>(args.dx);
  stage.mean = static_cast<const A*>(args.mean);
  stage.invstd = static_cast<const A*>(args.rstd);
  stage.weight = static_cast<const A*>(args.weight);
  stage.bias = static_cast<const A*>(args.bias);
  stage.partials = static_cast<double*>(args.workspace);
  return run_backward(plan, stage, /*through_statistics=*/true, static_cast<A*>(args.dweight),
                      static_cast<A*>(args.dbias), stream);
}

}  // namespace

Status group_norm_workspace(const Extent& extent, Dtype dtype, int64_t groups, int64_t* forward_bytes,
                            int64_t* backward_bytes) {
  return workspace_bytes({.extent = extent, .dtype = dtype, .groups = groups, .direction = Direction::forward},
                         forward_bytes, backward_bytes);
}

Status group_norm_forward(const GroupNormForward& args, void* stream) {
  return dispatch_dtype(args.dtype, [&](auto t) { return forward<decltype(t)>(args, stream); });
}

Status group_norm_backward(const GroupNormBackward& args, void* stream) {
  return dispatch_dtype(args.dtype, [&](auto t) { return backward<decltype(t)>(args, stream); });
}

}  // namespace normfused::cuda
