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
    const V g = gradient<Act, Residual::none>(x, dy, static_cast<const T*>(nullptr), i, q);
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
ApplyFunction<T, RowParameters<arithmetic_t<T>>> apply_row_function(Activation activation) {
  ApplyFunction<T, RowParameters<arithmetic_t<T>>> function;
  dispatch_activation(activation, [&](auto act) {
    function = apply_tile<decltype(act), Residual::none, T, RowParameters<arithmetic_t<T>>>;
  });
  return function;
}
template <class T>
struct RowBackwardFunctions {
  using A = arithmetic_t<T>;
  using P = RowParameters<A>;
  void (*sums)(const T* x, const T* dy, int64_t n, const P&, A* s, A* d, double& total, double& total_deviation);
  BackwardFunction<T, P> backward;

  explicit RowBackwardFunctions(Activation activation) {
    dispatch_activation(activation, [&](auto act) {
      using Act = decltype(act);
      sums = row_gradient_moments<Act, T>;
      backward = backward_tile<Act, Residual::none, Statistics::group, T, P>;
    });
  }
};

}  // namespace
}  // namespace normfused
