// The forward in one kernel: x is read once and held in shared memory while its statistics are found.
#include "on_chip.cuh"

namespace normfused::cuda {
namespace {

// The moments of n values, each v of them given twice by for_each(f), which calls f(v): deviations from the first of
// them, then from their mean. Acc double: what overflowed in single precision.
template <class Acc, class ForEach>
__device__ __forceinline__ Welford<double> moments_of(ForEach for_each) {
  Acc count = 0, shift = 0, sum = 0, m2 = 0;
  for_each([&](Acc value) {
    if (count == 0 && sizeof(Acc) < 8) shift = value;
    count += 1;
    sum += value - shift;
  });
  const Acc mean = count == 0 ? Acc(0) : sum / count;
  for_each([&](Acc value) {
    const Acc d = value - shift - mean;
    m2 += d * d;
  });
  return {double(count), double(shift) + mean, double(m2)};
}

template <class ForEach>
__device__ __forceinline__ Welford<double> held_moments(ForEach for_each) {
  const Welford<double> data = moments_of<float>(for_each);
  return isfinite(data.m2) ? data : moments_of<double>(for_each);
}

// A unit of planes is a channel or a group: all of a block's threads together have one result.
template <class T, class Act>
__global__ void __launch_bounds__(kBlock, 2)
    held_planes_forward_kernel(Stage<T> s, HeldUnits units, double eps, RunningStatistics running,
                               Accumulator<T>* means, Accumulator<T>* invstds) {
  using A = Accumulator<T>;
  constexpr int V = 16 / sizeof(T);
  count_batch(s);
  const BlockWork work = unit_work(s, units);
  auto* scratch = shared_memory<double>();
  auto* x_held = held_slots<V, T>(s.pass);
  for_each_slot<V, kPlaneBatch>(s.pass, work, [&](const Slot(&slots)[kPlaneBatch], int index) {
#pragma unroll
    for (int u = 0; u < kPlaneBatch; ++u) hold_slot(x_held + index + u * blockDim.x, s.x, slots[u]);
  });
  async_commit();
  async_wait<0>();
  // A thread has copied its own slots: no barrier.
  Welford<double> data = held_moments([&](auto f) {
    for_each_slot<V, 1>(s.pass, work, [&](const Slot(&slots)[1], int index) {
      const Vector<T, V> x = x_held[index];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v >= slots[0].first && v < slots[0].last) f(input<Act>(s, x.values[v]));
      }
    });
  });
  data = block_moments(data, scratch);

  auto* mine = reinterpret_cast<Welford<double>*>(scratch + kReduceScratch / sizeof(double));
  Exchanged<Welford<double>> blocks(units, s.pass, work, mine, s.partials);
  if (units.exchange != Exchange::none) {
    if (threadIdx.x == 0) *mine = data;
    blocks.publish(work.split, 1);
    data = combine_moments(s.pass.splits, kWarp, [&](int rank) { return blocks.of(rank, 0); });
  }
  const int64_t unit = work.matrix * s.pass.view.channels + work.channel;
  if (threadIdx.x == 0 && work.split == 0) set_statistics(unit, data, eps, running, means, invstds);

  const A mean = static_cast<A>(data.mean), invstd = inverse_deviation<A>(data, eps);
  auto p = channel_parameters<T>(s, mean, invstd, channel_of(s, work, 0));
  for_each_slot<V, kPlaneBatch>(s.pass, work, [&](const Slot(&slots)[kPlaneBatch], int index) {
    Vector<T, V> residual[kPlaneBatch] = {};
#pragma unroll
    for (int u = 0; u < kPlaneBatch; ++u) {
      if (s.residual) residual[u] = load_slot<V>(s.residual, slots[u]);
    }
#pragma unroll
    for (int u = 0; u < kPlaneBatch; ++u) {
      if (slots[u].last <= slots[u].first) continue;
      if (s.pass.rows_are_channels) p = channel_parameters<T>(s, mean, invstd, channel_of(s, work, slots[u].row));
      Vector<T, V> x = x_held[index + u * blockDim.x];
#pragma unroll
      for (int v = 0; v < V; ++v) x.values[v] = output<Act>(s, p, x, residual[u], v);
      store_slot(s.out, slots[u], x);
    }
  });
  blocks.close();
}

// A unit of columns is a tile of channels, or of several groups of them.
template <class T, class Act>
__global__ void __launch_bounds__(kBlock, 2)
    held_columns_forward_kernel(Stage<T> s, HeldUnits units, double eps, RunningStatistics running,
                                Accumulator<T>* means, Accumulator<T>* invstds) {
  using A = Accumulator<T>;
  constexpr int V = 16 / sizeof(T);
  count_batch(s);
  const BlockWork work = unit_work(s, units);
  const Columns<V> c(s.pass, work);
  const int width = s.pass.tile_vectors * V;
  auto* column_means = shared_memory<double>();  // [row_groups][width]
  auto* column_m2s = column_means + s.pass.row_groups * width;
  auto* mine = reinterpret_cast<Welford<double>*>(column_m2s + s.pass.row_groups * width);  // [tile_channels]
  auto* totals = mine + s.pass.tile_channels;                                               // likewise
  auto* group_means = reinterpret_cast<A*>(totals + s.pass.tile_channels);                  // [groups of the tile]
  const int depth = static_cast<int>(s.depth()), groups = static_cast<int>(work.tile_channels / depth);
  A* group_invstds = group_means + groups;
  auto* x_held = held_slots<V, T>(s.pass);

  for_each_held_row(s.pass, c, [&](int index, int64_t row) { async_copy_16(x_held + index, s.x + c.offset(row)); });
  async_commit();
  async_wait<0>();
  if (c.active) {
    const int at = c.row_group * width + c.column;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Welford<double> data = held_moments([&](auto f) {
        for_each_held_row(s.pass, c, [&](int index, int64_t) { f(input<Act>(s, x_held[index].values[v])); });
      });
      column_means[at + v] = data.mean;
      column_m2s[at + v] = data.m2;
    }
  }
  __syncthreads();
  combine_columns(s.pass, work, column_means, column_m2s,
                  [&](int channel, const Welford<double>& data) { mine[channel] = data; });

  Exchanged<Welford<double>> blocks(units, s.pass, work, mine, s.partials);
  blocks.publish(work.split, static_cast<int>(work.tile_channels));
  int lanes = lanes_for(s.pass.splits);
  for (int channel = threadIdx.x / lanes; channel < work.tile_channels; channel += blockDim.x / lanes) {
    const auto data = combine_moments(s.pass.splits, lanes, [&](int rank) { return blocks.of(rank, channel); });
    if (lanes == 1 || lane_index() == 0) totals[channel] = data;
  }
  __syncthreads();
  lanes = lanes_for(depth);
  for (int group = threadIdx.x / lanes; group < groups; group += blockDim.x / lanes) {
    const auto data = combine_moments(depth, lanes, [&](int i) { return totals[group * depth + i]; });
    if (lanes > 1 && lane_index() > 0) continue;
    group_means[group] = static_cast<A>(data.mean);
    group_invstds[group] = inverse_deviation<A>(data, eps);
    const int64_t at = work.matrix * s.groups + work.channel / depth + group;
    if (work.split == 0) set_statistics(at, data, eps, running, means, invstds);
  }
  __syncthreads();
  if (c.active) {
    ChannelParameters<A> p[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int group = static_cast<int>(c.channel[v] - work.channel) / depth;
      p[v] = channel_parameters<T>(s, group_means[group], group_invstds[group], c.channel[v]);
    }
    for_each_held_row(s.pass, c, [&](int index, int64_t row) {
      Vector<T, V> residual = {};
      if (s.residual) residual = load_vector<V>(s.residual + c.offset(row));
      Vector<T, V> x = x_held[index];
#pragma unroll
      for (int v = 0; v < V; ++v) x.values[v] = output<Act>(s, p[v], x, residual, v);
      store_vector(s.out + c.offset(row), x);
    });
  }
  blocks.close();
}

__global__ void __launch_bounds__(kBlock) clear_barriers_kernel(unsigned* barriers, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) barriers[i] = 0;
}

}  // namespace

template <class T>
Status hold_forward(const Stage<T>& s, const HeldUnits& units, LaunchConfig config, double eps,
                    const RunningStatistics& running, Accumulator<T>* mean, Accumulator<T>* invstd, void* stream) {
  const bool planes = s.pass.shape == Shape::planes;
  constexpr Names kPlanes = {"block_planes_forward", "cluster_planes_forward", "cooperative_planes_forward"};
  constexpr Names kColumns = {"block_columns_forward", "cluster_columns_forward", "cooperative_columns_forward"};
  config.name = (planes ? kPlanes : kColumns)[static_cast<int>(units.exchange)];
  return dispatch(s, [&](auto act) {
    using Act = decltype(act);
    const auto kernel = planes ? held_planes_forward_kernel<T, Act> : held_columns_forward_kernel<T, Act>;
    return launch(kernel, config, stream, s, units, eps, running, mean, invstd);
  });
}

Status clear_barriers(unsigned* barriers, int64_t count, void* stream) {
  LaunchConfig config;
  config.block = kBlock;
  config.name = "clear_barriers";
  return launch(clear_barriers_kernel, config, stream, barriers, count);
}

template Status hold_forward(const Stage<float>&, const HeldUnits&, LaunchConfig, double, const RunningStatistics&,
                             float*, float*, void*);
template Status hold_forward(const Stage<BFloat16>&, const HeldUnits&, LaunchConfig, double, const RunningStatistics&,
                             float*, float*, void*);
template Status hold_forward(const Stage<Float16>&, const HeldUnits&, LaunchConfig, double, const RunningStatistics&,
                             float*, float*, void*);

}  // namespace normfused::cuda
