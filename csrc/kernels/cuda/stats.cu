// The stage stats: partial moments.
#include "column_reduce.cuh"
#include "launch_stage.cuh"
#include "moments.cuh"

namespace normfused::cuda {
namespace {

template <class T, class Act>
__global__ void __launch_bounds__(kBlock, 2) plane_stats_kernel(Stage<T> s) {
  count_batch(s);
  constexpr int V = 16 / sizeof(T);
  const BlockWork work = block_work(s, /*backwards=*/false);
  Welford<double> data = plane_moments<Act, V>(s, work);
  if (sizeof(T) < 8 && !isfinite(data.m2)) data = exact_plane_moments<Act, V>(s, work);
  data = block_moments(data, shared_memory<double>());
  if (threadIdx.x == 0) {
    auto* partials = reinterpret_cast<Welford<double>*>(s.partials);
    partials[(work.matrix * s.pass.splits + work.split) * s.pass.view.channels + work.channel] = data;
  }
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
  auto* partials = reinterpret_cast<Welford<double>*>(s.partials) +
                   (work.matrix * s.pass.splits + work.split) * s.pass.view.channels + work.channel;
  combine_columns(s.pass, work, means, m2s,
                  [&](int channel, const Welford<double>& data) { partials[channel] = data; });
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

template Status stats(const Stage<float>&, void*);
template Status stats(const Stage<double>&, void*);
template Status stats(const Stage<BFloat16>&, void*);
template Status stats(const Stage<Float16>&, void*);

}  // namespace normfused::cuda
