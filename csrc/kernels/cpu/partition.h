// How an input is divided into tasks: a function of its shape only, so that the number of threads cannot change a bit.
#pragma once

#include "../types.h"
#include "tiles.h"

namespace normfused {
namespace {

// Elements that a task should have at least: of the first few tasks, which a small tensor is worth, and of all that
// there are when there are more; and the most tasks that hold partial sums.
constexpr int64_t kFewTasks = 8;
constexpr int64_t kSmallTaskWork = 16384, kTaskWork = 65536;
constexpr int64_t kMaxTasks = 64;
// Planes of at most this many elements are worked on side by side, each element a column, if there are rows enough to
// share a column's parameters.
constexpr int64_t kSmallPlane = 256;
// Channels that a task of planes takes at most. One alone would be a chain from its sum to its result, each step
// waiting for the one before.
constexpr int64_t kChannels = 8;
// Elements of a plane that one task of split planes takes.
constexpr int64_t kSegment = 65536;
// Elements of a group in one row from which on it is worth loops of its own.
constexpr int64_t kLongRow = 64;

// Tasks for each of some matrices of rows x cols: a power of two, which threads share evenly.
inline int64_t count_tasks(int64_t matrices, int64_t rows, int64_t cols) {
  int64_t tasks = 1;
  while (matrices * tasks < kMaxTasks && rows >= 16 * tasks &&
         rows * cols >= 2 * tasks * (matrices * tasks < kFewTasks ? kSmallTaskWork : kTaskWork)) {
    tasks *= 2;
  }
  return tasks;
}

// Where a task's range of rows starts; loops take eight rows at once. No range is empty if there are eight for each.
inline int64_t first_row_of(int64_t task, int64_t tasks, int64_t rows) {
  return task == tasks ? rows : rows * task / tasks / 8 * 8;
}

struct Partition {
  enum class Path {
    planes,         // a task is a channel, or some of short planes: statistics, then normalise while they are in L2
    split_planes,   // few channels: a task is a segment of a plane; statistics of all first, then normalise
    columns,        // a task is a panel of columns: statistics, then normalise while it is in L2
    split_columns,  // a task is a range of rows, all columns; statistics of all first, then normalise
  };
  Path path;
  // For columns: a matrix of rows x cols. columns: `group` adjacent columns to a channel. split_columns: a row is so
  // many rows of C channels that a loop over it is long, and column i is of channel i % C.
  int64_t rows, cols, group;
  // Columns a task or step takes; planes: channels a task takes.
  int64_t panel;
  int64_t tasks;

  // split_columns: the rows of a task.
  int64_t first_row(int64_t task) const { return first_row_of(task, tasks, rows); }
  int64_t row_count(int64_t task) const { return first_row(task + 1) - first_row(task); }
};

// The columns of a panel where rows are few: whole vectors, wide enough for rows to be read in stretches and narrow
// enough for eight tasks, and less where that makes an even number of panels.
inline int64_t panel_of(int64_t cols) {
  constexpr int64_t kStep = 16, kLeast = 32;
  const int64_t most = minimum(maximum(divide_up(divide_up(cols, kFewTasks), kStep) * kStep, 2 * kLeast), kPanel);
  for (int64_t panel = most; panel >= kLeast; panel -= kStep) {
    if (cols % (2 * panel) == 0) return panel;
  }
  return most;
}

inline Partition batch_norm_partition(const Extent& e) {
  using Path = Partition::Path;
  const bool channels_last = (e.format == MemoryFormat::channels_last || e.S == 1) && e.C > 1;
  Partition p{};
  if (!channels_last) {
    if (e.S > 0 && e.S <= kSmallPlane && e.N >= (e.S < 64 ? 4 : 16) && e.C > 1) {
      const int64_t channels = kPanel / e.S;
      p = {Path::columns, e.N, e.C * e.S, e.S, channels * e.S, divide_up(e.C, channels)};
    } else if (e.C < 32 && e.numel() > kTaskWork) {
      p.path = Path::split_planes;
      p.tasks = e.C * e.N * divide_up(e.S, kSegment);
    } else {
      p.path = Path::planes;
      p.panel = minimum(maximum(kTile / maximum(e.N * e.S, 1), 1), kChannels);
      p.tasks = divide_up(e.C, p.panel);
    }
    return p;
  }
  const int64_t rows = e.N * e.S;
  if (rows <= 512) {
    const int64_t panel = panel_of(e.C);
    return {Path::columns, rows, e.C, 1, panel, divide_up(e.C, panel)};
  }
  int64_t wide = 1;
  while (2 * wide * e.C <= kPanel && rows % (2 * wide) == 0) wide *= 2;
  const int64_t cols = wide * e.C, wide_rows = rows / wide;
  return {Path::split_columns, wide_rows, cols, 1, minimum(cols, kPanel), count_tasks(1, wide_rows, cols)};
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
  // channels_last: ranges of rows that a sample is divided into; rows: tasks, and the rows of one.
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
  p.splits = count_tasks(e.N, e.S, e.C);
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
