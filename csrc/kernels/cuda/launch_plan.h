// How a call is divided into launches and blocks: a pure function of sizes and of the device's limits. Plain C++, no
// CUDA, so that plans are shown and tested anywhere. The only place where a grid is chosen.
#pragma once

#include "../types.h"
#include "device_limits.h"

namespace normfused::cuda {

NORMFUSED_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

// Every input of both families: x[matrices][rows][channels][group]. Statistics are per matrix and channel, or per
// matrix and several adjacent channels.
struct View {
  int64_t matrices, rows, channels, group;

  NORMFUSED_INLINE int64_t numel() const { return matrices * rows * channels * group; }
};

constexpr unsigned kBlock = 256;
constexpr int kPlaneBatch = 4;  // slots that a thread loads before it works on the first
constexpr int kRowBatch = 4;    // rows, likewise
// From this many adjacent elements of a channel on, a block works on one channel at a time.
constexpr int64_t kPlane = 256;
constexpr size_t kReduceScratch = 2 * kBlock / 32 * sizeof(double);  // of two sums over a block
constexpr int64_t kMostSplits = 65535;
constexpr int64_t kMostPartials = 4096;

// What a block works on.
enum class Shape {
  planes,   // slots of one channel of one matrix. A slot is an aligned vector of elements, or the part of it inside.
  columns,  // rows of a tile of channels: a thread keeps to its columns
};

// One pass over a view.
struct Pass {
  Shape shape;
  View view;
  int vector;  // elements of an access; columns: of every one
  // Slots (of rows * slots_per_row) or rows that each of `splits` blocks takes.
  int64_t splits, per_split;
  // Planes.
  int64_t slots_per_row;
  bool aligned;  // vectors start where the hardware can load them; else element by element
  // Columns: row_groups x tile_vectors threads.
  int64_t tile_channels;
  int tile_vectors, row_groups;
  size_t reduce_bytes;  // shared memory of a reduction

  NORMFUSED_INLINE int64_t tiles(int64_t channels) const {
    return shape == Shape::planes ? channels : divide_up(channels, tile_channels);
  }
  int64_t partials() const { return view.matrices * splits * view.channels; }
};

// Matrices and groups that go through all passes before the next ones, while L2 still has them. A group is the channels
// that share statistics.
struct Chunk {
  int64_t matrix, matrices, group, groups;
};

enum class Direction { forward, backward };

struct PlanRequest {
  Extent extent;
  Dtype dtype;
  int64_t groups;  // 0: BatchNorm
  Direction direction;
  bool reduces = true;  // false: evaluation, statistics are given
  bool residual = false;
  bool aligned = true;  // all tensors start at a multiple of 16 bytes
  Path path = Path::automatic;
};

// Path::one_kernel: the elementwise pass alone; two_kernels: a reduction before it; block: both in one, forward, a
// block per channel, which it keeps in shared memory between the two.
struct LaunchPlan {
  Path path;
  View view;
  int64_t groups;  // per matrix
  Pass reduce, apply;
  int64_t chunk_matrices, chunk_groups;
  int64_t workspace_bytes;
  int64_t bytes_moved;  // to and from DRAM, by what should stay in L2

  int64_t matrix_chunks() const { return path == Path::empty ? 0 : divide_up(view.matrices, chunk_matrices); }
  int64_t group_chunks() const { return path == Path::empty ? 0 : divide_up(groups, chunk_groups); }
  int64_t chunks() const { return matrix_chunks() * group_chunks(); }
  Chunk chunk(int64_t index) const {
    const int64_t matrix = index / group_chunks() * chunk_matrices, group = index % group_chunks() * chunk_groups;
    return {matrix, at_most(chunk_matrices, view.matrices - matrix), group, at_most(chunk_groups, groups - group)};
  }
};

inline LaunchConfig pass_config(const Pass& pass, const Chunk& chunk, int64_t groups, const char* name) {
  LaunchConfig config;
  config.grid_x = static_cast<unsigned>(chunk.matrices * pass.tiles(chunk.groups * (pass.view.channels / groups)));
  config.grid_y = static_cast<unsigned>(pass.splits);
  config.block = kBlock;
  config.name = name;
  return config;
}

constexpr int64_t element_bytes(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

constexpr int64_t greatest_common_divisor(int64_t a, int64_t b) {
  return b == 0 ? a : greatest_common_divisor(b, a % b);
}

// Of a plane that may start anywhere within a vector.
constexpr int64_t slots_per_row(int64_t length, int vector) {
  return length % vector == 0 ? length / vector : (length + 2 * vector - 2) / vector;
}

// blocks: how many there should be at least, if there is work for them. matrices and channels: of a chunk.
inline Pass plan_pass(const View& view, int vector, bool aligned, int64_t matrices, int64_t channels, bool reduces,
                      int64_t blocks) {
  Pass pass = {};
  pass.view = view;
  pass.aligned = aligned;
  if (view.group >= kPlane) {
    pass.shape = Shape::planes;
    pass.vector = vector;
    pass.slots_per_row = slots_per_row(view.group, vector);
    const int64_t slots = view.rows * pass.slots_per_row;
    constexpr int64_t kBatch = int64_t{kBlock} * kPlaneBatch;
    const int64_t wanted = reduces ? divide_up(blocks, matrices * channels) : kMostSplits;
    const int64_t most = reduces ? kMostPartials : kMostSplits;
    pass.per_split = divide_up(at_least(divide_up(slots, wanted), divide_up(slots, most)), kBatch) * kBatch;
    pass.splits = divide_up(slots, pass.per_split);
    pass.reduce_bytes = kReduceScratch;
    return pass;
  }
  pass.shape = Shape::columns;
  const bool vectors = aligned && view.channels * view.group % vector == 0 &&
                       (channels == view.channels || channels * view.group % vector == 0);
  pass.vector = vectors ? vector : 1;
  // Tiles start at a multiple of the vector.
  const int64_t step = pass.vector / greatest_common_divisor(pass.vector, view.group);
  const int64_t columns = pass.vector * at_most(kBlock, at_least(32, kBlock / view.rows));
  pass.tile_channels = at_most(view.channels, at_least(1, columns / view.group / step) * step);
  pass.tile_vectors = static_cast<int>(pass.tile_channels * view.group / pass.vector);
  pass.row_groups = static_cast<int>(at_most(kBlock / pass.tile_vectors, view.rows));
  const int64_t wanted = divide_up(blocks, matrices * divide_up(channels, pass.tile_channels));
  const int64_t most = reduces ? kMostPartials : kMostSplits;
  // At least two batches, and not so many that sums in single precision grow long.
  const int64_t batch = int64_t{pass.row_groups} * kRowBatch;
  const int64_t balanced = at_least(2 * batch, at_most(divide_up(view.rows, wanted), 32 * batch));
  pass.per_split = divide_up(at_least(balanced, divide_up(view.rows, most)), batch) * batch;
  pass.splits = divide_up(view.rows, pass.per_split);
  pass.reduce_bytes = size_t(pass.row_groups) * pass.tile_vectors * pass.vector * 2 * sizeof(double);
  return pass;
}

// A block for each channel.
inline Pass plan_channels(const View& view, int vector, bool aligned) {
  Pass pass = {};
  pass.shape = Shape::planes;
  pass.view = view;
  pass.vector = vector;
  pass.aligned = aligned;
  pass.slots_per_row = slots_per_row(view.group, vector);
  pass.per_split = view.rows * pass.slots_per_row;
  pass.splits = 1;
  pass.reduce_bytes = kReduceScratch;
  return pass;
}

// Shared memory of a block that keeps its slots, of 16 bytes.
inline size_t on_chip_bytes(const Pass& pass) { return pass.reduce_bytes + 16 * size_t(pass.per_split); }

// Of a plan whose path is block.
inline LaunchConfig on_chip_config(const LaunchPlan& plan) {
  LaunchConfig config = pass_config(plan.reduce, {0, plan.view.matrices, 0, plan.groups}, plan.groups, "");
  config.shared_bytes = on_chip_bytes(plan.reduce);
  return config;
}

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
    if (matrix_bytes > budget && contiguous) {
      // Several groups at a time where that keeps vectors whole.
      const int64_t fit = at_least(budget / group_bytes, 1);
      plan.chunk_groups = at_most(plan.groups, fit >= vector ? fit / vector * vector : fit);
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
  const bool free = request.path == Path::automatic || request.path == Path::block;
  if (free && contiguous && batch_norm && !backward && bytes < 8 && e.C >= limits.multiprocessors) {
    const Pass pass = plan_channels(plan.view, vector, request.aligned);
    // Two blocks on a multiprocessor, so that one loads while the other stores; and no waste at both ends of planes.
    const size_t room = limits.shared_per_multiprocessor / 2 - limits.shared_reserved_per_block;
    const size_t needed = on_chip_bytes(pass);
    if (needed <= room && needed <= limits.shared_per_block && e.S * bytes >= 256 && e.C <= limits.max_grid_x) {
      plan.path = Path::block;
      plan.reduce = pass;
      plan.chunk_groups = plan.groups;
      plan.workspace_bytes = 0;
      return plan;
    }
  }
  plan.workspace_bytes += plan.reduce.partials() * (backward ? 2 : 3) * sizeof(double);
  if (!meets_l2) plan.bytes_moved += plan.view.numel() * bytes * (backward ? inputs : 1);
  return plan;
}

}  // namespace normfused::cuda
