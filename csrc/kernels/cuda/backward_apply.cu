// The stage backward_apply: dx and dresidual.
#include "launch_stage.cuh"

namespace normfused::cuda {
namespace {

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

}  // namespace

template <class T>
Status backward_apply(const Stage<T>& s, void* stream) {
  return launch_activation(
      s, false, {"plane_backward_apply", "column_backward_apply", "column_backward_apply_scalar"},
      [](auto act) { return plane_backward_apply_kernel<T, decltype(act)>; },
      [](auto act, auto vector) { return column_backward_apply_kernel<T, decltype(act), vector()>; }, stream);
}

template Status backward_apply(const Stage<float>&, void*);
template Status backward_apply(const Stage<double>&, void*);
template Status backward_apply(const Stage<BFloat16>&, void*);
template Status backward_apply(const Stage<Float16>&, void*);

}  // namespace normfused::cuda
