// What the BatchNorm and GroupNorm drivers share: tile functions by activation, tasks, gradients of a stretch.
#pragma once

#include "../dispatch.h"
#include "moments.h"

namespace normfused {
namespace {

// The loops that depend on the activation, for tensors of T and parameters P.
template <class T, class P>
struct TileFunctions {
  using A = arithmetic_t<T>;
  void (*apply)(const T* x, const T* residual, T* y, int64_t rows, int64_t cols, int64_t stride, const P&);
  void (*gradient)(const T* x, const T* dy, const T* residual, A* dz, int64_t rows, int64_t cols, int64_t stride,
                   const P&);

  TileFunctions(Activation activation, bool residual) {
    dispatch_activation(activation, [&](auto act) {
      using Act = decltype(act);
      apply = residual ? apply_tile<Act, true, T, P> : apply_tile<Act, false, T, P>;
      gradient = residual ? gradient_tile<Act, true, T, P> : gradient_tile<Act, false, T, P>;
    });
  }
};

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
      },
      &f);
}

// dx and dresidual (each may be null) of rows x cols elements; for planes rows is 1.
template <class T, class P>
void backward_apply(const T* x, const T* dy, const T* residual, T* dx, T* dresidual, int64_t rows, int64_t cols,
                    int64_t stride, bool through_statistics, const P& p,
                    decltype(TileFunctions<T, P>::gradient) gradient) {
  alignas(64) arithmetic_t<T> dz[kTile];
  const int64_t strip = kTile / cols;
  // Backwards: the end of the rows is what an earlier pass left in the cache.
  for (int64_t left = rows; left > 0;) {
    const int64_t count = minimum(strip, left);
    left -= count;
    const int64_t at = left * stride;
    gradient(x + at, dy + at, residual ? residual + at : nullptr, dz, count, cols, stride, p);
    if (dresidual) store_tile(dz, dresidual + at, count, cols, stride);
    if (!dx) continue;
    if (through_statistics) {
      backward_apply_tile<true>(x + at, dz, dx + at, count, cols, stride, p);
    } else {
      backward_apply_tile<false>(x + at, dz, dx + at, count, cols, stride, p);
    }
  }
}

// backward_apply for n adjacent elements of one channel.
template <class T>
void backward_apply_plane(const T* x, const T* dy, const T* residual, T* dx, T* dresidual, int64_t n,
                          bool through_statistics, const PlaneParameters<arithmetic_t<T>>& p,
                          decltype(TileFunctions<T, PlaneParameters<arithmetic_t<T>>>::gradient) gradient) {
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = minimum(kTile, n - i);
    backward_apply(x + i, dy + i, residual ? residual + i : nullptr, dx ? dx + i : nullptr,
                   dresidual ? dresidual + i : nullptr, 1, count, count, through_statistics, p, gradient);
  }
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
