// Mean and deviations of what a block works on, and what becomes of them.
//
// Deviations from the first value that a thread sees, in batches whose own moments are exact two-pass ones: nothing
// cancels, whatever the mean. Where a square overflows single precision, the thread starts again in double.
#pragma once

#include "../welford.h"
#include "elements.cuh"

namespace normfused::cuda {

template <class A>
__device__ __forceinline__ A inverse_deviation(const Welford<double>& data, double eps) {
  return static_cast<A>(1 / sqrt(data.m2 / data.count + eps));
}

// Moves a running statistic towards that of a batch.
template <class A>
__device__ __forceinline__ void move(void* running, Dtype dtype, int64_t at, double momentum, double batch) {
  if (running == nullptr) return;
  store_channel(running, dtype, at, (1 - momentum) * load_channel<A>(running, dtype, at) + momentum * batch);
}

// Saves the statistics of a group and moves its running ones.
template <class A>
__device__ __forceinline__ void set_statistics(int64_t at, const Welford<double>& data, double eps,
                                               const RunningStatistics& running, A* mean, A* invstd) {
  mean[at] = static_cast<A>(data.mean);
  invstd[at] = inverse_deviation<A>(data, eps);
  const double momentum = running.cumulative ? 1 / double(*running.num_batches_tracked) : running.momentum;
  move<A>(running.mean, running.dtype, at, momentum, data.mean);
  move<A>(running.var, running.dtype, at, momentum, data.m2 / (data.count - 1));
}

// Who reads the count does so in a later launch.
template <class T>
__device__ __forceinline__ void count_batch(const Stage<T>& s) {
  if (s.num_batches_tracked && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) ++*s.num_batches_tracked;
}

template <class Act, int V, class T>
__device__ __forceinline__ Welford<double> plane_moments(const Stage<T>& s, const BlockWork& work) {
  using A = Accumulator<T>;
  Welford<A> data;
  A shift = 0;
  for_each_slot<V, kPlaneBatch>(s.pass, work, [&](const Slot(&slots)[kPlaneBatch], int) {
    Vector<T, V> x[kPlaneBatch];
#pragma unroll
    for (int u = 0; u < kPlaneBatch; ++u) x[u] = load_slot<V>(s.x, slots[u]);
#pragma unroll
    for (int u = 0; u < kPlaneBatch; ++u) {
      const Slot& slot = slots[u];
      const int n = slot.last - slot.first;
      if (n <= 0) continue;
      if (data.count == 0) shift = input<Act>(s, s.x[slot.offset + slot.first]);
      const auto present = [&](int v) { return slot.whole || (v >= slot.first && v < slot.last); };
      A d[V], sum = 0, m2 = 0;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        d[v] = input<Act>(s, x[u].values[v]) - shift;
        if (present(v)) sum += d[v];
      }
      const A mean = slot.whole ? sum * (A(1) / V) : sum / n;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (present(v)) m2 += (d[v] - mean) * (d[v] - mean);
      }
      data.combine({A(n), mean, m2});
    }
  });
  return {double(data.count), double(shift) + data.mean, double(data.m2)};
}

template <class Act, int V, class T>
__device__ Welford<double> exact_plane_moments(const Stage<T>& s, const BlockWork& work) {
  double count = 0, mean = 0, m2 = 0;
  const auto for_each_value = [&](auto f) {
    for_each_slot<V, 1>(s.pass, work, [&](const Slot(&slots)[1], int) {
      for (int v = slots[0].first; v < slots[0].last; ++v) f(double(input<Act>(s, s.x[slots[0].offset + v])));
    });
  };
  for_each_value([&](double value) { ++count, mean += value; });
  mean /= count;
  for_each_value([&](double value) { m2 += (value - mean) * (value - mean); });
  return {count, mean, m2};
}

}  // namespace normfused::cuda
