// GroupNorm of rows, S = 1: a group is D adjacent elements of a row, each of a channel of its own. With one group that
// is LayerNorm. A row's statistics, its sums and its second pass are one trip, with the row in L1.
#pragma once

#include "drivers.h"

namespace normfused {
namespace {

// The parameters of a group's elements: statistics are the same for all, weight and bias arrays.
template <class A>
struct RowParameters {
  A mean, rstd, offset, slope;
  const A *weight, *bias;

  template <class V>
  NORMFUSED_INLINE PlaneParameters<V> at(int64_t c) const {
    const V outer = constant<V>(rstd);
    return {constant<V>(mean),   outer * load<V>(weight + c), load<V>(bias + c), outer,
            constant<V>(offset), constant<V>(slope)};
  }
  RowParameters from(int64_t c) const { return {mean, rstd, offset, slope, weight + c, bias + c}; }
};

// Adds dz and dz x_hat of n elements to s and d, element by element, and the group's sums of weight dz and
// weight dz (x - mean) to total and total_deviation.
template <class Act, class T>
void row_gradient_moments(const T* __restrict x, const T* __restrict dy, int64_t n,
                          const RowParameters<arithmetic_t<T>>& parameters, arithmetic_t<T>* __restrict s,
                          arithmetic_t<T>* __restrict d, double& total, double& total_deviation) {
  using A = arithmetic_t<T>;
  const RowParameters<A> p = parameters;
  double totals[2] = {};
  accumulate<2, A, false>(n, totals, [=](int64_t i, auto& sums) __attribute__((always_inline)) {
    using V = lane_type<decltype(sums[0])>;
    const PlaneParameters<V> q = p.template at<V>(i);
    const V g = gradient<Act, false>(x, dy, static_cast<const T*>(nullptr), i, q);
    const V deviation = load<V>(x + i) - q.mean, weighted = g * load<V>(p.weight + i);
    store(s + i, load<V>(s + i) + g);
    store(d + i, load<V>(d + i) + g * (deviation * q.outer));
    sums[0] += weighted;
    sums[1] += weighted * deviation;
  });
  total += totals[0];
  total_deviation += totals[1];
}

// The loops over rows that depend on the activation.
template <class T>
struct RowFunctions {
  using A = arithmetic_t<T>;
  using P = RowParameters<A>;
  void (*apply)(const T* x, const T* residual, T* y, int64_t rows, int64_t cols, int64_t stride, int64_t ahead,
                const P&);
  void (*sums)(const T* x, const T* dy, int64_t n, const P&, A* s, A* d, double& total, double& total_deviation);
  void (*backward)(const T* x, const T* dy, const T* residual, T* dx, int64_t rows, int64_t cols, int64_t stride,
                   int64_t ahead, const P&);

  explicit RowFunctions(Activation activation) {
    dispatch_activation(activation, [&](auto act) {
      using Act = decltype(act);
      apply = apply_tile<Act, false, T, P>;
      sums = row_gradient_moments<Act, T>;
      backward = backward_tile<Act, false, Statistics::group, T, P>;
    });
  }
};

}  // namespace
}  // namespace normfused
