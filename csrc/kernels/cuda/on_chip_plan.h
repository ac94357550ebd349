// Plans of the paths that hold their input on chip.
#pragma once

#include "passes.h"

namespace normfused::cuda {

// How the blocks that hold a unit tell each other what they found.
enum class Exchange { none, cluster, grid };

inline Exchange exchange_of(Path path) {
  return path == Path::cluster ? Exchange::cluster : path == Path::cooperative ? Exchange::grid : Exchange::none;
}

constexpr size_t kSlotBytes = 16;
// Beyond, a cluster may find no room on any part of the device.
constexpr int kLargestCluster = 8;
// Of the registers that the kernels may take.
constexpr int kHeldBlocksPerMultiprocessor = 2;
// Bytes from which on little is wasted: by a row of a tile, and at the ends of a plane.
constexpr int64_t kLeastRowBytes = 64, kLeastPlaneBytes = 256;
// What one block moves about as fast as it starts.
constexpr int64_t kSmallUnitBytes = 32 << 10;

// A unit as `splits` blocks hold it.
struct HeldPass {
  bool fits;
  Pass pass;
  int64_t units, held;
  size_t shared_bytes;
};

constexpr size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// A channel of BatchNorm or a group of GroupNorm, contiguous.
inline Pass held_planes(const View& view, int vector, bool aligned, bool rows_are_channels, bool backward,
                        int64_t splits) {
  Pass pass = {};
  pass.shape = Shape::planes;
  pass.view = view;
  pass.vector = vector;
  pass.aligned = aligned;
  pass.rows_are_channels = rows_are_channels;
  pass.slots_per_row = slots_per_row(view.group, vector);
  pass.splits = splits;
  pass.per_split = divide_up(view.rows * pass.slots_per_row, splits);
  pass.warps_per_row = 1;
  while (pass.warps_per_row < int(kBlock / 32) && pass.warps_per_row * 32 < pass.slots_per_row) {
    pass.warps_per_row *= 2;
  }
  // The sums of a block, and of the rows that it has a part of.
  pass.reduce_bytes = kReduceScratch + 64;
  if (backward && rows_are_channels) {
    const int64_t rows = at_most(view.rows, divide_up(pass.per_split, pass.slots_per_row) + 1);
    pass.reduce_bytes += rows * pass.warps_per_row * 2 * sizeof(double);
  }
  return pass;
}

// A tile of channels that is a multiple of `depth`, of which every row is whole vectors. None: its vector is 0.
inline Pass held_columns(const View& view, int vector, int64_t depth, int64_t splits) {
  Pass pass = {};
  pass.shape = Shape::columns;
  pass.view = view;
  pass.aligned = true;
  const int64_t whole = vector / greatest_common_divisor(vector, view.group);
  const int64_t step = whole / greatest_common_divisor(whole, depth) * depth;
  const int64_t step_vectors = step * view.group / vector;
  if (view.channels * view.group % vector != 0 || step_vectors > kBlock) return pass;
  pass.vector = vector;
  pass.splits = splits;
  pass.per_split = divide_up(view.rows, splits);
  const int64_t wanted = at_least(kLeastRowBytes / int64_t{kSlotBytes}, divide_up(kBlock, pass.per_split));
  const int64_t steps = at_most(divide_up(wanted, step_vectors), kBlock / step_vectors);
  pass.tile_channels = at_most(view.channels, steps * step);
  pass.tile_vectors = static_cast<int>(pass.tile_channels * view.group / vector);
  pass.row_groups = static_cast<int>(at_most(kBlock / pass.tile_vectors, pass.per_split));
  // Two sums of every thread's columns, three of every channel by itself and of all blocks, two of every group.
  const size_t columns = size_t(pass.row_groups) * pass.tile_vectors * vector;
  const size_t doubles = 2 * columns + 6 * pass.tile_channels + 2 * (pass.tile_channels / depth);
  pass.reduce_bytes = round_up(doubles * sizeof(double), kSlotBytes);
  return pass;
}

inline HeldPass hold(const PlanRequest& request, const View& view, int64_t groups, int64_t splits) {
  const Extent& e = request.extent;
  const int64_t bytes = element_bytes(request.dtype), depth = view.channels / groups;
  const int vector = static_cast<int>(kSlotBytes / bytes);
  const bool contiguous = e.format == MemoryFormat::contiguous, batch_norm = request.groups == 0;
  const bool backward = request.direction == Direction::backward;
  const int64_t tensors = backward ? (request.residual ? 3 : 2) : 1;
  HeldPass held = {};
  if (!contiguous || e.S * bytes < kLeastPlaneBytes) {
    if (request.aligned) held.pass = held_columns(view, vector, depth, splits);
    const bool whole = request.aligned && e.S % vector == 0 && e.S * bytes >= kLeastRowBytes;
    if (held.pass.vector == 0 && !(contiguous && whole)) return held;
  }
  if (held.pass.vector == 0) {
    const View planes = batch_norm ? view : View{e.N * groups, depth, 1, e.S};
    held.pass = held_planes(planes, vector, request.aligned, !batch_norm, backward, splits);
  }
  const Pass& pass = held.pass;
  const bool is_planes = pass.shape == Shape::planes;
  held.held =
      is_planes ? pass.per_split : divide_up(pass.per_split, pass.row_groups) * pass.row_groups * pass.tile_vectors;
  held.units = pass.view.matrices * pass.tiles(pass.view.channels);
  held.shared_bytes = pass.reduce_bytes + kSlotBytes * size_t(held.held * tensors);
  // No block without work.
  const int64_t work = is_planes ? pass.view.rows * pass.slots_per_row : pass.view.rows;
  held.fits = (splits - 1) * pass.per_split < work;
  return held;
}

// Shared memory that a block may take where `blocks` of them share a multiprocessor.
inline size_t room(const DeviceLimits& limits, int blocks) {
  const size_t share = limits.shared_per_multiprocessor / blocks - limits.shared_reserved_per_block;
  return share < limits.shared_per_block ? share : limits.shared_per_block;
}

// What a path that holds its input makes of a call, or false: it cannot serve. Of two blocks on a multiprocessor one
// loads while the other stores, so that is tried first; alone: a block may also take a multiprocessor for itself.
inline bool plan_on_chip(const PlanRequest& request, const DeviceLimits& limits, Path path, bool alone,
                         LaunchPlan* plan) {
  const bool backward = request.direction == Direction::backward;
  HeldPass held = {};
  int64_t resident = 0;
  for (int blocks = kHeldBlocksPerMultiprocessor; blocks >= (alone ? 1 : 2) && !held.fits; --blocks) {
    const size_t most = room(limits, blocks);
    const auto take = [&](int64_t splits) {
      held = hold(request, plan->view, plan->groups, splits);
      held.fits = held.fits && held.shared_bytes <= most;
      return held.fits;
    };
    if (path == Path::block) {
      take(1);
    } else if (path == Path::cluster) {
      const int64_t largest = at_most(kLargestCluster, limits.max_cluster);
      for (int64_t splits = 2; splits <= largest && !take(splits); splits *= 2) {
      }
    } else {
      // Some multiprocessors stay free: other work, such as a collective's, must be able to finish meanwhile.
      const int64_t usable = limits.multiprocessors - divide_up(limits.multiprocessors, 32);
      resident = at_least(usable, 1) * blocks;
      const HeldPass whole = hold(request, plan->view, plan->groups, 1);
      if (!whole.fits) return false;
      // As many blocks as hold it, or as share the device.
      const int64_t least = at_least(divide_up(whole.shared_bytes, most), resident / whole.units);
      for (int64_t splits = at_least(least, 2); splits <= resident && !take(splits); splits += divide_up(splits, 8)) {
      }
    }
  }
  if (!held.fits || held.units * held.pass.splits > limits.max_grid_x) return false;
  plan->path = path;
  plan->reduce = plan->apply = held.pass;
  plan->units = held.units;
  plan->units_per_launch = path == Path::cooperative ? at_most(resident / held.pass.splits, held.units) : held.units;
  plan->held = held.held;
  plan->shared_bytes = held.shared_bytes;
  plan->partials = path == Path::cooperative ? held.pass.partials() * (backward ? 2 : 3) : 0;
  const bool finishes = backward && request.groups > 0;
  plan->parameter_partials = finishes ? 2 * request.extent.N * request.extent.C * held.pass.splits : 0;
  const int64_t barriers = path == Path::cooperative ? plan->chunks() : 0;
  plan->workspace_bytes = (plan->partials + plan->parameter_partials + divide_up(barriers, 2)) * sizeof(double);
  return true;
}

// Whether to hold the input of a call that reduces, and how: as asked for; or else in a block each where there are
// enough units; or by whatever can where the second of two kernels would not find its input in L2.
inline bool choose_on_chip(const PlanRequest& request, const DeviceLimits& limits, bool meets_l2, LaunchPlan* plan) {
  if (request.dtype == Dtype::float64) return false;
  if (request.path == Path::block || request.path == Path::cluster || request.path == Path::cooperative) {
    return plan_on_chip(request, limits, request.path, /*alone=*/true, plan);
  }
  if (request.path != Path::automatic) return false;
  LaunchPlan other = *plan;
  if (plan_on_chip(request, limits, Path::block, /*alone=*/false, &other)) {
    const int64_t unit_bytes = kSlotBytes * other.held;
    if (!meets_l2 || 2 * other.units >= limits.multiprocessors || unit_bytes <= kSmallUnitBytes) {
      *plan = other;
      return true;
    }
  }
  return !meets_l2 && (plan_on_chip(request, limits, Path::cluster, /*alone=*/true, plan) ||
                       plan_on_chip(request, limits, Path::cooperative, /*alone=*/true, plan));
}

inline LaunchConfig on_chip_config(const LaunchPlan& plan, int64_t launch) {
  LaunchConfig config;
  const int64_t units = at_most(plan.units_per_launch, plan.units - launch * plan.units_per_launch);
  config.grid_x = static_cast<unsigned>(units * plan.reduce.splits);
  config.block = kBlock;
  config.cluster = plan.path == Path::cluster ? static_cast<unsigned>(plan.reduce.splits) : 1;
  config.shared_bytes = plan.shared_bytes;
  config.cooperative = plan.path == Path::cooperative;
  return config;
}

}  // namespace normfused::cuda
