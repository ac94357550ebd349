// Mean and variance of planes and of columns.
//
// Sums of deviations from a shift taken from the data itself: with k of n values averaged into the shift, the relative
// error that cancellation adds to a variance is at most (1 + n / k) units of rounding, whatever the mean. The k are
// spread out: neighbours are often alike, and would be as far from the mean as one of them. Where squares overflow the
// arithmetic type, the values are summed again in double.
#pragma once

#include "../welford.h"
#include "tiles.h"

namespace normfused {
namespace {

// n values, stride apart, in double and two passes: the slow and safe way.
template <class T>
WelfordData exact_moments(const T* x, int64_t n, int64_t stride) {
  double total = 0, m2 = 0;
  for (int64_t i = 0; i < n; ++i) total += load<arithmetic_t<T>>(x + i * stride);
  const double mean = total / n;
  for (int64_t i = 0; i < n; ++i) {
    const double d = load<arithmetic_t<T>>(x + i * stride) - mean;
    m2 += d * d;
  }
  return {static_cast<double>(n), mean, m2};
}

// Values of a channel that are averaged into the shift of a block of rows: so many, and one row in so many; and vectors
// into that of a tile.
constexpr int64_t kSampledValues = 16, kRowsPerSample = 8, kSampledVectors = 8;

// The average of some of the rows, of which each holds `group` values of a channel.
template <class T, class A>
void sample_rows(const T* x, int64_t rows, int64_t cols, int64_t group, int64_t stride, A* average) {
  const int64_t enough = minimum(rows, divide_up(kSampledValues, group));
  const int64_t sampled = maximum(divide_up(rows, kRowsPerSample), enough), step = rows / sampled * stride;
  const A per_row = A(1) / sampled;
  for (int64_t c = 0; c < cols; ++c) average[c] = 0;
  for (int64_t r = 0; r < sampled; ++r, x += step) {
    for_each_vector<A>(cols, [=](int64_t c, auto lanes, auto count) __attribute__((always_inline)) {
      using V = decltype(lanes);
      store(average + c, load<V>(average + c) + count(load<V>(x + c) * constant<V>(per_row)));
    });
  }
}

// The average of some of n adjacent values.
template <class T>
arithmetic_t<T> sample(const T* x, int64_t n) {
  using A = arithmetic_t<T>;
  constexpr int64_t kSampled = kSampledVectors * kLanes<A>;
  if (n < kSampled) return static_cast<A>(sum(x, n) / n);
  Vector<A> total{};
  for (int64_t k = 0; k < kSampledVectors; ++k) total += load<Vector<A>>(x + k * (n / kSampledVectors));
  return sum_of_lanes<A, kLanes<A>>(total) / kSampled;
}

// At most kTile adjacent values.
template <class T>
WelfordData tile_moments(const T* x, int64_t n, int64_t ahead) {
  using A = arithmetic_t<T>;
  const A shift = sample(x, n);
  double sums[2] = {};
  accumulate<2, A>(n, sums, [=](int64_t i, auto& s) __attribute__((always_inline)) {
    using V = lane_type<decltype(s[0])>;
    prefetch(x, i + ahead);
    const V deviation = load<V>(x + i) - constant<V>(shift);
    s[0] += deviation;
    s[1] += deviation * deviation;
  });
  const double s = sums[0], q = sums[1];
  if (!is_finite(q)) return exact_moments(x, n, 1);
  const double m2 = q - s * s / n;
  return {static_cast<double>(n), shift + s / n, m2 > 0 ? m2 : 0};
}

// n > 0 adjacent values; those that come after them are at x + next.
template <class T>
WelfordData plane_moments(const T* x, int64_t n, int64_t next) {
  WelfordData data;
  for_each_tile<T>(n, next, [&](int64_t i, int64_t count, int64_t ahead) {
    const WelfordData tile = tile_moments(x + i, count, ahead);
    if (i == 0) {
      data = tile;
    } else {
      data.combine(tile);
    }
  });
  return data;
}

// WelfordData::combine for cols columns of equal counts: no division for each of them.
inline void combine_columns(int64_t cols, double count, double* mean, double* m2, double other_count,
                            const double* other_mean, const double* other_m2) {
  const double share = other_count / (count + other_count);
  const double weight = count * share;
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) {
    const double delta = other_mean[c] - mean[c];
    mean[c] += delta * share;
    m2[c] += other_m2[c] + delta * delta * weight;
  }
}

// Moments of each of cols <= kPanel columns over rows.
template <class T>
void column_moments(const T* x, int64_t rows, int64_t cols, int64_t stride, RowReading reading, double* mean,
                    double* m2) {
  using A = arithmetic_t<T>;
  alignas(64) A shift[kPanel], s1[kPanel], s2[kPanel];
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    const int64_t count = minimum(kRowBlock, rows - r);
    const T* block = x + r * stride;
    sample_rows(block, count, cols, 1, stride, shift);
    for (int64_t c = 0; c < cols; ++c) s1[c] = s2[c] = 0;
    add_shifted_moments(block, count, cols, stride, reading, shift, s1, s2);
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
    if (r == 0) {
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) mean[c] = m2[c] = 0;
    }
    const double per_count = 1.0 / count;
    double block_mean[kPanel], block_m2[kPanel];
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      const double s = s1[c];
      const double q = s2[c] - s * s * per_count;
      block_mean[c] = shift[c] + s * per_count;
      block_m2[c] = q > 0 ? q : 0;
    }
    combine_columns(cols, r, mean, m2, count, block_mean, block_m2);
  }
}

// Moments of channels that are `group` adjacent columns each, over rows; cols <= kPanel, and mean and m2 hold
// cols / group.
template <class T>
void group_moments(const T* x, int64_t rows, int64_t cols, int64_t group, int64_t stride, RowReading reading,
                   double* mean, double* m2) {
  using A = arithmetic_t<T>;
  if (group == 1) return column_moments(x, rows, cols, stride, reading, mean, m2);
  alignas(64) A shift[kPanel], s1[kPanel], s2[kPanel];
  WelfordData data[kPanel];
  const int64_t channels = cols / group;
  for (int64_t r = 0; r < rows; r += kRowBlock) {
    const int64_t count = minimum(kRowBlock, rows - r);
    const T* block = x + r * stride;
    sample_rows(block, count, cols, group, stride, shift);
    for (int64_t c = 0; c < cols; c += group) {
      const A average = static_cast<A>(sum(shift + c, group) / group);
      for (int64_t i = c; i < c + group; ++i) {
        shift[i] = average;
        s1[i] = s2[i] = 0;
      }
    }
    add_shifted_moments(block, count, cols, stride, reading, shift, s1, s2);
    for (int64_t channel = 0; channel < channels; ++channel) {
      const int64_t c = channel * group;
      const double s = sum(s1 + c, group), q = sum(s2 + c, group);
      if (is_finite(q)) {
        const double n = static_cast<double>(count * group);
        const double deviations = q - s * s / n;
        data[channel].combine({n, shift[c] + s / n, deviations > 0 ? deviations : 0});
      } else {
        for (int64_t i = 0; i < group; ++i) data[channel].combine(exact_moments(block + c + i, count, stride));
      }
    }
  }
  for (int64_t channel = 0; channel < channels; ++channel) {
    mean[channel] = data[channel].mean;
    m2[channel] = data[channel].m2;
  }
}

}  // namespace
}  // namespace normfused
