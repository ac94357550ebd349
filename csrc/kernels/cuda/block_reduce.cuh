// Reductions over a warp and over a block by shuffles, in a fixed order: every thread gets the same bits, every time.
//
// Blocks are whole warps, at most 32 of them. Scratch is shared memory that nobody uses meanwhile, one element per warp
// (and value); it is free again on return.
#pragma once

#include "../welford.h"
#include "device.cuh"

namespace normfused::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / kWarp; }
__device__ __forceinline__ int warp_count() { return blockDim.x / kWarp; }

// Sums K values at once.
template <int K, class A>
__device__ __forceinline__ void warp_sum(A (&values)[K]) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) values[k] += __shfl_xor_sync(kAllLanes, values[k], offset);
  }
}

// scratch: K * warp_count() elements.
template <int K, class A>
__device__ __forceinline__ void block_sum(A (&values)[K], A* scratch) {
  warp_sum(values);
  if (lane_index() == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) scratch[warp_index() * K + k] = values[k];
  }
  __syncthreads();
  // Every warp sums the sums of all warps.
#pragma unroll
  for (int k = 0; k < K; ++k) values[k] = lane_index() < warp_count() ? scratch[lane_index() * K + k] : A(0);
  __syncthreads();
  warp_sum(values);
}

template <class A>
__device__ __forceinline__ Welford<A> warp_welford(Welford<A> data) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const Welford<A> other{__shfl_xor_sync(kAllLanes, data.count, offset),
                           __shfl_xor_sync(kAllLanes, data.mean, offset), __shfl_xor_sync(kAllLanes, data.m2, offset)};
    // Both lanes of a pair take the upper one's data into the lower one's.
    const bool upper = lane_index() & offset;
    Welford<A> combined = upper ? other : data;
    combined.combine(upper ? data : other);
    data = combined;
  }
  return data;
}

// scratch: warp_count() elements.
template <class A>
__device__ __forceinline__ Welford<A> block_welford(Welford<A> data, Welford<A>* scratch) {
  data = warp_welford(data);
  if (lane_index() == 0) scratch[warp_index()] = data;
  __syncthreads();
  data = lane_index() < warp_count() ? scratch[lane_index()] : Welford<A>{};
  __syncthreads();
  return warp_welford(data);
}

// The moments of the values of a whole block, in two passes: two sums, and no division per step of a shuffle, which
// would be slow in double. scratch: 2 * warp_count() elements.
__device__ __forceinline__ Welford<double> block_moments(const Welford<double>& data, double* scratch) {
  double sums[2] = {data.count, data.count * data.mean};
  block_sum(sums, scratch);
  const double mean = sums[0] == 0 ? 0 : sums[1] / sums[0];
  const double delta = data.mean - mean;
  double m2[1] = {data.count == 0 ? 0 : data.m2 + data.count * delta * delta};
  block_sum(m2, scratch);
  return {sums[0], mean, m2[0]};
}

}  // namespace normfused::cuda
