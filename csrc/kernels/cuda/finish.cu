// Ends of reductions: a warp per group or channel.
#include "block_reduce.cuh"
#include "moments.cuh"

namespace normfused::cuda {
namespace {

struct Unit {
  int64_t matrix, group;
  bool exists;
};

__device__ __forceinline__ Unit warp_unit(const Chunk& chunk) {
  const int64_t unit = int64_t{blockIdx.x} * warp_count() + warp_index();
  return {chunk.matrix + unit / chunk.groups, chunk.group + unit % chunk.groups, unit < chunk.matrices * chunk.groups};
}

// f(index of the partial, channel) for this lane's share of a group's partials.
template <class F>
__device__ __forceinline__ void for_each_partial(const Pass& pass, int64_t matrix, int64_t first, int64_t channels,
                                                 F f) {
  for (int64_t i = lane_index(); i < channels * pass.splits; i += kWarp) {
    const int64_t channel = first + i % channels;
    f((matrix * pass.splits + i / channels) * pass.view.channels + channel, channel);
  }
}

template <class A>
__global__ void __launch_bounds__(kBlock)
    finish_stats_kernel(Pass pass, Chunk chunk, int64_t depth, const double* values, double eps,
                        RunningStatistics running, A* mean, A* invstd) {
  const Unit unit = warp_unit(chunk);
  if (!unit.exists) return;
  const auto* partials = reinterpret_cast<const Welford<double>*>(values);
  double sums[2] = {}, deviations[1] = {};
  for_each_partial(pass, unit.matrix, unit.group * depth, depth, [&](int64_t i, int64_t) {
    sums[0] += partials[i].count;
    sums[1] += partials[i].count * partials[i].mean;
  });
  warp_sum(sums);
  const double count = sums[0], average = count == 0 ? 0 : sums[1] / count;
  for_each_partial(pass, unit.matrix, unit.group * depth, depth, [&](int64_t i, int64_t) {
    const double delta = partials[i].mean - average;
    deviations[0] += partials[i].m2 + partials[i].count * delta * delta;
  });
  warp_sum(deviations);
  if (lane_index() > 0) return;
  const int64_t at = unit.matrix * (pass.view.channels / depth) + unit.group;
  if (count == 0) {
    mean[at] = invstd[at] = 0;
    // Nothing was launched before that could have counted the batch.
    if (at == 0 && running.num_batches_tracked) ++*running.num_batches_tracked;
    return;
  }
  set_statistics(at, {count, average, deviations[0]}, eps, running, mean, invstd);
}

template <class A>
__global__ void __launch_bounds__(kBlock)
    finish_backward_kernel(Pass pass, Chunk chunk, int64_t depth, const double* partials, const void* weight,
                           Dtype weight_dtype, const A* invstd, A* offset, A* slope) {
  const Unit unit = warp_unit(chunk);
  if (!unit.exists) return;
  double sums[2] = {};
  for_each_partial(pass, unit.matrix, unit.group * depth, depth, [&](int64_t i, int64_t channel) {
    const double w = weight ? load_channel<A>(weight, weight_dtype, channel) : 1;
    sums[0] += w * partials[2 * i];
    sums[1] += w * partials[2 * i + 1];
  });
  warp_sum(sums);
  if (lane_index() > 0) return;
  const int64_t at = unit.matrix * (pass.view.channels / depth) + unit.group;
  const double count = double(pass.view.rows) * depth * pass.view.group;
  offset[at] = static_cast<A>(sums[0] / count);
  slope[at] = static_cast<A>(sums[1] * invstd[at] / count);
}

template <class A>
__global__ void __launch_bounds__(kBlock)
    finish_parameters_kernel(Pass pass, int64_t depth, const double* partials, const A* invstd, A* dweight, A* dbias) {
  const int64_t channel = int64_t{blockIdx.x} * warp_count() + warp_index(), channels = pass.view.channels;
  if (channel >= channels) return;
  double sums[2] = {};
  for (int64_t i = lane_index(); i < pass.view.matrices * pass.splits; i += kWarp) {
    sums[0] += partials[2 * (i * channels + channel)];
    sums[1] +=
        partials[2 * (i * channels + channel) + 1] * invstd[i / pass.splits * (channels / depth) + channel / depth];
  }
  warp_sum(sums);
  if (lane_index() > 0) return;
  if (dweight) dweight[channel] = static_cast<A>(sums[1]);
  if (dbias) dbias[channel] = static_cast<A>(sums[0]);
}

LaunchConfig warps_config(int64_t units, const char* name) {
  LaunchConfig config;
  config.block = kBlock;
  config.grid_x = static_cast<unsigned>(divide_up(units, kBlock / kWarp));
  config.name = name;
  return config;
}

}  // namespace

template <class T>
Status finish_stats(const Stage<T>& s, double eps, const RunningStatistics& running, Accumulator<T>* mean,
                    Accumulator<T>* invstd, void* stream) {
  const LaunchConfig config = warps_config(s.chunk.matrices * s.chunk.groups, "finish_stats");
  return launch(finish_stats_kernel<Accumulator<T>>, config, stream, s.pass, s.chunk, s.depth(), s.partials, eps,
                running, mean, invstd);
}

template <class T>
Status finish_backward(const Stage<T>& s, Accumulator<T>* offset, Accumulator<T>* slope, void* stream) {
  const LaunchConfig config = warps_config(s.chunk.matrices * s.chunk.groups, "finish_backward");
  return launch(finish_backward_kernel<Accumulator<T>>, config, stream, s.pass, s.chunk, s.depth(), s.partials,
                s.weight, s.parameter_dtype, s.invstd, offset, slope);
}

template <class T>
Status finish_parameters(const Stage<T>& s, Accumulator<T>* dweight, Accumulator<T>* dbias, void* stream) {
  const LaunchConfig config = warps_config(s.pass.view.channels, "finish_parameters");
  return launch(finish_parameters_kernel<Accumulator<T>>, config, stream, s.pass, s.depth(), s.partials, s.invstd,
                dweight, dbias);
}

template Status finish_stats(const Stage<float>&, double, const RunningStatistics&, Accumulator<float>*,
                             Accumulator<float>*, void*);
template Status finish_stats(const Stage<double>&, double, const RunningStatistics&, Accumulator<double>*,
                             Accumulator<double>*, void*);
template Status finish_stats(const Stage<BFloat16>&, double, const RunningStatistics&, Accumulator<BFloat16>*,
                             Accumulator<BFloat16>*, void*);
template Status finish_stats(const Stage<Float16>&, double, const RunningStatistics&, Accumulator<Float16>*,
                             Accumulator<Float16>*, void*);
template Status finish_backward(const Stage<float>&, Accumulator<float>*, Accumulator<float>*, void*);
template Status finish_backward(const Stage<double>&, Accumulator<double>*, Accumulator<double>*, void*);
template Status finish_backward(const Stage<BFloat16>&, Accumulator<BFloat16>*, Accumulator<BFloat16>*, void*);
template Status finish_backward(const Stage<Float16>&, Accumulator<Float16>*, Accumulator<Float16>*, void*);
template Status finish_parameters(const Stage<float>&, Accumulator<float>*, Accumulator<float>*, void*);
template Status finish_parameters(const Stage<double>&, Accumulator<double>*, Accumulator<double>*, void*);
template Status finish_parameters(const Stage<BFloat16>&, Accumulator<BFloat16>*, Accumulator<BFloat16>*, void*);
template Status finish_parameters(const Stage<Float16>&, Accumulator<Float16>*, Accumulator<Float16>*, void*);

}  // namespace normfused::cuda
