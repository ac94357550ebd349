#include "stages.h"

#include "block_reduce.cuh"
#include "elements.cuh"

namespace normfused::cuda {
namespace {

// --- stats -----------------------------------------------------------------------------------------------------------
//
// Deviations from the first value that a thread sees, in batches whose own moments are exact two-pass ones: nothing
// cancels, whatever the mean. Where a square overflows single precision, the thread starts again in double.

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

// keep(index, vector): for every slot, which is empty where nothing is loaded.
template <class Act, int V, class T, class Keep>
__device__ __forceinline__ Welford<double> plane_moments(const Stage<T>& s, const BlockWork& work, Keep keep) {
  using A = Accumulator<T>;
  Welford<A> data;
  A shift = 0;
  for_each_slot<V, kPlaneBatch>(s.pass, work, [&](const Slot(&slots)[kPlaneBatch], int index) {
    Vector<T, V> x[kPlaneBatch];
#pragma unroll
    for (int u = 0; u < kPlaneBatch; ++u) x[u] = load_slot<V>(s.x, slots[u]);
#pragma unroll
    for (int u = 0; u < kPlaneBatch; ++u) {
      const Slot& slot = slots[u];
      const int n = slot.last - slot.first;
      if (n <= 0) continue;
      keep(index + u * blockDim.x, x[u]);
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

template <class T, class Act>
__global__ void __launch_bounds__(kBlock, 2) plane_stats_kernel(Stage<T> s) {
  count_batch(s);
  constexpr int V = 16 / sizeof(T);
  const BlockWork work = block_work(s, /*backwards=*/false);
  Welford<double> data = plane_moments<Act, V>(s, work, [](int, const Vector<T, V>&) {});
  if (sizeof(T) < 8 && !isfinite(data.m2)) data = exact_plane_moments<Act, V>(s, work);
  data = block_moments(data, shared_memory<double>());
  if (threadIdx.x == 0) {
    auto* partials = reinterpret_cast<Welford<double>*>(s.partials);
    partials[(work.matrix * s.pass.splits + work.split) * s.pass.view.channels + work.channel] = data;
  }
}

// f(row group, column of the tile), which adds to sums, for all that belongs to a channel; lanes: 32, a warp together,
// or 1.
template <int K, class F>
__device__ __forceinline__ void channel_sum(const Pass& pass, int channel, int lanes, double (&sums)[K], F f) {
  const int group = static_cast<int>(pass.view.group), count = pass.row_groups * group;
  for (int i = lanes == 1 ? 0 : lane_index(); i < count; i += lanes) f(i / group, channel * group + i % group);
  if (lanes > 1) warp_sum(sums);
}

template <class T, class Act, int V>
__global__ void __launch_bounds__(kBlock, 2) column_stats_kernel(Stage<T> s) {
  count_batch(s);
  using A = Accumulator<T>;
  const BlockWork work = block_work(s, /*backwards=*/false);
  const Columns<V> c(s.pass, work);
  const int width = s.pass.tile_vectors * V;
  double* means = shared_memory<double>();  // [row_groups][width]
  double* m2s = means + s.pass.row_groups * width;

  A count = 0, shift[V] = {}, mean[V] = {}, m2[V] = {};
  for_each_row<kRowBatch>(c, [&](int64_t row, auto batch) {
    constexpr int K = decltype(batch)::value;
    Vector<T, V> x[K];
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = load_vector<V>(s.x + c.offset(row + k * c.row_step));
    const bool first = count == 0;
    count += K;
    const A share = K / count, weight = (count - K) * share;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (first) shift[v] = input<Act>(s, x[0].values[v]);
      A d[K], sum = 0, deviations = 0;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        d[k] = input<Act>(s, x[k].values[v]) - shift[v];
        sum += d[k];
      }
      const A batch_mean = sum * (A(1) / K);
#pragma unroll
      for (int k = 0; k < K; ++k) deviations += (d[k] - batch_mean) * (d[k] - batch_mean);
      // Welford::combine, the counts being those of all columns.
      const A delta = batch_mean - mean[v];
      mean[v] += delta * share;
      m2[v] += deviations + delta * delta * weight;
    }
  });
  if (c.active) {
    const int at = c.row_group * width + c.column;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      means[at + v] = count == 0 ? 0 : double(shift[v]) + mean[v];
      m2s[at + v] = m2[v];
    }
    for (int v = 0; v < V && sizeof(T) < 8; ++v) {
      if (isfinite(m2s[at + v])) continue;
      double exact_mean = 0, exact_m2 = 0;
      const T* x = s.x + v;
      for (int64_t r = c.row; r < c.end; r += c.row_step) exact_mean += input<Act>(s, x[c.offset(r)]);
      exact_mean /= count;
      for (int64_t r = c.row; r < c.end; r += c.row_step) {
        const double d = input<Act>(s, x[c.offset(r)]) - exact_mean;
        exact_m2 += d * d;
      }
      means[at + v] = exact_mean;
      m2s[at + v] = exact_m2;
    }
  }
  __syncthreads();
  const int lanes = s.pass.view.group * s.pass.row_groups > 16 ? kWarp : 1;
  auto* partials = reinterpret_cast<Welford<double>*>(s.partials) +
                   (work.matrix * s.pass.splits + work.split) * s.pass.view.channels + work.channel;
  for (int channel = threadIdx.x / lanes; channel < work.tile_channels; channel += blockDim.x / lanes) {
    double sums[2] = {}, deviations[1] = {};
    channel_sum(s.pass, channel, lanes, sums, [&](int row_group, int column) {
      const double n = rows_of(s.pass, work, row_group);
      sums[0] += n;
      sums[1] += n * means[row_group * width + column];
    });
    const double channel_mean = sums[1] / sums[0];
    channel_sum(s.pass, channel, lanes, deviations, [&](int row_group, int column) {
      const double n = rows_of(s.pass, work, row_group), delta = means[row_group * width + column] - channel_mean;
      if (n > 0) deviations[0] += m2s[row_group * width + column] + n * delta * delta;
    });
    if (lanes == 1 || lane_index() == 0) partials[channel] = {sums[0], channel_mean, deviations[0]};
  }
}

// --- backward_reduce: sums of dz and of dz (x - mean) ----------------------------------------------------------------

// The gradient of z at element v of vectors.
template <class Act, class T, class A, int V>
__device__ __forceinline__ A gradient(const Stage<T>& s, const ChannelParameters<A>& p, const Vector<T, V>& x,
                                      const Vector<T, V>& dy, const Vector<T, V>& residual, int v) {
  A z = p.z(input<Act>(s, x.values[v]));
  if (s.residual) z += to_accumulator(residual.values[v]);
  return activate_backward<Act, T>(z, A(to_accumulator(dy.values[v])), s.activation);
}

template <class T, class Act>
__global__ void __launch_bounds__(kBlock, 2) plane_backward_reduce_kernel(Stage<T> s) {
  using A = Accumulator<T>;
  constexpr int V = 16 / sizeof(T), kBatch = kPlaneBatch / 2;
  const BlockWork work = block_work(s, /*backwards=*/false);
  const ChannelParameters<A> p = load_parameters(s, work.matrix, work.channel);
  double sums[2] = {};
  for_each_slot<V, kBatch>(s.pass, work, [&](const Slot(&slots)[kBatch], int) {
    Vector<T, V> x[kBatch], dy[kBatch], residual[kBatch] = {};
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      x[u] = load_slot<V>(s.x, slots[u]);
      dy[u] = load_slot<V>(s.dy, slots[u]);
      if (s.residual) residual[u] = load_slot<V>(s.residual, slots[u]);
    }
    A total = 0, deviation = 0;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (!slots[u].whole && (v < slots[u].first || v >= slots[u].last)) continue;
        const A dz = gradient<Act>(s, p, x[u], dy[u], residual[u], v);
        total += dz;
        deviation += dz * (input<Act>(s, x[u].values[v]) - p.mean);
      }
    }
    sums[0] += total;
    sums[1] += deviation;
  });
  block_sum(sums, shared_memory<double>());
  if (threadIdx.x < 2) {
    const int64_t at = (work.matrix * s.pass.splits + work.split) * s.pass.view.channels + work.channel;
    s.partials[2 * at + threadIdx.x] = threadIdx.x == 0 ? sums[0] : sums[1];
  }
}

template <class T, class Act, int V>
__global__ void __launch_bounds__(kBlock, 2) column_backward_reduce_kernel(Stage<T> s) {
  using A = Accumulator<T>;
  constexpr int kRows = 2;
  const BlockWork work = block_work(s, /*backwards=*/false);
  const Columns<V> c(s.pass, work);
  const int width = s.pass.tile_vectors * V;
  double* totals = shared_memory<double>();  // [row_groups][width]
  double* deviations = totals + s.pass.row_groups * width;

  if (c.active) {
    ChannelParameters<A> p[V];
    A total[V] = {}, deviation[V] = {};
#pragma unroll
    for (int v = 0; v < V; ++v) p[v] = load_parameters(s, work.matrix, c.channel[v]);
    for_each_row<kRows>(c, [&](int64_t row, auto batch) {
      constexpr int K = decltype(batch)::value;
      Vector<T, V> x[K], dy[K], residual[K] = {};
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int64_t offset = c.offset(row + k * c.row_step);
        x[k] = load_vector<V>(s.x + offset);
        dy[k] = load_vector<V>(s.dy + offset);
        if (s.residual) residual[k] = load_vector<V>(s.residual + offset);
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A dz = gradient<Act>(s, p[v], x[k], dy[k], residual[k], v);
          total[v] += dz;
          deviation[v] += dz * (input<Act>(s, x[k].values[v]) - p[v].mean);
        }
      }
    });
    const int at = c.row_group * width + c.column;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      totals[at + v] = total[v];
      deviations[at + v] = deviation[v];
    }
  }
  __syncthreads();
  const int lanes = s.pass.view.group * s.pass.row_groups > 16 ? kWarp : 1;
  double* partials =
      s.partials + 2 * ((work.matrix * s.pass.splits + work.split) * s.pass.view.channels + work.channel);
  for (int channel = threadIdx.x / lanes; channel < work.tile_channels; channel += blockDim.x / lanes) {
    double sums[2] = {};
    channel_sum(s.pass, channel, lanes, sums, [&](int row_group, int column) {
      sums[0] += totals[row_group * width + column];
      sums[1] += deviations[row_group * width + column];
    });
    if (lanes > 1 && lane_index() > 0) continue;
    partials[2 * channel] = sums[0];
    partials[2 * channel + 1] = sums[1];
  }
}

// --- apply -----------------------------------------------------------------------------------------------------------

template <class Act, class T, class A, int V>
__device__ __forceinline__ T output(const Stage<T>& s, const ChannelParameters<A>& p, const Vector<T, V>& x,
                                    const Vector<T, V>& residual, int v) {
  A z = p.z(input<Act>(s, x.values[v]));
  if (s.residual) z += to_accumulator(residual.values[v]);
  return activate<Act, T>(z, s.activation);
}

template <class T, class Act>
__global__ void __launch_bounds__(kBlock) plane_apply_kernel(Stage<T> s) {
  using A = Accumulator<T>;
  constexpr int V = 16 / sizeof(T);
  const BlockWork work = block_work(s, /*backwards=*/true);
  const ChannelParameters<A> p = load_parameters(s, work.matrix, work.channel);
  for_each_slot<V, kPlaneBatch>(s.pass, work, [&](const Slot(&slots)[kPlaneBatch], int) {
    Vector<T, V> x[kPlaneBatch], residual[kPlaneBatch] = {};
#pragma unroll
    for (int u = 0; u < kPlaneBatch; ++u) {
      x[u] = load_slot<V>(s.x, slots[u]);
      if (s.residual) residual[u] = load_slot<V>(s.residual, slots[u]);
    }
#pragma unroll
    for (int u = 0; u < kPlaneBatch; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[u].values[v] = output<Act>(s, p, x[u], residual[u], v);
      store_slot(s.out, slots[u], x[u]);
    }
  });
}

template <class T, class Act, int V>
__global__ void __launch_bounds__(kBlock, 2) column_apply_kernel(Stage<T> s) {
  using A = Accumulator<T>;
  const BlockWork work = block_work(s, /*backwards=*/true);
  const Columns<V> c(s.pass, work);
  if (!c.active) return;
  ChannelParameters<A> p[V];
#pragma unroll
  for (int v = 0; v < V; ++v) p[v] = load_parameters(s, work.matrix, c.channel[v]);
  for_each_row<kRowBatch>(c, [&](int64_t row, auto batch) {
    constexpr int K = decltype(batch)::value;
    Vector<T, V> x[K], residual[K] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t offset = c.offset(row + k * c.row_step);
      x[k] = load_vector<V>(s.x + offset);
      if (s.residual) residual[k] = load_vector<V>(s.residual + offset);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[k].values[v] = output<Act>(s, p[v], x[k], residual[k], v);
      store_vector(s.out + c.offset(row + k * c.row_step), x[k]);
    }
  });
}

// --- backward_apply --------------------------------------------------------------------------------------------------

// Puts dx in the place of x, and dz in the place of dy, at element v.
template <class Act, class T, class A, int V>
__device__ __forceinline__ void differentiate(const Stage<T>& s, const ChannelParameters<A>& p,
                                              const GradientCoefficients<A>& coefficients, Vector<T, V>& x,
                                              Vector<T, V>& dy, const Vector<T, V>& residual, int v) {
  const A dz = gradient<Act>(s, p, x, dy, residual, v);
  const A dx = s.offset ? coefficients.dx(input<Act>(s, x.values[v]), dz, p) : dz * p.scale;
  x.values[v] = from_accumulator<T>(input_backward<Act>(s, x.values[v], dx));
  dy.values[v] = from_accumulator<T>(dz);
}

template <class T, class Act>
__global__ void __launch_bounds__(kBlock, 2) plane_backward_apply_kernel(Stage<T> s) {
  using A = Accumulator<T>;
  constexpr int V = 16 / sizeof(T), kBatch = kPlaneBatch / 2;
  const BlockWork work = block_work(s, /*backwards=*/true);
  const ChannelParameters<A> p = load_parameters(s, work.matrix, work.channel);
  const GradientCoefficients<A> coefficients = load_coefficients(s, work.matrix, work.channel);
  for_each_slot<V, kBatch>(s.pass, work, [&](const Slot(&slots)[kBatch], int) {
    Vector<T, V> x[kBatch], dy[kBatch], residual[kBatch] = {};
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      x[u] = load_slot<V>(s.x, slots[u]);
      dy[u] = load_slot<V>(s.dy, slots[u]);
      if (s.residual) residual[u] = load_slot<V>(s.residual, slots[u]);
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) differentiate<Act>(s, p, coefficients, x[u], dy[u], residual[u], v);
      if (s.out) store_slot(s.out, slots[u], x[u]);
      if (s.dresidual) store_slot(s.dresidual, slots[u], dy[u]);
    }
  });
}

template <class T, class Act, int V>
__global__ void __launch_bounds__(kBlock, 2) column_backward_apply_kernel(Stage<T> s) {
  using A = Accumulator<T>;
  constexpr int kRows = 2;
  const BlockWork work = block_work(s, /*backwards=*/true);
  const Columns<V> c(s.pass, work);
  if (!c.active) return;
  ChannelParameters<A> p[V];
  GradientCoefficients<A> coefficients[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    p[v] = load_parameters(s, work.matrix, c.channel[v]);
    coefficients[v] = load_coefficients(s, work.matrix, c.channel[v]);
  }
  for_each_row<kRows>(c, [&](int64_t row, auto batch) {
    constexpr int K = decltype(batch)::value;
    Vector<T, V> x[K], dy[K], residual[K] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t offset = c.offset(row + k * c.row_step);
      x[k] = load_vector<V>(s.x + offset);
      dy[k] = load_vector<V>(s.dy + offset);
      if (s.residual) residual[k] = load_vector<V>(s.residual + offset);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int v = 0; v < V; ++v) differentiate<Act>(s, p[v], coefficients[v], x[k], dy[k], residual[k], v);
      const int64_t offset = c.offset(row + k * c.row_step);
      if (s.out) store_vector(s.out + offset, x[k]);
      if (s.dresidual) store_vector(s.dresidual + offset, dy[k]);
    }
  });
}

// --- On chip: a channel per block, which reads it once. A thread keeps its slots in shared memory
// ---------------------

// Shared memory: scratch of the reductions, then the slots.
template <class T, class Act>
__global__ void __launch_bounds__(kBlock, 2) channel_forward_kernel(Stage<T> s, double eps, RunningStatistics running,
                                                                    Accumulator<T>* means, Accumulator<T>* invstds) {
  using A = Accumulator<T>;
  constexpr int V = 16 / sizeof(T);
  count_batch(s);
  const BlockWork work = block_work(s, /*backwards=*/false);
  auto* kept = reinterpret_cast<Vector<T, V>*>(shared_memory<unsigned char>() + kReduceScratch);
  Welford<double> data = plane_moments<Act, V>(s, work, [&](int i, const Vector<T, V>& x) { kept[i] = x; });
  if (!isfinite(data.m2)) data = exact_plane_moments<Act, V>(s, work);
  data = block_moments(data, shared_memory<double>());

  const int64_t c = work.channel;
  if (threadIdx.x == 0) set_statistics(c, data, eps, running, means, invstds);
  const auto p = channel_parameters<T>(s, static_cast<A>(data.mean), inverse_deviation<A>(data, eps), c);
  for_each_slot<V, kPlaneBatch>(s.pass, work, [&](const Slot(&slots)[kPlaneBatch], int index) {
    Vector<T, V> residual[kPlaneBatch] = {};
#pragma unroll
    for (int u = 0; u < kPlaneBatch; ++u) {
      if (s.residual) residual[u] = load_slot<V>(s.residual, slots[u]);
    }
#pragma unroll
    for (int u = 0; u < kPlaneBatch; ++u) {
      if (slots[u].last <= slots[u].first) continue;
      Vector<T, V> x = kept[index + u * blockDim.x];
#pragma unroll
      for (int v = 0; v < V; ++v) x.values[v] = output<Act>(s, p, x, residual[u], v);
      store_slot(s.out, slots[u], x);
    }
  });
}

// --- Ends of reductions: a warp per group or channel -----------------------------------------------------------------

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

// --- Launches --------------------------------------------------------------------------------------------------------

// f(Act{}): kernels of their own for what is frequent.
template <class T, class F>
Status dispatch(const Stage<T>& s, F f) {
  if (s.pre_activation != Activation::identity) return f(AnyActivation{});
  switch (s.activation) {
    case Activation::identity: return f(Identity{});
    case Activation::relu: return f(ReLU{});
    case Activation::relu6: return f(ReLU6{});
    case Activation::silu: return f(SiLU{});
    default: return f(AnyActivation{});
  }
}

template <class T, class Kernel>
Status launch_stage(Kernel kernel, const Stage<T>& s, bool reduces, const char* name, void* stream) {
  LaunchConfig config = pass_config(s.pass, s.chunk, s.groups, name);
  config.shared_bytes = reduces ? s.pass.reduce_bytes : 0;
  return launch(kernel, config, stream, s);
}

// Element by element, and in float64, the activation is chosen at run time.
template <class T, class Planes, class Columns>
Status launch_activation(const Stage<T>& s, bool reduces, const char* const (&names)[3], Planes planes, Columns columns,
                         void* stream) {
  if (s.pass.shape == Shape::columns && s.pass.vector == 1) {
    return launch_stage(columns(AnyActivation{}, std::integral_constant<int, 1>{}), s, reduces, names[2], stream);
  }
  const auto launch_with = [&](auto act) {
    if (s.pass.shape == Shape::planes) return launch_stage(planes(act), s, reduces, names[0], stream);
    return launch_stage(columns(act, std::integral_constant<int, 16 / sizeof(T)>{}), s, reduces, names[1], stream);
  };
  if constexpr (sizeof(T) == 8) {
    return launch_with(AnyActivation{});
  } else {
    return dispatch(s, launch_with);
  }
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
Status stats(const Stage<T>& s, void* stream) {
  if (s.pass.shape == Shape::columns && s.pass.vector == 1) {
    return launch_stage(column_stats_kernel<T, AnyActivation, 1>, s, true, "column_stats_scalar", stream);
  }
  const auto launch_with = [&](auto act) {
    using Act = decltype(act);
    if (s.pass.shape == Shape::planes) return launch_stage(plane_stats_kernel<T, Act>, s, true, "plane_stats", stream);
    return launch_stage(column_stats_kernel<T, Act, 16 / sizeof(T)>, s, true, "column_stats", stream);
  };
  // The statistics know no activation but the one before them.
  if constexpr (sizeof(T) < 8) {
    if (s.pre_activation == Activation::identity) return launch_with(Identity{});
  }
  return launch_with(AnyActivation{});
}

template <class T>
Status apply(const Stage<T>& s, void* stream) {
  return launch_activation(
      s, false, {"plane_apply", "column_apply", "column_apply_scalar"},
      [](auto act) { return plane_apply_kernel<T, decltype(act)>; },
      [](auto act, auto vector) { return column_apply_kernel<T, decltype(act), vector()>; }, stream);
}

template <class T>
Status backward_reduce(const Stage<T>& s, void* stream) {
  return launch_activation(
      s, true, {"plane_backward_reduce", "column_backward_reduce", "column_backward_reduce_scalar"},
      [](auto act) { return plane_backward_reduce_kernel<T, decltype(act)>; },
      [](auto act, auto vector) { return column_backward_reduce_kernel<T, decltype(act), vector()>; }, stream);
}

template <class T>
Status backward_apply(const Stage<T>& s, void* stream) {
  return launch_activation(
      s, false, {"plane_backward_apply", "column_backward_apply", "column_backward_apply_scalar"},
      [](auto act) { return plane_backward_apply_kernel<T, decltype(act)>; },
      [](auto act, auto vector) { return column_backward_apply_kernel<T, decltype(act), vector()>; }, stream);
}

template <class T>
Status channel_forward(const Stage<T>& s, double eps, const RunningStatistics& running, Accumulator<T>* mean,
                       Accumulator<T>* invstd, void* stream) {
  if constexpr (sizeof(T) == 8) {
    return -1;  // no such plan
  } else {
    LaunchConfig config = pass_config(s.pass, s.chunk, s.groups, "channel_forward");
    config.shared_bytes = on_chip_bytes(s.pass);
    return dispatch(s, [&](auto act) {
      return launch(channel_forward_kernel<T, decltype(act)>, config, stream, s, eps, running, mean, invstd);
    });
  }
}

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

template <class T>
struct Instantiate {
  static constexpr auto kStages =
      std::make_tuple(stats<T>, apply<T>, backward_reduce<T>, backward_apply<T>, channel_forward<T>, finish_stats<T>,
                      finish_backward<T>, finish_parameters<T>);
};
template struct Instantiate<float>;
template struct Instantiate<double>;
template struct Instantiate<BFloat16>;
template struct Instantiate<Float16>;

}  // namespace normfused::cuda
