// How an input is divided into tasks: a function of its shape only, so that the number of threads cannot change a bit.
#pragma once

#include "../types.h"
#include "tiles.h"

namespace normfused {
namespace {

// Elements that a task should have at least, and the most tasks that hold partial sums.
constexpr int64_t kTaskWork = 65536;
constexpr int64_t kMaxTasks = 64;
// Planes of at most this many elements are worked on side by side, each element a column, if there are rows enough to
// share a column's parameters.
constexpr int64_t kSmallPlane = 256;
// Elements of a plane that one task of split planes takes.
constexpr int64_t kSegment = 65536;
// Elements of a group in one row from which on it is worth loops of its own.
constexpr int64_t kLongRow = 64;

struct Partition {
  enum class Path {
    planes,         // a task is a channel: statistics, then normalise while its planes are in L2
    split_planes,   // few channels: a task is a segment of a plane; statistics of all first, then normalise
    columns,        // a task is a panel of columns: statistics, then normalise while it is in L2
    split_columns,  // a task is a range of rows, all columns; statistics of all first, then normalise
  };
  Path path;
  // For columns: a matrix of rows x cols. columns: `group` adjacent columns to a channel. split_columns: a row is so
  // many rows of C channels that a loop over it is long, and column i is of channel i % C.
  int64_t rows, cols, group;
  // Columns a task or step takes; for split_columns the rows a task takes.
  int64_t panel, task_rows;
  int64_t tasks;
};

inline Partition batch_norm_partition(const Extent& e) {
  using Path = Partition::Path;
  const bool channels_last = (e.format == MemoryFormat::channels_last || e.S == 1) && e.C > 1;
  Partition p{};
  if (!channels_last) {
    if (e.S > 0 && e.S <= kSmallPlane && e.N >= (e.S < 64 ? 4 : 16) && e.C > 1) {
      const int64_t channels = kPanel / e.S;
      p = {Path::columns, e.N, e.C * e.S, e.S, channels * e.S, e.N, divide_up(e.C, channels)};
    } else if (e.C < 32 && e.numel() > kTaskWork) {
      p.path = Path::split_planes;
      p.tasks = e.C * e.N * divide_up(e.S, kSegment);
    } else {
      p.path = Path::planes;
      p.tasks = e.C;
    }
    return p;
  }
  const int64_t rows = e.N * e.S;
  if (rows <= 512) {
    const int64_t eighth = divide_up(divide_up(e.C, 8), 16) * 16;
    const int64_t panel = minimum(maximum(eighth, 64), kPanel);
    return {Path::columns, rows, e.C, 1, panel, rows, divide_up(e.C, panel)};
  }
  int64_t wide = 1;
  while (2 * wide * e.C <= kPanel && rows % (2 * wide) == 0) wide *= 2;
  const int64_t wide_rows = rows / wide;
  const int64_t tasks = minimum(maximum(rows * e.C / kTaskWork, 1), kMaxTasks);
  const int64_t task_rows = divide_up(divide_up(wide_rows, tasks), 8) * 8;
  const int64_t cols = wide * e.C;
  return {Path::split_columns, wide_rows, cols, 1, minimum(cols, kPanel), task_rows, divide_up(wide_rows, task_rows)};
}

// Bytes of workspace that BatchNorm's partition needs: six arrays of A (parameters of channels or columns), then
// partial sums in double.
inline int64_t batch_norm_workspace_bytes(const Extent& e) {
  const Partition p = batch_norm_partition(e);
  switch (p.path) {
    case Partition::Path::split_planes: return sizeof(double) * (6 * e.C + 3 * p.tasks);
    case Partition::Path::split_columns: return sizeof(double) * (6 * p.cols + 2 * p.tasks * p.cols);
    default: return 0;
  }
}

struct GroupPartition {
  bool channels_last;
  // Contiguous: too few groups to give every thread one, so a group is worked on in segments.
  bool split;
  // One element to a channel, and long groups: a sample is a row, and a task takes so many of them.
  bool rows;
  // channels_last: ranges of rows that a sample is divided into, and the rows of one; rows: tasks, and a task's rows.
  int64_t splits, task_rows;
  // Doubles for partial sums of tasks, and for sums by sample and channel; A for arrays by sample and channel.
  int64_t partials, sums, arrays;
};

inline GroupPartition group_norm_partition(const Extent& e, int64_t groups) {
  GroupPartition p{};
  p.channels_last = e.format == MemoryFormat::channels_last && e.S > 1 && e.C > 1;
  p.sums = 2 * e.N * e.C;
  if (!p.channels_last) {
    p.split = e.N * groups < 32 && e.numel() > kTaskWork;
    if (p.split) p.partials = 3 * e.N * groups * divide_up(e.C / groups * e.S, kSegment);
    p.rows = !p.split && e.S == 1 && e.C / groups >= kLongRow;
    if (p.rows) {
      const int64_t tasks = minimum(maximum(e.N * e.C / kTaskWork, 1), kMaxTasks);
      p.task_rows = divide_up(e.N, tasks);
      p.splits = divide_up(e.N, maximum(p.task_rows, 1));
      p.sums = 0;
      p.partials = p.splits * 2 * e.C;
      p.arrays = (2 + 2 * p.splits) * e.C;
    }
    return p;
  }
  const int64_t most = divide_up(kMaxTasks, maximum(e.N, 1));
  const int64_t splits = minimum(maximum(e.S * e.C / kTaskWork, 1), most);
  p.task_rows = divide_up(divide_up(e.S, splits), 8) * 8;
  p.splits = divide_up(e.S, p.task_rows);
  p.partials = e.N * p.splits * 2 * e.C;
  p.arrays = (5 * e.N + 1) * e.C;
  return p;
}

inline int64_t group_norm_workspace_bytes(const Extent& e, int64_t groups) {
  const GroupPartition p = group_norm_partition(e, groups);
  return sizeof(double) * (p.partials + p.sums + p.arrays);
}

}  // namespace
}  // namespace normfused
