// What the BatchNorm and GroupNorm drivers share: loops by activation, tasks, gradients of a stretch.
#pragma once

#include "../dispatch.h"
#include "moments.h"
#include "partition.h"
#include "processor.h"

namespace normfused {
namespace {

// Moments of a plane, and of channels that are some columns each, of what is read as X.
template <class X>
WelfordData plane_moments_of(const element_t<X>* stored, int64_t n, int64_t next) {
  return plane_moments(read_as<X>(stored), n, next);
}
template <class X>
void group_moments_of(const element_t<X>* stored, int64_t rows, int64_t cols, int64_t group, int64_t stride,
                      RowReading reading, double* mean, double* m2) {
  group_moments(read_as<X>(stored), rows, cols, group, stride, reading, mean, m2);
}

// Whether dz takes much longer to compute than to write and read, and is not rounded by that.
template <class Act, class T>
constexpr bool kExpensive = Act::kExponential && sizeof(T) == sizeof(arithmetic_t<T>);

// What a loop is compiled for. X: what x is read as.
template <class Act_, Residual kResidual_, class X_>
struct Variant {
  using Act = Act_;
  static constexpr Residual kResidual = kResidual_;
  using X = X_;
};

// Calls f with the variant for tensors of T: BatchNorm's with a residual and a pre_activation, GroupNorm's without.
template <class T, bool kBatchNorm, class F>
void dispatch_variant(Activation activation, bool residual, Activation pre_activation, F&& f) {
  if constexpr (kBatchNorm) {
    // Without the others: cpu::fuses_pre_activation.
    if (pre_activation == Activation::relu) return f(Variant<Identity, Residual::none, Preactivated<T, ReLU>>{});
    if (pre_activation == Activation::relu6) return f(Variant<Identity, Residual::none, Preactivated<T, ReLU6>>{});
  }
  dispatch_activation(activation, [&](auto act) {
    using Act = decltype(act);
    if constexpr (kBatchNorm && Act::kExponential) {
      f(Variant<Act, Residual::either, T>{});
    } else {
      if constexpr (kBatchNorm) {
        if (residual) return f(Variant<Act, Residual::given, T>{});
      }
      f(Variant<Act, Residual::none, T>{});
    }
  });
}

// Loops over elements. `ahead` is where the elements are that are wanted next.
template <class T, class P>
using ApplyFunction = void (*)(const T* x, const T* residual, T* y, int64_t rows, int64_t cols, int64_t stride,
                               int64_t ahead, const P&);
template <class T, class P>
using BackwardFunction = void (*)(const T* x, const T* dy, const T* residual, T* dx, int64_t rows, int64_t cols,
                                  int64_t stride, int64_t ahead, const P&);

// The forward's loops that depend on the activations.
template <class T, bool kBatchNorm>
struct ForwardFunctions {
  using A = arithmetic_t<T>;
  ApplyFunction<T, PlaneParameters<A>> apply_plane;
  ApplyFunction<T, ColumnParameters<A>> apply_columns;
  // BatchNorm's moments of x.
  WelfordData (*plane_moments)(const T* x, int64_t n, int64_t next);
  void (*group_moments)(const T* x, int64_t rows, int64_t cols, int64_t group, int64_t stride, RowReading reading,
                        double* mean, double* m2);

  ForwardFunctions(Activation activation, bool residual, Activation pre_activation = Activation::identity) {
    dispatch_variant<T, kBatchNorm>(activation, residual, pre_activation, [this](auto variant) {
      using V = decltype(variant);
      apply_plane = apply_tile<typename V::Act, V::kResidual, typename V::X, PlaneParameters<A>>;
      apply_columns = apply_tile<typename V::Act, V::kResidual, typename V::X, ColumnParameters<A>>;
      if constexpr (kBatchNorm) {
        plane_moments = plane_moments_of<typename V::X>;
        group_moments = group_moments_of<typename V::X>;
      }
    });
  }
};

// In the backward: what passes the identity is dy, whatever z is.
template <class V>
constexpr Residual kGradientResidual = V::kResidual;
template <class X>
constexpr Residual kGradientResidual<Variant<Identity, Residual::given, X>> = Residual::none;

// The backward's.
template <class T, bool kBatchNorm>
struct BackwardFunctions {
  using A = arithmetic_t<T>;
  template <class P>
  struct Elementwise {
    // dx through the statistics, and without them: dz times the parameter `outer`.
    BackwardFunction<T, P> backward, backward_frozen;

    template <class V>
    void set() {
      constexpr Statistics kStatistics = kBatchNorm ? Statistics::batch : Statistics::group;
      backward = backward_tile<typename V::Act, kGradientResidual<V>, kStatistics, typename V::X, P>;
      if constexpr (kBatchNorm) {
        backward_frozen = backward_tile<typename V::Act, kGradientResidual<V>, Statistics::frozen, typename V::X, P>;
      }
    }
  };
  Elementwise<PlaneParameters<A>> plane;
  Elementwise<ColumnParameters<A>> columns;
  void (*plane_sums)(const T* x, const T* dy, const T* residual, int64_t n, int64_t ahead, const PlaneParameters<A>&,
                     double& s, double& d);
  void (*column_sums)(const T* x, const T* dy, const T* residual, int64_t rows, int64_t cols, int64_t stride,
                      RowReading reading, const ColumnParameters<A>&, A* s, A* d);
  // Whether dz is worth keeping from one pass to the next, as a T.
  bool keeps_gradient;

  BackwardFunctions(Activation activation, bool residual, Activation pre_activation = Activation::identity) {
    dispatch_variant<T, kBatchNorm>(activation, residual, pre_activation, [&](auto variant) {
      using V = decltype(variant);
      plane.template set<V>();
      columns.template set<V>();
      plane_sums = gradient_moments<typename V::Act, kGradientResidual<V>, typename V::X>;
      column_sums = column_gradient_moments<typename V::Act, kGradientResidual<V>, typename V::X>;
      keeps_gradient = !residual && kExpensive<typename V::Act, T>;
    });
  }
};

// Sums over n adjacent elements of one channel of dz and dz (x - mean).
template <class T, class Functions>
void sum_plane(const Functions& functions, const T* x, const T* dy, const T* residual, int64_t n, int64_t next,
               const PlaneParameters<arithmetic_t<T>>& p, double& sum_dz, double& sum_dz_deviation) {
  sum_dz = sum_dz_deviation = 0;
  for_each_tile<T>(n, next, [&](int64_t i, int64_t count, int64_t ahead) {
    functions.plane_sums(x + i, dy + i, residual ? residual + i : nullptr, count, ahead, p, sum_dz, sum_dz_deviation);
  });
}

// The same over rows for each of cols <= kPanel columns.
template <class T, class Functions>
void sum_columns(const Functions& functions, const T* x, const T* dy, const T* residual, int64_t rows, int64_t cols,
                 int64_t stride, RowReading reading, const ColumnParameters<arithmetic_t<T>>& p, double* sum_dz,
                 double* sum_dz_deviation) {
  using A = arithmetic_t<T>;
  alignas(64) A s[kPanel], d[kPanel];
  for (int64_t c = 0; c < cols; ++c) sum_dz[c] = sum_dz_deviation[c] = 0;
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    const int64_t at = r * stride;
    for (int64_t c = 0; c < cols; ++c) s[c] = d[c] = 0;
    functions.column_sums(x + at, dy + at, residual ? residual + at : nullptr, minimum(kRowBlock, rows - r), cols,
                          stride, reading, p, s, d);
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

// Rows that stay in L2 between dx and dresidual.
inline int64_t strip_in_cache(int64_t cols) { return maximum(16384 / cols, 1); }

// Calls f(first row, rows) for strips of rows.
template <class F>
void for_each_strip(int64_t rows, int64_t strip, F f) {
  for (int64_t r = 0; r < rows; r += strip) f(r, minimum(strip, rows - r));
}

// How the second pass, the one that writes, goes over its tensors.
struct SecondPass {
  int64_t ahead;         // elements to what it asks for
  bool streams;          // past the caches
  RowReading reading;    // of the first pass
  bool by_tile = false;  // planes: ahead is to the next plane, and what it asks for is the next tile

  // How far the first pass looks: to what is `elements` on, or nowhere if this pass does not either.
  int64_t next(int64_t elements) const { return ahead ? elements : 0; }
  // From a channel's plane of sample n to the one that is read next: of that channel, or the next one's first.
  int64_t next_plane(const Extent& e, int64_t n) const { return next(n + 1 < e.N ? e.C * e.S : e.S - n * e.C * e.S); }

  template <class T, class F>
  NORMFUSED_INLINE void for_each_tile(int64_t n, F f) const {
    normfused::for_each_tile<T>(n, by_tile ? ahead : 0, [&](int64_t i, int64_t count, int64_t within) {
      f(i, count, by_tile ? within : ahead);
    });
  }

  // Rows to take at a time. What is streamed is at most a tile of adjacent elements, and not much less: it is read back
  // from L1 when its stores have got there.
  int64_t strip(int64_t cols, int64_t stride) const {
    if (!streams) return strip_in_cache(cols);
    return cols == stride ? maximum(kTile / cols, 1) : 1;
  }
};

// A task whose elements fit into half of L2 beside the next task's asks for those while it writes: memory is then read
// and written at once. `tensors` are read.
template <class T>
int64_t ahead_in_second_pass(int64_t tensors, int64_t task_elements, int64_t next_task, int64_t within) {
  constexpr int64_t kPipelinedBytes = int64_t{1} << 19;
  return 2 * tensors * task_elements * static_cast<int64_t>(sizeof(T)) <= kPipelinedBytes ? next_task : within;
}

// What a call touches beyond a third of the last cache would not stay there for whoever reads the output. Streaming
// costs more in short pieces, whose first and last lines are not streamed, and in strips of whole rows; there it pays
// where next to nothing would stay. `tensors` are read or written. (All limits are measured.)
constexpr int64_t kShortPieceBytes = 2048;
template <class T>
bool streams_output(const Extent& e, int64_t tensors, bool in_pieces) {
  const int64_t cache = cpu::last_cache_bytes();
  return tensors * e.numel() * static_cast<int64_t>(sizeof(T)) > (in_pieces ? 3 * cache : cache / 3);
}
// The same limit, for asking ahead.
template <class T>
bool asks_ahead(const Extent& e, int64_t tensors) {
  return cpu::asks_ahead() && streams_output<T>(e, tensors, false);
}

// BatchNorm's: `tensors` are read, `all` read or written.
template <class T>
SecondPass second_pass(const Partition& p, const Extent& e, int64_t tensors, int64_t all) {
  const auto ahead = [&](int64_t task_elements, int64_t next_task, int64_t within) {
    return ahead_in_second_pass<T>(tensors, task_elements, next_task, within);
  };
  const bool short_planes = e.S * static_cast<int64_t>(sizeof(T)) <= kShortPieceBytes;
  const bool streams = streams_output<T>(e, all, short_planes || p.path == Partition::Path::split_columns);
  const bool asks = asks_ahead<T>(e, all);
  const RowReading reading{streams, asks};
  switch (p.path) {
    case Partition::Path::planes: {
      // Short planes are over before the processor has noticed them. They are gone through from the last to the first.
      const bool plane_asks = asks || (e.N > 1 && e.S * static_cast<int64_t>(sizeof(T)) < kLongPlaneBytes);
      const int64_t next_task = plane_asks ? ahead(p.panel * e.N * e.S, p.panel * e.S, 0) : 0;
      return {next_task ? next_task : plane_asks ? -e.C * e.S : 0, streams, reading, next_task == 0};
    }
    case Partition::Path::split_planes: return {asks ? e.S : 0, streams, reading, true};
    case Partition::Path::columns:
      return {ahead(p.rows * p.panel, p.panel, ahead_in_rows<T>(p.cols, false)), streams, {false, false}};
    case Partition::Path::split_columns: break;
  }
  return {ahead_in_rows<T>(p.cols, asks), streams, reading};
}

// GroupNorm's; contiguous, its groups are one long stretch.
template <class T>
SecondPass second_pass(const GroupPartition& p, const Extent& e, int64_t tensors) {
  const bool streams = streams_output<T>(e, tensors, p.channels_last), asks = asks_ahead<T>(e, tensors);
  return {p.channels_last ? ahead_in_rows<T>(e.C, asks) : 0, streams, {streams, asks}};
}

// f(destination) writes n <= kTile elements: those of `to`, or memory in L1 that is then streamed to it.
template <class T, class F>
void write(T* to, int64_t n, bool streams, F f) {
  if (!streams) return f(to);
  alignas(64) T staged[kTile];
  f(staged);
  stream(staged, to, n);
}

// f(task) for every task in [0, tasks); on this thread where work (in elements) is not worth a second one. Each thread
// takes a range of adjacent tasks, in order; backwards, from its last task to its first: a second pass then starts, in
// every thread, with what the first one left in the caches of that thread's core.
template <bool kBackwards, class F>
void for_each_task(ParallelFor parallel_for, int64_t tasks, int64_t work, F f) {
  constexpr int64_t kSerialWork = 16384;
  const auto range = [](int64_t begin, int64_t end, void* context) {
    F& f = *static_cast<F*>(context);
    for (int64_t i = begin; i < end; ++i) f(kBackwards ? begin + end - 1 - i : i);
    flush();
  };
  if (tasks <= 1 || work <= kSerialWork) return range(0, tasks, &f);
  parallel_for(tasks, range, &f);
}

template <class F>
auto dispatch_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
#if NORMFUSED_VECTOR_BYTES == 64
    case Dtype::float64: break;  // never comes here: dispatch.cpp
#else
    case Dtype::float64: return f(double{});
#endif
    case Dtype::bfloat16: return f(BFloat16{});
    case Dtype::float16: return f(Float16{});
    case Dtype::float32: break;
  }
  return f(float{});
}

}  // namespace
}  // namespace normfused
