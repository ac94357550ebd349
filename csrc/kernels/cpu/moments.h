// Mean and variance of planes and of columns.
//
// Sums of deviations from a shift taken from the data itself: with k of n values averaged into the shift, the relative
// error that cancellation adds to a variance is at most (1 + n / k) units of rounding, whatever the mean. Where squares
// overflow the arithmetic type, the values are summed again in double.
#pragma once

#include "../welford.h"
#include "tiles.h"

namespace normfused {
namespace {

// n values, stride apart, in double and two passes: the slow and safe way.
template <class T>
WelfordData exact_moments(const T* x, int64_t n, int64_t stride) {
  double total = 0, m2 = 0;
  for (int64_t i = 0; i < n; ++i) total += load(x[i * stride]);
  const double mean = total / n;
  for (int64_t i = 0; i < n; ++i) {
    const double d = load(x[i * stride]) - mean;
    m2 += d * d;
  }
  return {static_cast<double>(n), mean, m2};
}

// At most kTile adjacent values.
template <class T>
WelfordData tile_moments(const T* x, int64_t n) {
  using A = arithmetic_t<T>;
  const int64_t sample = minimum(n, 64);
  const A shift = sum(x, sample) / sample;
  const int64_t half = (n / 2) & ~int64_t{15};
  A s0 = 0, s1 = 0, q0 = 0, q1 = 0;
#pragma omp simd reduction(+ : s0, s1, q0, q1)
  for (int64_t i = 0; i < half; ++i) {
    const A d0 = load(x[i]) - shift;
    const A d1 = load(x[half + i]) - shift;
    s0 += d0;
    s1 += d1;
    q0 += d0 * d0;
    q1 += d1 * d1;
  }
#pragma omp simd reduction(+ : s0, q0)
  for (int64_t i = 2 * half; i < n; ++i) {
    const A d = load(x[i]) - shift;
    s0 += d;
    q0 += d * d;
  }
  const double s = static_cast<double>(s0) + s1;
  const double q = static_cast<double>(q0) + q1;
  if (!is_finite(q)) return exact_moments(x, n, 1);
  const double m2 = q - s * s / n;
  return {static_cast<double>(n), shift + s / n, m2 > 0 ? m2 : 0};
}

// Any number of adjacent values.
template <class T>
WelfordData plane_moments(const T* x, int64_t n) {
  WelfordData data;
  for (int64_t i = 0; i < n; i += kTile) data.combine(tile_moments(x + i, minimum(kTile, n - i)));
  return data;
}

// Moments of each of cols <= kPanel columns over rows, combined into mean and m2, which hold count rows so far.
template <class T>
void column_moments(const T* x, int64_t rows, int64_t cols, int64_t stride, double* mean, double* m2) {
  using A = arithmetic_t<T>;
  alignas(64) A shift[kPanel], s1[kPanel], s2[kPanel];
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    const int64_t count = minimum(kRowBlock, rows - r);
    const T* block = x + r * stride;
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      shift[c] = load(block[c]);
      s1[c] = s2[c] = 0;
    }
    add_shifted_moments(block, count, cols, stride, shift, s1, s2);
    A finite = 0;
#pragma omp simd reduction(+ : finite)
    for (int64_t c = 0; c < cols; ++c) finite += s2[c] * A(0);
    if (finite != 0) {
      // A square overflowed, or there is an inf or NaN.
      for (int64_t c = 0; c < cols; ++c) {
        WelfordData data{static_cast<double>(r), r ? mean[c] : 0, r ? m2[c] : 0};
        data.combine(exact_moments(block + c, count, stride));
        mean[c] = data.mean;
        m2[c] = data.m2;
      }
      continue;
    }
    // WelfordData::combine, with counts that all columns share.
    const double per_count = 1.0 / count;
    const double share = static_cast<double>(count) / (r + count);
    const double weight = r * share;
    if (r == 0) {
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) mean[c] = m2[c] = 0;
    }
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      const double s = s1[c];
      const double q = s2[c] - s * s * per_count;
      const double delta = shift[c] + s * per_count - mean[c];
      mean[c] += delta * share;
      m2[c] += (q > 0 ? q : 0) + delta * delta * weight;
    }
  }
}

// Sums over rows of dz and dz (x - mean), for cols <= kPanel columns.
template <class T, class Gradient>
void column_gradient_moments(const T* x, const T* dy, const T* residual, int64_t rows, int64_t cols, int64_t stride,
                             const ColumnParameters<arithmetic_t<T>>& p, Gradient gradient, double* sum_dz,
                             double* sum_dz_deviation) {
  using A = arithmetic_t<T>;
  alignas(64) A dz[kTile], s1[kPanel], s2[kPanel];
  for (int64_t c = 0; c < cols; ++c) sum_dz[c] = sum_dz_deviation[c] = 0;
  const int64_t strip = kTile / cols;
  for (int64_t block = 0; block < rows; block += kRowBlock) {
    const int64_t end = minimum(block + kRowBlock, rows);
    for (int64_t c = 0; c < cols; ++c) s1[c] = s2[c] = 0;
    for (int64_t r = block; r < end; r += strip) {
      const int64_t count = minimum(strip, end - r);
      const int64_t at = r * stride;
      gradient(x + at, dy + at, residual ? residual + at : nullptr, dz, count, cols, stride, p);
      add_gradient_moments(x + at, dz, count, cols, stride, p.mean, s1, s2);
    }
    for (int64_t c = 0; c < cols; ++c) {
      sum_dz[c] += s1[c];
      sum_dz_deviation[c] += s2[c];
    }
  }
}

// The same for n adjacent values of one channel.
template <class T, class Gradient>
void plane_gradient_moments(const T* x, const T* dy, const T* residual, int64_t n,
                            const PlaneParameters<arithmetic_t<T>>& p, Gradient gradient, double& sum_dz,
                            double& sum_dz_deviation) {
  using A = arithmetic_t<T>;
  alignas(64) A dz[kTile];
  sum_dz = sum_dz_deviation = 0;
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = minimum(kTile, n - i);
    const T* tile = x + i;
    gradient(tile, dy + i, residual ? residual + i : nullptr, dz, 1, count, count, p);
    const A mean = p.mean;
    const A* g = dz;
    sum_dz += sum_over<A>(count, [=](int64_t j) { return g[j]; });
    sum_dz_deviation += sum_over<A>(count, [=](int64_t j) { return g[j] * (load(tile[j]) - mean); });
  }
}

}  // namespace
}  // namespace normfused
