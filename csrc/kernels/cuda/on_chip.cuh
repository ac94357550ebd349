// Units that blocks hold in shared memory: the copies, and what the blocks of a unit tell each other.
//
// Shared memory of a block: what its reductions need, then the slots of each tensor that it holds.
#pragma once

#include "column_reduce.cuh"
#include "launch_stage.cuh"
#include "moments.cuh"

namespace normfused::cuda {

// --- Work ------------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ BlockWork unit_work(const Stage<T>& s, const HeldUnits& units) {
  const int64_t tiles = s.pass.tiles(s.pass.view.channels), unit = units.first + blockIdx.x / s.pass.splits;
  const int64_t tile = unit % tiles, size = s.pass.shape == Shape::planes ? 1 : s.pass.tile_channels;
  return {unit / tiles, tile * size, min(size, s.pass.view.channels - tile * size), blockIdx.x % s.pass.splits};
}

// The channel that a row of a plane unit belongs to.
template <class T>
__device__ __forceinline__ int64_t channel_of(const Stage<T>& s, const BlockWork& work, int64_t row) {
  return s.pass.rows_are_channels ? work.matrix % s.groups * s.pass.view.rows + row : work.channel;
}

// --- Copies ----------------------------------------------------------------------------------------------------------

template <int V, class T>
__device__ __forceinline__ Vector<T, V>* held_slots(const Pass& pass) {
  return reinterpret_cast<Vector<T, V>*>(shared_memory<unsigned char>() + pass.reduce_bytes);
}

// Parts of a vector come at once, whole ones at async_wait.
template <int V, class T>
__device__ __forceinline__ void hold_slot(Vector<T, V>* held, const T* tensor, const Slot& slot) {
  if (slot.whole) {
    async_copy_16(held, tensor + slot.offset);
  } else if (slot.first < slot.last) {
    *held = load_slot<V>(tensor, slot);
  }
}

// f(index, row) for this thread's rows of a tile; index: of the thread's vector among those held.
template <int V, class F>
__device__ __forceinline__ void for_each_held_row(const Pass& pass, const Columns<V>& c, F f) {
  if (!c.active) return;
  int index = threadIdx.x;
  for (int64_t row = c.row; row < c.end; row += c.row_step) {
    f(index, row);
    index += pass.row_groups * pass.tile_vectors;
  }
}

// --- What the blocks of a unit tell each other -----------------------------------------------------------------------

// `count` values of each block, at `mine` in its shared memory.
template <class Value>
struct Exchanged {
  const HeldUnits& units;
  Value* mine;
  Value* all;      // grid: in global memory, of the first block; those of the others are `stride` apart
  int64_t stride;  // likewise

  __device__ __forceinline__ Exchanged(const HeldUnits& units, const Pass& pass, const BlockWork& work, Value* mine,
                                       double* partials)
      : units(units), mine(mine), stride(pass.view.channels) {
    all = reinterpret_cast<Value*>(partials) + work.matrix * pass.splits * stride + work.channel;
  }

  // Every thread of every block of the unit, after `mine` was written.
  __device__ __forceinline__ void publish(int64_t split, int count) {
    if (units.exchange == Exchange::none) {
      __syncthreads();
    } else if (units.exchange == Exchange::cluster) {
      cluster_sync();
    } else {
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += blockDim.x) all[split * stride + i] = mine[i];
      grid_sync(units.barrier);
    }
  }

  __device__ __forceinline__ Value of(int rank, int i) const {
    if (units.exchange == Exchange::none) return mine[i];
    if (units.exchange == Exchange::cluster) return *cluster_map(mine + i, rank);
    return all[rank * stride + i];
  }

  // Nobody reads `mine` any more: the block may exit.
  __device__ __forceinline__ void close() const {
    if (units.exchange == Exchange::cluster) cluster_sync();
  }
};

// Two sums.
struct Sums {
  double values[2];
};

// The sums of f(0), ..., f(n - 1) in 32 lanes together, or in one.
template <class F>
__device__ __forceinline__ Sums combine_sums(int n, int lanes, F f) {
  double sums[2] = {};
  for (int i = lanes == 1 ? 0 : lane_index(); i < n; i += lanes) {
    const Sums other = f(i);
    sums[0] += other.values[0];
    sums[1] += other.values[1];
  }
  if (lanes > 1) warp_sum(sums);
  return {{sums[0], sums[1]}};
}

// Likewise of moments, without a division for each.
template <class F>
__device__ __forceinline__ Welford<double> combine_moments(int n, int lanes, F f) {
  const Sums sums = combine_sums(n, lanes, [&](int i) {
    const Welford<double> data = f(i);
    return Sums{{data.count, data.count * data.mean}};
  });
  const double count = sums.values[0], mean = count == 0 ? 0 : sums.values[1] / count;
  const Sums deviations = combine_sums(n, lanes, [&](int i) {
    const Welford<double> data = f(i);
    const double delta = data.mean - mean;
    return Sums{{data.count == 0 ? 0 : data.m2 + data.count * delta * delta, 0}};
  });
  return {count, mean, deviations.values[0]};
}

// What a launch is called, by exchange.
using Names = const char* const[3];

// As many as are worth it.
__device__ __forceinline__ int lanes_for(int64_t n) { return n > 8 ? kWarp : 1; }

}  // namespace normfused::cuda
