// The stage apply: y.
#include "launch_stage.cuh"

namespace normfused::cuda {
namespace {

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

}  // namespace

template <class T>
Status apply(const Stage<T>& s, void* stream) {
  return launch_activation(
      s, false, {"plane_apply", "column_apply", "column_apply_scalar"},
      [](auto act) { return plane_apply_kernel<T, decltype(act)>; },
      [](auto act, auto vector) { return column_apply_kernel<T, decltype(act), vector()>; }, stream);
}

template Status apply(const Stage<float>&, void*);
template Status apply(const Stage<double>&, void*);
template Status apply(const Stage<BFloat16>&, void*);
template Status apply(const Stage<Float16>&, void*);

}  // namespace normfused::cuda
