// The loops over elements. A tile is at most kTile elements, so that what one loop leaves the next finds in L1.
//
// A plane is a run of elements of one channel: its parameters are scalars (PlaneParameters). Columns are elements side
// by side of different channels, or of expanded channels: parameters are arrays (ColumnParameters).
#pragma once

#include "../activations.h"
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

// z = (x - mean) * scale + bias; the gradient dx = dz * scale - outer * (offset + (x - mean) * slope). The factor
// outer, which offset and slope share, stays outside: slope times it falls below the smallest float where x is about
// 1e20.
template <class A>
struct PlaneParameters {
  A mean, scale, bias, outer, offset, slope;

  NORMFUSED_INLINE const PlaneParameters& at(int64_t) const { return *this; }
};

template <class A>
struct ColumnParameters {
  A *mean, *scale, *bias, *outer, *offset, *slope;

  NORMFUSED_INLINE PlaneParameters<A> at(int64_t c) const {
    return {mean[c], scale[c], bias[c], outer[c], offset[c], slope[c]};
  }
  ColumnParameters from(int64_t c) const { return {mean + c, scale + c, bias + c, outer + c, offset + c, slope + c}; }

  // Sets the parameters of columns [begin, end), step apart.
  void set(int64_t begin, int64_t end, int64_t step, const PlaneParameters<A>& p) const {
    for (int64_t c = begin; c < end; c += step) {
      mean[c] = p.mean;
      scale[c] = p.scale;
      bias[c] = p.bias;
      outer[c] = p.outer;
      offset[c] = p.offset;
      slope[c] = p.slope;
    }
  }
};

// Memory for the parameters of a panel.
template <class A>
struct PanelParameters {
  alignas(64) A mean[kPanel], scale[kPanel], bias[kPanel], outer[kPanel], offset[kPanel], slope[kPanel];

  ColumnParameters<A> columns() { return {mean, scale, bias, outer, offset, slope}; }
};

// How many rows of columns share one load of the parameters. More than one pays where the loop does little else; for
// the rest it would only make the code larger. (A plane's parameters are in registers anyway.)
template <class Act, bool kResidual, class T>
constexpr int kSharedRows = Act::kSelects && !kResidual && sizeof(T) <= 4 ? 4 : 1;

template <class Act, bool kResidual, class T, class P>
constexpr int kRowsAtOnce = 1;
template <class Act, bool kResidual, class T, class A>
constexpr int kRowsAtOnce<Act, kResidual, T, ColumnParameters<A>> = kSharedRows<Act, kResidual, T>;

// f(parameters of column c, index of the element) for every element of rows x cols, kRows rows at a time.
template <int kRows, class P, class F>
NORMFUSED_INLINE void for_each_element(int64_t rows, int64_t cols, int64_t stride, const P& parameters, F f) {
  // A copy: what is behind a reference would be read again after every store.
  const P p = parameters;
  int64_t r = 0;
  if constexpr (kRows > 1) {
    for (; r + kRows <= rows; r += kRows) {
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) {
        const auto q = p.at(c);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) f(q, (r + i) * stride + c);
      }
    }
  }
  for (; r < rows; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) f(p.at(c), r * stride + c);
  }
}

// Sum over n elements of f(i). Four streams, so that no addition waits for the one before.
template <class A, class F>
NORMFUSED_INLINE A sum_over(int64_t n, F f) {
  const int64_t quarter = (n / 4) & ~int64_t{15};
  A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < quarter; ++i) {
    s0 += f(i);
    s1 += f(quarter + i);
    s2 += f(2 * quarter + i);
    s3 += f(3 * quarter + i);
  }
#pragma omp simd reduction(+ : s0)
  for (int64_t i = 4 * quarter; i < n; ++i) s0 += f(i);
  return (s0 + s1) + (s2 + s3);
}

template <class T>
inline arithmetic_t<T> sum(const T* x, int64_t n) {
  return sum_over<arithmetic_t<T>>(n, [=](int64_t i) { return load(x[i]); });
}

// Adds rows of deviations from shift, and of their squares, to s1 and s2 (arrays of cols).
template <class T, class A>
void add_shifted_moments(const T* x, int64_t rows, int64_t cols, int64_t stride, const A* shift, A* s1, A* s2) {
  constexpr int kUnroll = 8;
  int64_t r = 0;
  for (; r + kUnroll <= rows; r += kUnroll, x += kUnroll * stride) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      A a = s1[c], b = s2[c];
#pragma GCC unroll 8
      for (int i = 0; i < kUnroll; ++i) {
        const A d = load(x[i * stride + c]) - shift[c];
        a += d;
        b += d * d;
      }
      s1[c] = a;
      s2[c] = b;
    }
  }
  for (; r < rows; ++r, x += stride) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      const A d = load(x[c]) - shift[c];
      s1[c] += d;
      s2[c] += d * d;
    }
  }
}

// What the activation sees: the pre-activation z, rounded as native's separate operators would round it.
template <bool kResidual, class T, class A>
NORMFUSED_INLINE A pre_activation(const T* x, const T* residual, int64_t i, const PlaneParameters<A>& p) {
  A z = (load(x[i]) - p.mean) * p.scale + p.bias;
  if constexpr (kResidual) z += load(residual[i]);
  return rounded<T>(z);
}

// y = act(z).
template <class Act, bool kResidual, class T, class P>
void apply_tile(const T* __restrict x, const T* __restrict residual, T* __restrict y, int64_t rows, int64_t cols,
                int64_t stride, const P& p) {
  using A = arithmetic_t<T>;
  for_each_element<kRowsAtOnce<Act, kResidual, T, P>>(
      rows, cols, stride, p, [=](const PlaneParameters<A>& q, int64_t i) __attribute__((always_inline)) {
        const A activated = Act::forward(pre_activation<kResidual>(x, residual, i, q));
        if constexpr (Act::kSelects) {
          y[i] = store_exact<T>(activated);
        } else {
          y[i] = store<T>(activated);
        }
      });
}

// Adds dz = act'(z) dy, and dz (x - mean), of n adjacent elements of one channel to s and d.
template <class Act, bool kResidual, class T>
void gradient_moments(const T* __restrict x, const T* __restrict dy, const T* __restrict residual, int64_t n,
                      const PlaneParameters<arithmetic_t<T>>& p, double& s, double& d) {
  using A = arithmetic_t<T>;
  // A copy: members behind a reference would be read again for every element.
  const PlaneParameters<A> q = p;
  const int64_t half = (n / 2) & ~int64_t{15};
  A s0 = 0, s1 = 0, d0 = 0, d1 = 0;
#pragma omp simd reduction(+ : s0, s1, d0, d1)
  for (int64_t i = 0; i < half; ++i) {
    const A g0 = Act::backward(pre_activation<kResidual>(x, residual, i, q), load(dy[i]));
    const A g1 = Act::backward(pre_activation<kResidual>(x, residual, half + i, q), load(dy[half + i]));
    s0 += g0;
    s1 += g1;
    d0 += g0 * (load(x[i]) - q.mean);
    d1 += g1 * (load(x[half + i]) - q.mean);
  }
#pragma omp simd reduction(+ : s0, d0)
  for (int64_t i = 2 * half; i < n; ++i) {
    const A g = Act::backward(pre_activation<kResidual>(x, residual, i, q), load(dy[i]));
    s0 += g;
    d0 += g * (load(x[i]) - q.mean);
  }
  s += static_cast<double>(s0) + s1;
  d += static_cast<double>(d0) + d1;
}

// The same for each of cols columns over rows, added to s and d.
template <class Act, bool kResidual, class T>
void column_gradient_moments(const T* __restrict x, const T* __restrict dy, const T* __restrict residual, int64_t rows,
                             int64_t cols, int64_t stride, const ColumnParameters<arithmetic_t<T>>& p,
                             arithmetic_t<T>* __restrict s, arithmetic_t<T>* __restrict d) {
  using A = arithmetic_t<T>;
  constexpr int kRows = kSharedRows<Act, kResidual, T>;
  int64_t r = 0;
  if constexpr (kRows > 1) {
    for (; r + kRows <= rows; r += kRows) {
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) {
        const PlaneParameters<A> q = p.at(c);
        A a = s[c], b = d[c];
#pragma GCC unroll 4
        for (int k = 0; k < kRows; ++k) {
          const int64_t i = (r + k) * stride + c;
          const A g = Act::backward(pre_activation<kResidual>(x, residual, i, q), load(dy[i]));
          a += g;
          b += g * (load(x[i]) - q.mean);
        }
        s[c] = a;
        d[c] = b;
      }
    }
  }
  for (; r < rows; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      const PlaneParameters<A> q = p.at(c);
      const int64_t i = r * stride + c;
      const A g = Act::backward(pre_activation<kResidual>(x, residual, i, q), load(dy[i]));
      s[c] += g;
      d[c] += g * (load(x[i]) - q.mean);
    }
  }
}

// dx; kStatistics: also through the statistics of the batch or group.
template <class Act, bool kResidual, bool kStatistics, class T, class P>
void backward_tile(const T* __restrict x, const T* __restrict dy, const T* __restrict residual, T* __restrict dx,
                   int64_t rows, int64_t cols, int64_t stride, const P& p) {
  using A = arithmetic_t<T>;
  for_each_element<kRowsAtOnce<Act, kResidual, T, P>>(
      rows, cols, stride, p, [=](const PlaneParameters<A>& q, int64_t i) __attribute__((always_inline)) {
        A g = Act::backward(pre_activation<kResidual>(x, residual, i, q), load(dy[i])) * q.scale;
        if constexpr (kStatistics) g -= q.outer * (q.offset + (load(x[i]) - q.mean) * q.slope);
        dx[i] = store<T>(g);
      });
}

// dresidual = dz.
template <class Act, class T, class P>
void residual_gradient_tile(const T* __restrict x, const T* __restrict dy, const T* __restrict residual,
                            T* __restrict dresidual, int64_t rows, int64_t cols, int64_t stride, const P& p) {
  using A = arithmetic_t<T>;
  for_each_element<1>(rows, cols, stride, p,
                      [=](const PlaneParameters<A>& q, int64_t i) __attribute__((always_inline)) {
                        dresidual[i] = store<T>(Act::backward(pre_activation<true>(x, residual, i, q), load(dy[i])));
                      });
}

}  // namespace
}  // namespace normfused
