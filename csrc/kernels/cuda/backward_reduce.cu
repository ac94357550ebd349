// The stage backward_reduce: partial sums of dz and of dz (x - mean).
#include "column_reduce.cuh"
#include "launch_stage.cuh"

namespace normfused::cuda {
namespace {

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
  double* partials =
      s.partials + 2 * ((work.matrix * s.pass.splits + work.split) * s.pass.view.channels + work.channel);
  sum_columns(s.pass, work, totals, deviations, [&](int channel, const double (&sums)[2]) {
    partials[2 * channel] = sums[0];
    partials[2 * channel + 1] = sums[1];
  });
}

}  // namespace

template <class T>
Status backward_reduce(const Stage<T>& s, void* stream) {
  return launch_activation(
      s, true, {"plane_backward_reduce", "column_backward_reduce", "column_backward_reduce_scalar"},
      [](auto act) { return plane_backward_reduce_kernel<T, decltype(act)>; },
      [](auto act, auto vector) { return column_backward_reduce_kernel<T, decltype(act), vector()>; }, stream);
}

template Status backward_reduce(const Stage<float>&, void*);
template Status backward_reduce(const Stage<double>&, void*);
template Status backward_reduce(const Stage<BFloat16>&, void*);
template Status backward_reduce(const Stage<Float16>&, void*);

}  // namespace normfused::cuda
