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

// z = (x - mean) * scale + bias; the gradient dx = dz * scale - (offset + (x - mean) * slope).
template <class A>
struct PlaneParameters {
  A mean, scale, bias, offset, slope;

  A mean_at(int64_t) const { return mean; }
  A scale_at(int64_t) const { return scale; }
  A bias_at(int64_t) const { return bias; }
  A offset_at(int64_t) const { return offset; }
  A slope_at(int64_t) const { return slope; }
};

template <class A>
struct ColumnParameters {
  const A *mean, *scale, *bias, *offset, *slope;

  A mean_at(int64_t c) const { return mean[c]; }
  A scale_at(int64_t c) const { return scale[c]; }
  A bias_at(int64_t c) const { return bias[c]; }
  A offset_at(int64_t c) const { return offset[c]; }
  A slope_at(int64_t c) const { return slope[c]; }

  ColumnParameters shifted(int64_t c) const {
    return {mean + c, scale + c, bias + c, offset ? offset + c : nullptr, slope ? slope + c : nullptr};
  }
};

// Sum over n elements of f(i). Four streams, so that no addition waits for the one before.
template <class A, class F>
inline A sum_over(int64_t n, F f) {
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

template <class T>
inline arithmetic_t<T> sum_of_squared_deviations(const T* x, int64_t n, arithmetic_t<T> mean) {
  return sum_over<arithmetic_t<T>>(n, [=](int64_t i) {
    const arithmetic_t<T> d = load(x[i]) - mean;
    return d * d;
  });
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

// Adds rows of dz, and of dz * (x - mean), to s1 and s2; dz is dense.
template <class T, class A>
void add_gradient_moments(const T* x, const A* dz, int64_t rows, int64_t cols, int64_t stride, const A* mean, A* s1,
                          A* s2) {
  constexpr int kUnroll = 4;
  int64_t r = 0;
  for (; r + kUnroll <= rows; r += kUnroll, x += kUnroll * stride, dz += kUnroll * cols) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      A a = s1[c], b = s2[c];
#pragma GCC unroll 4
      for (int i = 0; i < kUnroll; ++i) {
        const A g = dz[i * cols + c];
        a += g;
        b += g * (load(x[i * stride + c]) - mean[c]);
      }
      s1[c] = a;
      s2[c] = b;
    }
  }
  for (; r < rows; ++r, x += stride, dz += cols) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      s1[c] += dz[c];
      s2[c] += dz[c] * (load(x[c]) - mean[c]);
    }
  }
}

// y = act(z). Tensors have the same stride between rows.
template <class Act, bool kResidual, class T, class P>
void apply_tile(const T* __restrict x, const T* __restrict residual, T* __restrict y, int64_t rows, int64_t cols,
                int64_t stride, const P& p) {
  using A = arithmetic_t<T>;
  for (int64_t r = 0; r < rows; ++r, x += stride, y += stride, residual += kResidual ? stride : 0) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      A z = (load(x[c]) - p.mean_at(c)) * p.scale_at(c) + p.bias_at(c);
      if constexpr (kResidual) z += load(residual[c]);
      y[c] = store<T>(Act::forward(rounded<T>(z)));
    }
  }
}

// dz = act'(z) dy, dense rows of cols, z computed as in apply_tile.
template <class Act, bool kResidual, class T, class P>
void gradient_tile(const T* __restrict x, const T* __restrict dy, const T* __restrict residual,
                   arithmetic_t<T>* __restrict dz, int64_t rows, int64_t cols, int64_t stride, const P& p) {
  using A = arithmetic_t<T>;
  for (int64_t r = 0; r < rows; ++r, x += stride, dy += stride, dz += cols, residual += kResidual ? stride : 0) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      A z = (load(x[c]) - p.mean_at(c)) * p.scale_at(c) + p.bias_at(c);
      if constexpr (kResidual) z += load(residual[c]);
      dz[c] = Act::backward(rounded<T>(z), load(dy[c]));
    }
  }
}

// dx from dz; kStatistics: also through the statistics of the batch or group.
template <bool kStatistics, class T, class P>
void backward_apply_tile(const T* __restrict x, const arithmetic_t<T>* __restrict dz, T* __restrict dx, int64_t rows,
                         int64_t cols, int64_t stride, const P& p) {
  using A = arithmetic_t<T>;
  for (int64_t r = 0; r < rows; ++r, x += stride, dx += stride, dz += cols) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      A g = dz[c] * p.scale_at(c);
      if constexpr (kStatistics) g -= p.offset_at(c) + (load(x[c]) - p.mean_at(c)) * p.slope_at(c);
      dx[c] = store<T>(g);
    }
  }
}

template <class T>
void store_tile(const arithmetic_t<T>* __restrict from, T* __restrict to, int64_t rows, int64_t cols, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, from += cols, to += stride) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) to[c] = store<T>(from[c]);
  }
}

}  // namespace
}  // namespace normfused
