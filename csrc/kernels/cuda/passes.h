// What a launch plan is made of: views of a tensor, and passes over them by two kernels. See launch_plan.h.
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
  bool rows_are_channels;  // of one group of GroupNorm, which is a matrix of its own
  int warps_per_row;       // on chip, backward
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

// Path::one_kernel: the elementwise pass alone; two_kernels: a reduction before it. On chip both are one kernel, which
// holds its input in shared memory between the two: a unit (a tile of channels or a group, with all its rows) in a
// block, in the blocks of a cluster, or in blocks of a cooperative grid.
struct LaunchPlan {
  Path path;
  View view;
  int64_t groups;      // per matrix
  Pass reduce, apply;  // on chip the same
  int64_t chunk_matrices, chunk_groups;
  // On chip.
  int64_t units, units_per_launch;
  int64_t held;  // slots of a block and tensor
  size_t shared_bytes;
  // Workspace, in doubles: partial sums, and of the channels of GroupNorm's groups; then barriers.
  int64_t partials, parameter_partials;
  int64_t workspace_bytes;
  int64_t bytes_moved;  // to and from DRAM, by what should stay in L2

  bool on_chip() const { return path == Path::block || path == Path::cluster || path == Path::cooperative; }
  int64_t matrix_chunks() const { return path == Path::empty ? 0 : divide_up(view.matrices, chunk_matrices); }
  int64_t group_chunks() const { return path == Path::empty ? 0 : divide_up(groups, chunk_groups); }
  int64_t chunks() const { return on_chip() ? divide_up(units, units_per_launch) : matrix_chunks() * group_chunks(); }
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

}  // namespace normfused::cuda
