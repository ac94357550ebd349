// What GroupNorm's forward and backward have in common.
#pragma once

#include "../group_norm.h"
#include "drivers.h"
#include "group_norm_rows.h"
#include "partition.h"

namespace normfused {
namespace {

// The partition, the workspace, and the parameters of planes and columns.
//
// Contiguous: a group is D * S adjacent elements. channels_last: a sample is S rows of C columns, in `splits` ranges.
template <class T>
class GroupNormDriver {
 protected:
  using A = arithmetic_t<T>;

  template <class Args>
  GroupNormDriver(const Args& args, ParallelFor parallel_for, A* mean, A* rstd, int64_t tensors)
      : parallel_for_(parallel_for),
        e_(args.extent),
        G_(args.groups),
        D_(e_.C / args.groups),
        partition_(group_norm_partition(e_, args.groups)),
        second_pass_(second_pass<T>(partition_, e_, tensors)),
        x_(static_cast<const T*>(args.x)),
        weight_(static_cast<const A*>(args.weight)),
        bias_(static_cast<const A*>(args.bias)),
        mean_(mean),
        rstd_(rstd) {
    double* memory = static_cast<double*>(args.workspace);
    partial_ = memory;
    sums_ = partial_ + partition_.partials;
    arrays_ = reinterpret_cast<A*>(sums_ + partition_.sums);
  }

  template <class F>
  void for_each(int64_t tasks, F f) {
    for_each_task<false>(parallel_for_, tasks, e_.numel(), f);
  }
  template <class F>
  void for_each_backwards(int64_t tasks, F f) {
    for_each_task<true>(parallel_for_, tasks, e_.numel(), f);
  }

  A bias(int64_t c) const { return bias_ ? bias_[c] : A(0); }

  PlaneParameters<A> plane_parameters(int64_t n, int64_t c) const {
    const int64_t unit = n * G_ + c / D_;
    return {mean_[unit], weight_ ? rstd_[unit] * weight_[c] : rstd_[unit], bias(c), rstd_[unit], 0, 0};
  }

  // Column arrays of one sample in the workspace: mean, scale, outer, offset, slope of each channel; bias is shared.
  A* sample_array(int64_t n, int64_t which) const { return arrays_ + (5 * n + which) * e_.C; }
  A* bias_array() const { return arrays_ + 5 * e_.N * e_.C; }
  ColumnParameters<A> column_parameters(int64_t n) const {
    return {sample_array(n, 0), sample_array(n, 1), bias_array(),
            sample_array(n, 2), sample_array(n, 3), sample_array(n, 4)};
  }

  void fill_bias_array() {
    for (int64_t c = 0; c < e_.C; ++c) bias_array()[c] = bias(c);
  }

  void fill_sample_arrays(int64_t n) {
    for (int64_t c = 0; c < e_.C; ++c) {
      const PlaneParameters<A> p = plane_parameters(n, c);
      sample_array(n, 0)[c] = p.mean;
      sample_array(n, 1)[c] = p.scale;
      sample_array(n, 2)[c] = p.outer;
    }
  }

  // channels_last: the rows of a task, whose sample is task / splits.
  int64_t first_row(int64_t task) const { return first_row_of(task % partition_.splits, partition_.splits, e_.S); }
  int64_t row_count(int64_t task) const {
    return first_row_of(task % partition_.splits + 1, partition_.splits, e_.S) - first_row(task);
  }
  int64_t offset_of(int64_t task) const { return (task / partition_.splits * e_.S + first_row(task)) * e_.C; }

  // Rows: weight and bias of every channel, in the workspace.
  void fill_row_arrays() {
    for (int64_t c = 0; c < e_.C; ++c) {
      arrays_[c] = weight_ ? weight_[c] : A(1);
      arrays_[e_.C + c] = bias(c);
    }
  }
  RowParameters<A> row_parameters(int64_t n, int64_t g) const {
    return {mean_[n * G_ + g], rstd_[n * G_ + g], 0, 0, arrays_ + g * D_, arrays_ + e_.C + g * D_};
  }
  // Rows: f(sample, group) for the groups of a task.
  template <class F>
  void for_each_row(int64_t begin, int64_t end, F f) const {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t g = 0; g < G_; ++g) f(n, g);
    }
  }

  template <class F>
  void for_each_panel(F f) const {
    for (int64_t c = 0; c < e_.C; c += kPanel) f(c, minimum(kPanel, e_.C - c));
  }

  // Contiguous, small planes: channels side by side, so that a loop is long enough to vectorise. Calls
  // f(first channel, channels, columns' parameters) for stretches of at most kPanel columns.
  template <class Parameters, class F>
  void for_each_stretch(int64_t begin, int64_t end, Parameters parameters, F f) const {
    PanelParameters<A> panel;
    const int64_t most = kPanel / e_.S;
    for (int64_t first = begin; first < end; first += most) {
      const int64_t channels = minimum(most, end - first);
      for (int64_t i = 0; i < channels; ++i) {
        panel.columns().fill(i * e_.S, e_.S, parameters(first + i));
      }
      f(first, channels, panel.columns());
    }
  }

  bool small_planes() const { return e_.S < 64; }

  // Writes n elements from `at` on: f(begin, count, destination) those of a tile.
  template <class F>
  void write_plane(T* to, int64_t at, int64_t n, F f) const {
    for (int64_t i = at; i < at + n; i += kTile) {
      const int64_t count = minimum(kTile, at + n - i);
      write(to + i, count, second_pass_.streams, [&](T* destination) { f(i, count, destination); });
    }
  }

  // Contiguous: what comes after n elements is next to them, where it is asked for.
  int64_t ahead_after(int64_t n) const { return second_pass_.reading.asks ? n : 0; }

  // channels_last: writes the rows of a task; f(begin, rows, columns, destination, parameters) some of them.
  template <class F>
  void write_rows(T* to, int64_t task, F f) const {
    const ColumnParameters<A> p = column_parameters(task / partition_.splits);
    for (int64_t c = 0; c < e_.C; c += kTile) {
      const int64_t cols = minimum(kTile, e_.C - c);
      for_each_strip(row_count(task), second_pass_.strip(cols, e_.C), [&](int64_t row, int64_t count) {
        const int64_t at = offset_of(task) + row * e_.C + c;
        write(to + at, count * cols, second_pass_.streams,
              [&](T* destination) { f(at, count, cols, destination, p.from(c)); });
      });
    }
  }

  const ParallelFor parallel_for_;
  const Extent e_;
  const int64_t G_, D_;
  const GroupPartition partition_;
  const SecondPass second_pass_;
  const T* x_;
  const A *weight_, *bias_;
  A *mean_, *rstd_;
  double *partial_, *sums_;
  A* arrays_;
};

}  // namespace
}  // namespace normfused
