// A channel per block, which reads it once: a thread keeps its slots in shared memory.
#include "block_reduce.cuh"
#include "launch_stage.cuh"
#include "moments.cuh"

namespace normfused::cuda {
namespace {

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

}  // namespace

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

template Status channel_forward(const Stage<float>&, double, const RunningStatistics&, Accumulator<float>*,
                                Accumulator<float>*, void*);
template Status channel_forward(const Stage<double>&, double, const RunningStatistics&, Accumulator<double>*,
                                Accumulator<double>*, void*);
template Status channel_forward(const Stage<BFloat16>&, double, const RunningStatistics&, Accumulator<BFloat16>*,
                                Accumulator<BFloat16>*, void*);
template Status channel_forward(const Stage<Float16>&, double, const RunningStatistics&, Accumulator<Float16>*,
                                Accumulator<Float16>*, void*);

}  // namespace normfused::cuda
