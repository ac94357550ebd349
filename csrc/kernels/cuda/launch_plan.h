// How a call is divided into launches and blocks: a pure function of sizes and of the device's limits. Plain C++, no
// CUDA, so that plans are shown and tested anywhere. The only place where a grid is chosen.
#pragma once

#include "on_chip_plan.h"
#include "passes.h"

namespace normfused::cuda {

inline LaunchPlan plan_launches(const PlanRequest& request, const DeviceLimits& limits) {
  const Extent& e = request.extent;
  const bool contiguous = e.format == MemoryFormat::contiguous, batch_norm = request.groups == 0;
  const bool backward = request.direction == Direction::backward;
  const int64_t bytes = element_bytes(request.dtype);
  const int vector = static_cast<int>(16 / bytes);
  LaunchPlan plan = {};
  plan.view = batch_norm ? (contiguous ? View{1, e.N, e.C, e.S} : View{1, e.N * e.S, e.C, 1})
                         : (contiguous ? View{e.N, 1, e.C, e.S} : View{e.N, e.S, e.C, 1});
  plan.groups = batch_norm ? e.C : request.groups;
  plan.chunk_matrices = at_least(plan.view.matrices, 1);
  plan.chunk_groups = plan.groups;
  const int64_t accumulator_bytes = bytes == 8 ? 8 : 4;
  // Offsets and slopes of the gradient.
  const int64_t coefficients = backward ? 2 * plan.view.matrices * plan.groups * accumulator_bytes : 0;
  plan.workspace_bytes = coefficients;
  if (plan.view.numel() == 0) {
    plan.path = Path::empty;
    plan.reduce.view = plan.apply.view = plan.view;
    return plan;
  }

  // Chunks.
  const int64_t depth = plan.view.channels / plan.groups;
  const int64_t inputs = (backward ? 2 : 1) + (request.residual ? 1 : 0);
  const int64_t group_bytes = plan.view.rows * depth * plan.view.group * bytes * inputs;
  const int64_t matrix_bytes = group_bytes * plan.groups, all_bytes = matrix_bytes * plan.view.matrices;
  const int64_t budget = static_cast<int64_t>(limits.l2_bytes / 5 * 2);
  bool meets_l2 = true;
  if (request.reduces && all_bytes > budget) {
    plan.chunk_matrices = at_most(plan.view.matrices, at_least(budget / matrix_bytes, 1));
    if (matrix_bytes > budget && (contiguous || batch_norm)) {
      // Several groups at a time where that keeps vectors whole, and parts of rows as long as DRAM likes them.
      const int64_t fit = at_least(budget / group_bytes, 1);
      const int64_t step = contiguous ? vector : kLeastRowBytes / bytes;
      if (contiguous || fit >= step) plan.chunk_groups = at_most(plan.groups, fit >= step ? fit / step * step : fit);
    }
    meets_l2 = plan.chunk_matrices * plan.chunk_groups * group_bytes <= budget;
  }
  // A block per unit at least, in the first dimension of the grid.
  plan.chunk_matrices = at_most(plan.chunk_matrices, limits.max_grid_x / plan.view.channels);

  // Passes.
  const int64_t blocks = int64_t{8} * limits.multiprocessors;
  const auto pass = [&](const View& view, bool reduces) {
    const int64_t channels = plan.chunk_groups * (view.channels / plan.groups);
    return plan_pass(view, vector, request.aligned, plan.chunk_matrices, channels, reduces, blocks);
  };
  plan.apply = pass(plan.view, false);
  const int64_t touched = backward ? 3 : 2;  // tensors that every element is moved of at least
  plan.path = request.reduces ? Path::two_kernels : Path::one_kernel;
  plan.bytes_moved = plan.view.numel() * bytes * (touched + (request.residual ? 1 : 0));
  if (!request.reduces) return plan;
  // The forward needs only a group's statistics, and contiguous groups are one long plane.
  const View groups = {plan.view.matrices, 1, plan.groups, depth * plan.view.group};
  const bool joined = !backward && contiguous && !batch_norm && groups.group >= kPlane;
  plan.reduce = pass(joined ? groups : plan.view, true);
  plan.partials = plan.reduce.partials() * (backward ? 2 : 3);
  plan.workspace_bytes += plan.partials * int64_t{sizeof(double)};
  LaunchPlan held = plan;
  if (choose_on_chip(request, limits, meets_l2, &held)) return held;
  if (!meets_l2) plan.bytes_moved += plan.view.numel() * bytes * (backward ? inputs : 1);
  return plan;
}

}  // namespace normfused::cuda
