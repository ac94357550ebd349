// The loops over elements. A tile is at most kTile elements, so that what one loop leaves the next finds in L1.
// Where x may be read as something else than is stored, that is called X (preactivated.h).
//
// A plane is a run of elements of one channel: its parameters are scalars (PlaneParameters). Columns are elements side
// by side of different channels, or of expanded channels: parameters are arrays (ColumnParameters).
#pragma once

#include "../activations.h"
#include "../types.h"
#include "preactivated.h"
#include "storage.h"

namespace normfused {
namespace {

constexpr int64_t kTile = 2048;
// Columns that are worked on at a time.
constexpr int64_t kPanel = 512;
// Rows (or planes' elements) that are summed in the arithmetic type before the sum goes into a double.
constexpr int64_t kRowBlock = 128;

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline bool is_finite(double value) { return value - value == 0; }

// z = (x - mean) * scale + bias; the gradient dx through the statistics of a group is dz * scale - outer * (offset +
// (x - mean) * slope), through those of a batch the same with scale for outer, and without statistics dz * outer. The
// factor that offset and slope share stays outside: slope times it falls below the smallest float where x is about
// 1e20.
template <class A>
struct PlaneParameters {
  A mean, scale, bias, outer, offset, slope;

  // The same in every lane of V.
  template <class V>
  NORMFUSED_INLINE PlaneParameters<V> at(int64_t) const {
    return {constant<V>(mean),  constant<V>(scale),  constant<V>(bias),
            constant<V>(outer), constant<V>(offset), constant<V>(slope)};
  }
  PlaneParameters with_scale_as_outer() const { return {mean, scale, bias, scale, offset, slope}; }
};

template <class A>
struct ColumnParameters {
  A *mean, *scale, *bias, *outer, *offset, *slope;

  // Of column c, or of the columns from c on that fill V.
  template <class V>
  NORMFUSED_INLINE PlaneParameters<V> at(int64_t c) const {
    return {load<V>(mean + c),  load<V>(scale + c),  load<V>(bias + c),
            load<V>(outer + c), load<V>(offset + c), load<V>(slope + c)};
  }
  ColumnParameters from(int64_t c) const { return {mean + c, scale + c, bias + c, outer + c, offset + c, slope + c}; }
  ColumnParameters with_scale_as_outer() const { return {mean, scale, bias, scale, offset, slope}; }

  void set(int64_t c, const PlaneParameters<A>& p) const {
    mean[c] = p.mean;
    scale[c] = p.scale;
    bias[c] = p.bias;
    outer[c] = p.outer;
    offset[c] = p.offset;
    slope[c] = p.slope;
  }
  // Sets the parameters of n adjacent columns.
  void fill(int64_t begin, int64_t n, const PlaneParameters<A>& p) const {
    const ColumnParameters to = from(begin);
    for_each_vector_overlapping<A>(n, [=](int64_t c, auto lanes) __attribute__((always_inline)) {
      using V = decltype(lanes);
      store(to.mean + c, constant<V>(p.mean));
      store(to.scale + c, constant<V>(p.scale));
      store(to.bias + c, constant<V>(p.bias));
      store(to.outer + c, constant<V>(p.outer));
      store(to.offset + c, constant<V>(p.offset));
      store(to.slope + c, constant<V>(p.slope));
    });
  }
  // Repeats those of the first n columns in the columns after them, up to cols.
  void repeat(int64_t n, int64_t cols) const {
    A* const arrays[] = {mean, scale, bias, outer, offset, slope};
    for (A* array : arrays) {
      for (int64_t c = n; c < cols; ++c) array[c] = array[c - n];
    }
  }
};

// Memory for the parameters of a panel.
template <class A>
struct PanelParameters {
  alignas(64) A mean[kPanel], scale[kPanel], bias[kPanel], outer[kPanel], offset[kPanel], slope[kPanel];

  ColumnParameters<A> columns() { return {mean, scale, bias, outer, offset, slope}; }
};

// Asks for the line of an element that a pass over cold memory will need soon.
template <class T>
NORMFUSED_INLINE void prefetch(const T* x, int64_t element) {
  __builtin_prefetch(reinterpret_cast<const char*>(x) + element * static_cast<int64_t>(sizeof(T)));
}

// How rows are read: one by one, or several at once, which saves loads of what belongs to columns but is more streams
// than a processor follows in memory; and whether it asks for rows to come, although they are not far apart.
struct RowReading {
  bool one_by_one, asks;
};

// How far ahead: 0 where the processor finds what comes next by itself, since asking costs as much as reading then.
// Some rows of a matrix if they are far apart.
constexpr int64_t kFarRowBytes = 16384, kLongPlaneBytes = 8192;
template <class T>
int64_t ahead_in_rows(int64_t stride, bool asks, int64_t rows = 4) {
  return asks || stride * static_cast<int64_t>(sizeof(T)) >= kFarRowBytes ? rows * stride : 0;
}

// f(first element, count, ahead) for the tiles of n adjacent elements of T, which are equal but for the last. `ahead`
// is a tile some kilobytes on, in this stretch or in the one that starts `next` elements after it. 0: nothing is asked.
template <class T, class F>
NORMFUSED_INLINE void for_each_tile(int64_t n, int64_t next, F f) {
  int64_t size = n, distance = next ? n : 0, beyond = next;
  if (n > kTile) {
    constexpr int64_t kStep = 64;
    size = divide_up(divide_up(n, divide_up(n, kTile)), kStep) * kStep;
    if (next) {
      const int64_t tiles = divide_up(n, size);
      distance = minimum(sizeof(T) < 4 ? 2 : 1, tiles) * size;
      beyond = next + distance - tiles * size;
    }
  }
  for (int64_t i = 0; i < n; i += size) f(i, minimum(size, n - i), i + distance < n ? distance : beyond);
}

// f(parameters of column c, index of the element) for the elements of rows x cols, a vector or one at a time. f may see
// elements twice. Row by row: several at once would save loads of the parameters, but more streams than the processor
// prefetches cost twice as much where the tensor is in memory.
template <class T, class P, class F>
NORMFUSED_INLINE void for_each_element(int64_t rows, int64_t cols, int64_t stride, const P& parameters, F f) {
  // A copy: what is behind a reference would be read again after every store.
  const P p = parameters;
  for (int64_t r = 0; r < rows; ++r) {
    for_each_vector_overlapping<arithmetic_t<T>>(cols, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
      f(p.template at<decltype(lanes)>(c), r * stride + c);
    });
  }
}

// Adds to sums over n elements: add(i, s) takes the elements from i on into s[kSums], vectors or single values. Four
// streams of vectors, so that no addition waits for the one before; emptied after a few, so that values which repeat do
// not add up their roundings. kRepeats: add may be called for some elements twice, of which once counts.
template <int kSums, class A, bool kRepeats = true, class F>
NORMFUSED_INLINE void accumulate(int64_t n, double (&sums)[kSums], F add) {
  using V = Vector<A>;
  constexpr int64_t kLane = kLanes<A>, kStep = 4 * kLane, kRun = 8 * kStep;
  V total[kSums];
  for (V& v : total) v = V{};
  int64_t i = 0;
  while (i + kStep <= n) {
    V a[kSums], b[kSums], c[kSums], d[kSums];
    for (int j = 0; j < kSums; ++j) a[j] = b[j] = c[j] = d[j] = V{};
    for (const int64_t last = minimum(n, i + kRun) - kStep; i <= last; i += kStep) {
      add(i, a);
      add(i + kLane, b);
      add(i + 2 * kLane, c);
      add(i + 3 * kLane, d);
    }
    for (int j = 0; j < kSums; ++j) total[j] += (a[j] + b[j]) + (c[j] + d[j]);
  }
  for (; i + kLane <= n; i += kLane) add(i, total);
  A rest[kSums] = {};
  if (kRepeats && i < n && n >= kLane) {
    const LastLanes<A> count(n - i);
    V last[kSums];
    for (V& v : last) v = V{};
    add(n - kLane, last);
    for (int j = 0; j < kSums; ++j) total[j] += count(last[j]);
  } else {
    for (; i < n; ++i) add(i, rest);
  }
  for (int j = 0; j < kSums; ++j) sums[j] += static_cast<double>(sum_of_lanes<A, kLanes<A>>(total[j])) + rest[j];
}

template <class T>
inline double sum(const T* x, int64_t n) {
  double total[1] = {};
  accumulate<1, arithmetic_t<T>>(n, total, [=](int64_t i, auto& s) __attribute__((always_inline)) {
    using V = lane_type<decltype(s[0])>;
    s[0] += load<V>(x + i);
  });
  return total[0];
}

// Adds rows of deviations from shift, and of their squares, to s1 and s2 (arrays of cols).
template <int kRows, class T, class A>
NORMFUSED_INLINE void add_rows(const T* x, int64_t cols, int64_t stride, int64_t ahead, const A* shift, A* s1, A* s2) {
  for_each_vector<A>(cols, [=](int64_t c, auto lanes, auto count) __attribute__((always_inline)) {
    using V = decltype(lanes);
    const V from = load<V>(shift + c);
    V a{}, b{};
    for (int i = 0; i < kRows; ++i) {
      prefetch(x, i * stride + c + ahead);
      const V d = load<V>(x + i * stride + c) - from;
      a += d;
      b += d * d;
    }
    store(s1 + c, load<V>(s1 + c) + count(a));
    store(s2 + c, load<V>(s2 + c) + count(b));
  });
}

template <class T, class A>
void add_shifted_moments(const T* x, int64_t rows, int64_t cols, int64_t stride, RowReading reading, const A* shift,
                         A* s1, A* s2) {
  const int64_t ahead = ahead_in_rows<T>(stride, reading.asks, 8);
  int64_t r = 0;
  for (; !reading.one_by_one && r + 8 <= rows; r += 8) add_rows<8>(x + r * stride, cols, stride, ahead, shift, s1, s2);
  for (; r < rows; ++r) add_rows<1>(x + r * stride, cols, stride, ahead, shift, s1, s2);
}

// Whether z has a residual; either: where its pointer is not null. That costs a branch for a vector and saves a copy of
// the loop, so it is for activations that take much longer.
enum class Residual { none, given, either };

// z, of the elements at i.
template <Residual kResidual, class X, class V>
NORMFUSED_INLINE V pre_activation(const X* x, const element_t<X>* residual, int64_t i, const PlaneParameters<V>& p) {
  V z = (load<V>(x + i) - p.mean) * p.scale + p.bias;
  if (kResidual == Residual::given || (kResidual == Residual::either && residual)) z += load<V>(residual + i);
  return z;
}

// act(z) and act'(z) dy, with z rounded as native's separate operators would round it.
template <class Act, class T, class V>
NORMFUSED_INLINE V activated(V z) {
  if constexpr (!Act::kSelects) z = rounded<T>(z);
  return Act::forward(z);
}
template <class Act, class T, class V>
NORMFUSED_INLINE V activated_gradient(V z, V dy) {
  if constexpr (!Act::kSelects) z = rounded<T>(z);
  return Act::backward(z, dy, Rounding<T>{});
}
// Of one value: called, since loops over less than a vector are rare, and small this way.
template <class Act, class T>
NORMFUSED_NOINLINE arithmetic_t<T> activated_one(arithmetic_t<T> z) {
  return activated<Act, T>(z);
}
template <class Act, class T>
NORMFUSED_NOINLINE arithmetic_t<T> activated_gradient_one(arithmetic_t<T> z, arithmetic_t<T> dy) {
  return activated_gradient<Act, T>(z, dy);
}

// dz.
template <class Act, Residual kResidual, class X, class V>
NORMFUSED_INLINE V gradient(const X* x, const element_t<X>* dy, const element_t<X>* residual, int64_t i,
                            const PlaneParameters<V>& p) {
  const V z = pre_activation<kResidual>(x, residual, i, p), g = load<V>(dy + i);
  if constexpr (Lanes<V>::kCount == 1 && !Act::kSelects) return activated_gradient_one<Act, element_t<X>>(z, g);
  return activated_gradient<Act, element_t<X>>(z, g);
}

// y = act(z).
template <class Act, Residual kResidual, class X, class P>
void apply_tile(const element_t<X>* __restrict stored, const element_t<X>* __restrict residual,
                element_t<X>* __restrict y, int64_t rows, int64_t cols, int64_t stride, int64_t ahead, const P& p) {
  const X* x = read_as<X>(stored);
  for_each_element<X>(rows, cols, stride, p, [=](const auto& q, int64_t i) __attribute__((always_inline)) {
    prefetch(x, i + ahead);
    const auto z = pre_activation<kResidual>(x, residual, i, q);
    if constexpr (Lanes<lane_type<decltype(z)>>::kCount == 1 && !Act::kSelects) {
      store(y + i, activated_one<Act, element_t<X>>(z));
    } else {
      store(y + i, activated<Act, element_t<X>>(z));
    }
  });
}

// Adds dz = act'(z) dy, and dz (x - mean), of n adjacent elements of one channel to s and d.
template <class Act, Residual kResidual, class X>
void gradient_moments(const element_t<X>* __restrict stored, const element_t<X>* __restrict dy,
                      const element_t<X>* __restrict residual, int64_t n, int64_t ahead,
                      const PlaneParameters<arithmetic_t<X>>& parameters, double& s, double& d) {
  using A = arithmetic_t<X>;
  const PlaneParameters<A> p = parameters;
  const X* x = read_as<X>(stored);
  double total[2] = {};
  accumulate<2, A>(n, total, [=](int64_t i, auto& sums) __attribute__((always_inline)) {
    using V = lane_type<decltype(sums[0])>;
    const auto q = p.template at<V>(0);
    prefetch(x, i + ahead);
    prefetch(dy, i + ahead);
    const V g = gradient<Act, kResidual>(x, dy, residual, i, q);
    sums[0] += g;
    sums[1] += g * (load<V>(x + i) - q.mean);
  });
  s += total[0];
  d += total[1];
}

// Rows that share one load of the sums. More than one pays where the loop does little else; for the rest it would only
// make the code larger.
template <class Act, Residual kResidual, class X>
constexpr int kSharedRows = Act::kSelects && kResidual == Residual::none && sizeof(X) <= 4 ? 4 : 1;

template <class Act, Residual kResidual, int kRows, class X>
NORMFUSED_INLINE void add_gradient_rows(const X* x, const element_t<X>* dy, const element_t<X>* residual, int64_t cols,
                                        int64_t stride, int64_t ahead, const ColumnParameters<arithmetic_t<X>>& p,
                                        arithmetic_t<X>* s, arithmetic_t<X>* d) {
  for_each_vector<arithmetic_t<X>>(cols, [=](int64_t c, auto lanes, auto count) __attribute__((always_inline)) {
    using V = decltype(lanes);
    const PlaneParameters<V> q = p.template at<V>(c);
    V a{}, b{};
    for (int k = 0; k < kRows; ++k) {
      const int64_t i = k * stride + c;
      prefetch(x, i + ahead);
      prefetch(dy, i + ahead);
      const V g = gradient<Act, kResidual>(x, dy, residual, i, q);
      a += g;
      b += g * (load<V>(x + i) - q.mean);
    }
    store(s + c, load<V>(s + c) + count(a));
    store(d + c, load<V>(d + c) + count(b));
  });
}

// The same for each of cols columns over rows, added to s and d.
template <class Act, Residual kResidual, class X>
void column_gradient_moments(const element_t<X>* __restrict stored, const element_t<X>* __restrict dy,
                             const element_t<X>* __restrict residual, int64_t rows, int64_t cols, int64_t stride,
                             RowReading reading, const ColumnParameters<arithmetic_t<X>>& p,
                             arithmetic_t<X>* __restrict s, arithmetic_t<X>* __restrict d) {
  constexpr int kRows = kSharedRows<Act, kResidual, X>;
  const X* x = read_as<X>(stored);
  const int64_t ahead = ahead_in_rows<X>(stride, reading.asks);
  int64_t r = 0;
  for (; !reading.one_by_one && r + kRows <= rows; r += kRows) {
    const int64_t at = r * stride;
    add_gradient_rows<Act, kResidual, kRows>(x + at, dy + at, residual ? residual + at : nullptr, cols, stride, ahead,
                                             p, s, d);
  }
  for (; r < rows; ++r) {
    const int64_t at = r * stride;
    add_gradient_rows<Act, kResidual, 1>(x + at, dy + at, residual ? residual + at : nullptr, cols, stride, ahead, p, s,
                                         d);
  }
}

// What dx goes through: nothing (evaluation; and dz itself), the statistics of a batch, or those of a group.
enum class Statistics { frozen, batch, group };

// dx may be dy where no vector of a row overlaps another.
template <class Act, Residual kResidual, Statistics kStatistics, class X, class P>
void backward_tile(const element_t<X>* __restrict stored, const element_t<X>* dy,
                   const element_t<X>* __restrict residual, element_t<X>* dx, int64_t rows, int64_t cols,
                   int64_t stride, int64_t ahead, const P& p) {
  const X* x = read_as<X>(stored);
  for_each_element<X>(rows, cols, stride, p, [=](const auto& q, int64_t i) __attribute__((always_inline)) {
    using V = lane_type<decltype(q.mean)>;
    // For dz, after dx, all of it is in L1, where asking costs as much as reading.
    if (kStatistics != Statistics::frozen || ahead) {
      prefetch(x, i + ahead);
      prefetch(dy, i + ahead);
    }
    V g = gradient<Act, kResidual>(x, dy, residual, i, q);
    const V through = q.offset + (load<V>(x + i) - q.mean) * q.slope;
    // A batch: the difference first, so that a dz that is the same everywhere gives 0, not the products' rounding.
    if constexpr (kStatistics == Statistics::batch) g -= through;
    g *= kStatistics == Statistics::frozen ? q.outer : q.scale;
    if constexpr (kStatistics == Statistics::group) g -= q.outer * through;
    store(dx + i, gradient_of_stored(x + i, g));
  });
}

}  // namespace
}  // namespace normfused
