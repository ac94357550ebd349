// The backward in one kernel: x and dy (and residual) are read once and held in shared memory while the sums of dz and
// of dz (x - mean) are found.
#include "on_chip.cuh"

namespace normfused::cuda {
namespace {

// dweight and dbias of BatchNorm.
template <class A>
__device__ __forceinline__ void set_gradients(int64_t channel, const Sums& sums, A invstd, A* dweight, A* dbias) {
  if (dweight) dweight[channel] = static_cast<A>(sums.values[1] * invstd);
  if (dbias) dbias[channel] = static_cast<A>(sums.values[0]);
}

// sums: of a unit's weighted gradients.
template <class A>
__device__ __forceinline__ GradientCoefficients<A> coefficients_of(const Sums& sums, double count, A invstd,
                                                                   bool through_statistics) {
  return {static_cast<A>(sums.values[0] / count), static_cast<A>(sums.values[1] * invstd / count), through_statistics};
}

template <class T, class Act>
__global__ void __launch_bounds__(kBlock, 2)
    held_planes_backward_kernel(Stage<T> s, HeldUnits units, bool through_statistics, Accumulator<T>* dweight,
                                Accumulator<T>* dbias) {
  using A = Accumulator<T>;
  constexpr int V = 16 / sizeof(T), kBatch = kPlaneBatch / 2;
  const BlockWork work = unit_work(s, units);
  const View& view = s.pass.view;
  auto* scratch = shared_memory<double>();
  auto* mine = reinterpret_cast<Sums*>(scratch + kReduceScratch / sizeof(double));
  auto* row_sums = mine + 64 / sizeof(Sums);  // [rows of the block][warps_per_row]
  auto* x_held = held_slots<V, T>(s.pass);
  auto* dy_held = x_held + s.pass.per_split;
  auto* residual_held = dy_held + s.pass.per_split;
  for_each_slot<V, kBatch>(s.pass, work, [&](const Slot(&slots)[kBatch], int index) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int at = index + u * blockDim.x;
      hold_slot(x_held + at, s.x, slots[u]);
      hold_slot(dy_held + at, s.dy, slots[u]);
      if (s.residual) hold_slot(residual_held + at, s.residual, slots[u]);
    }
  });
  async_commit();
  async_wait<0>();
  __syncthreads();

  // Sums, a row by one warp or by several; weighted where a unit has several weights.
  const int64_t unit = work.matrix * view.channels + work.channel;
  const A mean = s.mean[unit], invstd = s.invstd[unit];
  const int64_t begin = work.split * s.pass.per_split;
  const int64_t end = min(begin + s.pass.per_split, view.rows * s.pass.slots_per_row);
  const int64_t first_row = begin / s.pass.slots_per_row;
  const int rows = static_cast<int>((end - 1) / s.pass.slots_per_row - first_row) + 1;
  const int parts = s.pass.warps_per_row, part = warp_index() % parts, teams = warp_count() / parts;
  const int64_t row_stride = view.channels * view.group, base = work.matrix * view.rows * row_stride;
  auto p = channel_parameters<T>(s, mean, invstd, channel_of(s, work, 0));
  double sums[2] = {};
  for (int r = warp_index() / parts; r < rows; r += teams) {
    const int64_t row = first_row + r, start = base + work.channel * view.group + row * row_stride;
    if (s.pass.rows_are_channels) p = channel_parameters<T>(s, mean, invstd, channel_of(s, work, row));
    A total = 0, deviation = 0;
    for (int64_t i = part * kWarp + lane_index(); i < s.pass.slots_per_row; i += parts * kWarp) {
      const int64_t at = row * s.pass.slots_per_row + i - begin;
      if (at < 0 || at >= end - begin) continue;
      const Slot slot = slot_of<V>(s.pass, start, i);
      if (slot.last <= slot.first) continue;
      const Vector<T, V> x = x_held[at], dy = dy_held[at];
      Vector<T, V> residual = {};
      if (s.residual) residual = residual_held[at];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (v < slot.first || v >= slot.last) continue;
        const A dz = gradient<Act>(s, p, x, dy, residual, v);
        total += dz;
        deviation += dz * (input<Act>(s, x.values[v]) - mean);
      }
    }
    double row_sum[2] = {double(total), double(deviation)};
    const double weight = s.pass.rows_are_channels ? p.weight : A(1);
    sums[0] += row_sum[0] * weight;
    sums[1] += row_sum[1] * weight;
    if (units.parameter_partials) {
      warp_sum(row_sum);
      if (lane_index() == 0) row_sums[r * parts + part] = {{row_sum[0], row_sum[1]}};
    }
  }
  block_sum(sums, scratch);
  if (units.parameter_partials) {
    // Of all channels of the group: none of a channel that is with other blocks.
    const int64_t first_channel = channel_of(s, work, 0), sample = work.matrix / s.groups;
    auto* partials = reinterpret_cast<Sums*>(units.parameter_partials) +
                     (sample * s.pass.splits + work.split) * s.groups * view.rows + first_channel;
    for (int64_t row = threadIdx.x; row < view.rows; row += blockDim.x) {
      const int64_t r = row - first_row;
      const int n = r >= 0 && r < rows ? parts : 0;
      partials[row] = combine_sums(n, 1, [&](int i) { return row_sums[r * parts + i]; });
    }
  }
  Exchanged<Sums> blocks(units, s.pass, work, mine, s.partials);
  Sums all = {{sums[0], sums[1]}};
  if (units.exchange != Exchange::none) {
    if (threadIdx.x == 0) *mine = all;
    blocks.publish(work.split, 1);
    all = combine_sums(s.pass.splits, kWarp, [&](int rank) { return blocks.of(rank, 0); });
  }
  if (!s.pass.rows_are_channels) {
    if (threadIdx.x == 0 && work.split == 0) set_gradients(work.channel, all, invstd, dweight, dbias);
    all = {{all.values[0] * p.weight, all.values[1] * p.weight}};
  }
  const double count = double(view.rows) * view.group;
  const GradientCoefficients<A> coefficients = coefficients_of(all, count, invstd, through_statistics);
  for_each_slot<V, kBatch>(s.pass, work, [&](const Slot(&slots)[kBatch], int index) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (slots[u].last <= slots[u].first) continue;
      if (s.pass.rows_are_channels) p = channel_parameters<T>(s, mean, invstd, channel_of(s, work, slots[u].row));
      const int at = index + u * blockDim.x;
      Vector<T, V> x = x_held[at], dy = dy_held[at], residual = {};
      if (s.residual) residual = residual_held[at];
#pragma unroll
      for (int v = 0; v < V; ++v) differentiate<Act>(s, p, coefficients, x, dy, residual, v);
      if (s.out) store_slot(s.out, slots[u], x);
      if (s.dresidual) store_slot(s.dresidual, slots[u], dy);
    }
  });
  blocks.close();
}

template <class T, class Act>
__global__ void __launch_bounds__(kBlock, 2)
    held_columns_backward_kernel(Stage<T> s, HeldUnits units, bool through_statistics, Accumulator<T>* dweight,
                                 Accumulator<T>* dbias) {
  using A = Accumulator<T>;
  constexpr int V = 16 / sizeof(T);
  const BlockWork work = unit_work(s, units);
  const Columns<V> c(s.pass, work);
  const int width = s.pass.tile_vectors * V;
  auto* column_totals = shared_memory<double>();  // [row_groups][width]
  auto* column_deviations = column_totals + s.pass.row_groups * width;
  auto* mine = reinterpret_cast<Sums*>(column_deviations + s.pass.row_groups * width);  // [tile_channels]
  auto* totals = mine + s.pass.tile_channels;                                           // likewise
  auto* group_sums = totals + s.pass.tile_channels;                                     // [groups of the tile]
  const int depth = static_cast<int>(s.depth()), groups = static_cast<int>(work.tile_channels / depth);
  const int held = static_cast<int>((s.pass.per_split + s.pass.row_groups - 1) / s.pass.row_groups) *
                   s.pass.row_groups * s.pass.tile_vectors;
  auto* x_held = held_slots<V, T>(s.pass);
  auto* dy_held = x_held + held;
  auto* residual_held = dy_held + held;

  for_each_held_row(s.pass, c, [&](int index, int64_t row) {
    async_copy_16(x_held + index, s.x + c.offset(row));
    async_copy_16(dy_held + index, s.dy + c.offset(row));
    if (s.residual) async_copy_16(residual_held + index, s.residual + c.offset(row));
  });
  async_commit();
  ChannelParameters<A> p[V] = {};
  if (c.active) {
#pragma unroll
    for (int v = 0; v < V; ++v) p[v] = load_parameters(s, work.matrix, c.channel[v]);
  }
  async_wait<0>();
  if (c.active) {
    A total[V] = {}, deviation[V] = {};
    for_each_held_row(s.pass, c, [&](int index, int64_t) {
      const Vector<T, V> x = x_held[index], dy = dy_held[index];
      Vector<T, V> residual = {};
      if (s.residual) residual = residual_held[index];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A dz = gradient<Act>(s, p[v], x, dy, residual, v);
        total[v] += dz;
        deviation[v] += dz * (input<Act>(s, x.values[v]) - p[v].mean);
      }
    });
    const int at = c.row_group * width + c.column;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      column_totals[at + v] = total[v];
      column_deviations[at + v] = deviation[v];
    }
  }
  __syncthreads();
  sum_columns(s.pass, work, column_totals, column_deviations, [&](int channel, const double (&sums)[2]) {
    mine[channel] = {{sums[0], sums[1]}};
    if (units.parameter_partials == nullptr) return;
    auto* partials = reinterpret_cast<Sums*>(units.parameter_partials) +
                     (work.matrix * s.pass.splits + work.split) * s.pass.view.channels + work.channel;
    partials[channel] = {{sums[0], sums[1]}};
  });

  Exchanged<Sums> blocks(units, s.pass, work, mine, s.partials);
  blocks.publish(work.split, static_cast<int>(work.tile_channels));
  int lanes = lanes_for(s.pass.splits);
  for (int channel = threadIdx.x / lanes; channel < work.tile_channels; channel += blockDim.x / lanes) {
    const Sums sums = combine_sums(s.pass.splits, lanes, [&](int rank) { return blocks.of(rank, channel); });
    if (lanes > 1 && lane_index() > 0) continue;
    totals[channel] = sums;
    // Only BatchNorm has them here, whose channels are groups.
    const int64_t at = work.channel + channel;
    if (work.split == 0) set_gradients(at, sums, dweight || dbias ? s.invstd[at] : A(0), dweight, dbias);
  }
  __syncthreads();
  lanes = lanes_for(depth);
  for (int group = threadIdx.x / lanes; group < groups; group += blockDim.x / lanes) {
    const Sums sums = combine_sums(depth, lanes, [&](int i) {
      const Sums channel = totals[group * depth + i];
      const int64_t at = work.channel + group * depth + i;
      const double weight = s.weight ? load_channel<A>(s.weight, s.parameter_dtype, at) : A(1);
      return Sums{{channel.values[0] * weight, channel.values[1] * weight}};
    });
    if (lanes == 1 || lane_index() == 0) group_sums[group] = sums;
  }
  __syncthreads();
  if (c.active) {
    const double count = double(s.pass.view.rows) * depth * s.pass.view.group;
    GradientCoefficients<A> coefficients[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Sums& sums = group_sums[static_cast<int>(c.channel[v] - work.channel) / depth];
      coefficients[v] = coefficients_of(sums, count, p[v].invstd, through_statistics);
    }
    for_each_held_row(s.pass, c, [&](int index, int64_t row) {
      Vector<T, V> x = x_held[index], dy = dy_held[index], residual = {};
      if (s.residual) residual = residual_held[index];
#pragma unroll
      for (int v = 0; v < V; ++v) differentiate<Act>(s, p[v], coefficients[v], x, dy, residual, v);
      if (s.out) store_vector(s.out + c.offset(row), x);
      if (s.dresidual) store_vector(s.dresidual + c.offset(row), dy);
    });
  }
  blocks.close();
}

}  // namespace

template <class T>
Status hold_backward(const Stage<T>& s, const HeldUnits& units, LaunchConfig config, bool through_statistics,
                     Accumulator<T>* dweight, Accumulator<T>* dbias, void* stream) {
  const bool planes = s.pass.shape == Shape::planes;
  constexpr Names kPlanes = {"block_planes_backward", "cluster_planes_backward", "cooperative_planes_backward"};
  constexpr Names kColumns = {"block_columns_backward", "cluster_columns_backward", "cooperative_columns_backward"};
  config.name = (planes ? kPlanes : kColumns)[static_cast<int>(units.exchange)];
  return dispatch(s, [&](auto act) {
    using Act = decltype(act);
    const auto kernel = planes ? held_planes_backward_kernel<T, Act> : held_columns_backward_kernel<T, Act>;
    return launch(kernel, config, stream, s, units, through_statistics, dweight, dbias);
  });
}

template Status hold_backward(const Stage<float>&, const HeldUnits&, LaunchConfig, bool, float*, float*, void*);
template Status hold_backward(const Stage<BFloat16>&, const HeldUnits&, LaunchConfig, bool, float*, float*, void*);
template Status hold_backward(const Stage<Float16>&, const HeldUnits&, LaunchConfig, bool, float*, float*, void*);

}  // namespace normfused::cuda
