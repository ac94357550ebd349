// What the BatchNorm and GroupNorm drivers share: tile functions by activation, tasks, gradients of a stretch.
#pragma once

#include "../dispatch.h"
#include "last_cache.h"
#include "moments.h"
#include "partition.h"

namespace normfused {
namespace {

// The loops that depend on the activation, for tensors of T with or without a residual.
template <class T, bool kWithResidual>
struct TileFunctions {
  using A = arithmetic_t<T>;
  template <class P>
  struct Elementwise {
    // `ahead` is where the elements are that are wanted next.
    void (*apply)(const T* x, const T* residual, T* y, int64_t rows, int64_t cols, int64_t stride, int64_t ahead,
                  const P&);
    // dx in training (through the statistics) and in evaluation.
    void (*backward)(const T* x, const T* dy, const T* residual, T* dx, int64_t rows, int64_t cols, int64_t stride,
                     int64_t ahead, const P&);
    void (*backward_frozen)(const T* x, const T* dy, const T* residual, T* dx, int64_t rows, int64_t cols,
                            int64_t stride, int64_t ahead, const P&);
    void (*residual_gradient)(const T* x, const T* dy, const T* residual, T* dresidual, int64_t rows, int64_t cols,
                              int64_t stride, const P&);

    template <class Act, bool kResidual>
    void set() {
      apply = apply_tile<Act, kResidual, T, P>;
      constexpr Statistics kStatistics = kWithResidual ? Statistics::batch : Statistics::group;
      backward = backward_tile<Act, kResidual, kStatistics, T, P>;
      if constexpr (kWithResidual) backward_frozen = backward_tile<Act, kResidual, Statistics::frozen, T, P>;
      if constexpr (kResidual) residual_gradient = residual_gradient_tile<Act, T, P>;
    }
  };
  Elementwise<PlaneParameters<A>> plane;
  Elementwise<ColumnParameters<A>> columns;
  void (*plane_sums)(const T* x, const T* dy, const T* residual, int64_t n, int64_t ahead, const PlaneParameters<A>&,
                     double& s, double& d);
  void (*column_sums)(const T* x, const T* dy, const T* residual, int64_t rows, int64_t cols, int64_t stride,
                      const ColumnParameters<A>&, A* s, A* d);

  TileFunctions(Activation activation, bool residual) {
    dispatch_activation(activation, [&](auto act) {
      using Act = decltype(act);
      if constexpr (kWithResidual) {
        if (residual) return set<Act, true>();
      }
      set<Act, false>();
    });
  }

 private:
  template <class Act, bool kResidual>
  void set() {
    plane.template set<Act, kResidual>();
    columns.template set<Act, kResidual>();
    plane_sums = gradient_moments<Act, kResidual, T>;
    column_sums = column_gradient_moments<Act, kResidual, T>;
  }
};

// Sums over n adjacent elements of one channel of dz and dz (x - mean).
template <class T, class Functions>
void sum_plane(const Functions& functions, const T* x, const T* dy, const T* residual, int64_t n, int64_t ahead,
               const PlaneParameters<arithmetic_t<T>>& p, double& sum_dz, double& sum_dz_deviation) {
  sum_dz = sum_dz_deviation = 0;
  for (int64_t i = 0; i < n; i += kTile) {
    functions.plane_sums(x + i, dy + i, residual ? residual + i : nullptr, minimum(kTile, n - i), ahead, p, sum_dz,
                         sum_dz_deviation);
  }
}

// The same over rows for each of cols <= kPanel columns.
template <class T, class Functions>
void sum_columns(const Functions& functions, const T* x, const T* dy, const T* residual, int64_t rows, int64_t cols,
                 int64_t stride, const ColumnParameters<arithmetic_t<T>>& p, double* sum_dz, double* sum_dz_deviation) {
  using A = arithmetic_t<T>;
  alignas(64) A s[kPanel], d[kPanel];
  for (int64_t c = 0; c < cols; ++c) sum_dz[c] = sum_dz_deviation[c] = 0;
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    const int64_t at = r * stride;
    for (int64_t c = 0; c < cols; ++c) s[c] = d[c] = 0;
    functions.column_sums(x + at, dy + at, residual ? residual + at : nullptr, minimum(kRowBlock, rows - r), cols,
                          stride, p, s, d);
    for (int64_t c = 0; c < cols; ++c) {
      sum_dz[c] += s[c];
      sum_dz_deviation[c] += d[c];
    }
  }
}

// Adds the sums of the other tasks, n each, to those of the first.
inline void add_partials(double* sums, int64_t tasks, int64_t n) {
  for (int64_t task = 1; task < tasks; ++task) {
    const double* other = sums + task * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += other[i];
  }
}

// How BatchNorm's second pass, the one that writes, goes over its tensors.
struct SecondPass {
  int64_t ahead;  // elements to what it asks for
  bool streams;   // past the caches
};

// A task whose elements fit into half of L2 beside the next task's asks for those while it writes: memory is then read
// and written at once. `tensors` are read; `all` counts those that are written too. What a call touches beyond a third
// of the last cache would not stay there for whoever reads the output, so the output is streamed.
template <class T>
SecondPass second_pass(const Partition& p, const Extent& e, int64_t tensors, int64_t all) {
  constexpr int64_t kPipelinedBytes = int64_t{1} << 19;
  const auto bytes = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)); };
  const auto ahead = [&](int64_t task_elements, int64_t next_task, int64_t within) {
    return 2 * tensors * bytes(task_elements) <= kPipelinedBytes ? next_task : within;
  };
  const bool streams = all * bytes(e.numel()) > cpu::last_cache_bytes() / 3;
  switch (p.path) {
    case Partition::Path::planes: {
      const int64_t within = ahead_in_planes<T>(e);
      // Planes are gone through from the last to the first.
      return {ahead(e.N * e.S, e.S, within < e.S ? within : -within), streams};
    }
    case Partition::Path::split_planes: return {ahead_in_planes<T>(e), streams};
    case Partition::Path::columns: return {ahead(p.rows * p.panel, p.panel, ahead_in_rows<T>(p.cols)), streams};
    case Partition::Path::split_columns: break;
  }
  return {ahead_in_rows<T>(p.cols), streams};
}

// f(destination) writes n <= kTile elements: those of `to`, or memory in L1 that is then streamed to it.
template <class T, class F>
void write(T* to, int64_t n, bool streams, F f) {
  if (!streams) return f(to);
  alignas(64) T staged[kTile];
  f(staged);
  stream(staged, to, n);
}

// Calls f(first row, rows) for strips of rows, short enough to stay in L2 between dx and dresidual.
constexpr int64_t kStrip = 16384;
template <class F>
void for_each_strip(int64_t rows, int64_t cols, F f) {
  const int64_t strip = maximum(kStrip / cols, 1);
  for (int64_t r = 0; r < rows; r += strip) f(r, minimum(strip, rows - r));
}

// f(task) for every task in [0, tasks); in order, on this thread, where work (in elements) is not worth a second one.
template <class F>
void for_each_task(ParallelFor parallel_for, int64_t tasks, int64_t work, F f) {
  constexpr int64_t kSerialWork = 16384;
  if (tasks <= 1 || work <= kSerialWork) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  parallel_for(
      tasks,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t task = begin; task < end; ++task) (*static_cast<F*>(context))(task);
        flush();
      },
      &f);
}

template <class F>
auto dispatch_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float64: return f(double{});
    case Dtype::bfloat16: return f(BFloat16{});
    case Dtype::float16: return f(Float16{});
    case Dtype::float32: break;
  }
  return f(float{});
}

}  // namespace
}  // namespace normfused
