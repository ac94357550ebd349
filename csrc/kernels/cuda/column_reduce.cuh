// From what the threads of a tile have found in their columns to what there is in its channels.
#pragma once

#include "block_reduce.cuh"
#include "elements.cuh"

namespace normfused::cuda {

// f(row group, column of the tile), which adds to sums, for all that belongs to a channel; lanes: 32, a warp together,
// or 1.
template <int K, class F>
__device__ __forceinline__ void channel_sum(const Pass& pass, int channel, int lanes, double (&sums)[K], F f) {
  const int group = static_cast<int>(pass.view.group), count = pass.row_groups * group;
  for (int i = lanes == 1 ? 0 : lane_index(); i < count; i += lanes) f(i / group, channel * group + i % group);
  if (lanes > 1) warp_sum(sums);
}

// Lanes that sum up a channel together: 32, or 1.
__device__ __forceinline__ int channel_lanes(const Pass& pass) {
  return pass.view.group * pass.row_groups > 16 ? kWarp : 1;
}

// f(channel, its moments), given those of each row group's columns, [row_groups][width].
template <class F>
__device__ __forceinline__ void combine_columns(const Pass& pass, const BlockWork& work, const double* means,
                                                const double* m2s, F f) {
  const int lanes = channel_lanes(pass), width = pass.tile_vectors * pass.vector;
  for (int channel = threadIdx.x / lanes; channel < work.tile_channels; channel += blockDim.x / lanes) {
    double sums[2] = {}, deviations[1] = {};
    channel_sum(pass, channel, lanes, sums, [&](int row_group, int column) {
      const double n = rows_of(pass, work, row_group);
      sums[0] += n;
      sums[1] += n * means[row_group * width + column];
    });
    const double channel_mean = sums[1] / sums[0];
    channel_sum(pass, channel, lanes, deviations, [&](int row_group, int column) {
      const double n = rows_of(pass, work, row_group), delta = means[row_group * width + column] - channel_mean;
      if (n > 0) deviations[0] += m2s[row_group * width + column] + n * delta * delta;
    });
    if (lanes == 1 || lane_index() == 0) f(channel, Welford<double>{sums[0], channel_mean, deviations[0]});
  }
}

// f(channel, two sums), given those of each row group's columns.
template <class F>
__device__ __forceinline__ void sum_columns(const Pass& pass, const BlockWork& work, const double* first,
                                            const double* second, F f) {
  const int lanes = channel_lanes(pass), width = pass.tile_vectors * pass.vector;
  for (int channel = threadIdx.x / lanes; channel < work.tile_channels; channel += blockDim.x / lanes) {
    double sums[2] = {};
    channel_sum(pass, channel, lanes, sums, [&](int row_group, int column) {
      sums[0] += first[row_group * width + column];
      sums[1] += second[row_group * width + column];
    });
    if (lanes == 1 || lane_index() == 0) f(channel, sums);
  }
}

}  // namespace normfused::cuda
