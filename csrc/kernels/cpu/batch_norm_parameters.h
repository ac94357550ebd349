// What BatchNorm's forward and backward have in common: the workspace, and the parameters of channels and columns.
#pragma once

#include "../batch_norm.h"
#include "drivers.h"
#include "partition.h"

namespace normfused {
namespace {

// Parameters of channels (split_planes) or columns (split_columns) and partial sums, laid out in the caller's
// workspace.
template <class A>
struct BatchNormWorkspace {
  double* partial;  // split_columns: [tasks][2][cols]; split_planes: what each task sums
  ColumnParameters<A> parameters;

  BatchNormWorkspace(void* memory, const Partition& p, const Extent& e) {
    const int64_t n = p.path == Partition::Path::split_columns ? p.cols : e.C;
    A* arrays = static_cast<A*>(memory);
    parameters = {arrays, arrays + n, arrays + 2 * n, arrays + 3 * n, arrays + 4 * n, arrays + 5 * n};
    partial = static_cast<double*>(memory) + 6 * n;
  }
};

// What normalises and scales channels.
template <class A>
struct Affine {
  const A *mean, *invstd, *weight, *bias;

  // Of one channel; outer is 1, offset and slope are 0.
  PlaneParameters<A> of(int64_t c) const {
    const A scale = weight ? invstd[c] * weight[c] : invstd[c];
    return {mean[c], scale, bias ? bias[c] : A(0), 1, 0, 0};
  }

  // Of n channels from `first` on, a column each, but for offset and slope: in loops of one kind of result, which a
  // compiler can vectorise.
  void fill(int64_t first, int64_t n, const ColumnParameters<A>& p) const {
    for (int64_t i = 0; i < n; ++i) p.mean[i] = mean[first + i];
    if (weight) {
      for (int64_t i = 0; i < n; ++i) p.scale[i] = invstd[first + i] * weight[first + i];
    } else {
      for (int64_t i = 0; i < n; ++i) p.scale[i] = invstd[first + i];
    }
    for (int64_t i = 0; i < n; ++i) p.bias[i] = bias ? bias[first + i] : A(0);
    for (int64_t i = 0; i < n; ++i) p.outer[i] = 1;
  }

  // Those of cols columns, of which each channel has `group`.
  void fill(int64_t first, int64_t cols, int64_t group, const ColumnParameters<A>& p) const {
    if (group == 1) return fill(first, cols, p);
    for (int64_t i = 0; i * group < cols; ++i) p.fill(i * group, group, of(first + i));
  }
};

}  // namespace
}  // namespace normfused
