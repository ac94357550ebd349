// Tests device.cuh, vector.cuh and block_reduce.cuh, under the emulator and on a GPU, and the emulator itself: kernels
// with one mistake each must not pass.
//
//   self_test             every right kernel, under every schedule
//   self_test MISTAKE     a wrong kernel; prints the schedules under which it was found out, fails if there is none
#include "../../csrc/kernels/cuda/block_reduce.cuh"
#include "../../csrc/kernels/cuda/device.cuh"
#include "../../csrc/kernels/cuda/vector.cuh"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace normfused::cuda {
namespace {

#ifdef __SANITIZE_THREAD__
constexpr unsigned kLargestBlock = 128;  // A fiber costs it megabytes.
#else
constexpr unsigned kLargestBlock = 1024;
#endif

// --- Kernels ---------------------------------------------------------------------------------------------------------

enum class Mistake {
  none,
  barrier,
  first_barrier,
  early_read,
  out_of_bounds,
  uninitialised,
  cluster_begin,
  cluster_end,
  grid,
  last_block
};

// Reverses block-sized pieces of x.
template <Mistake kMistake>
__global__ void reverse_kernel(const float* x, float* y, int pieces) {
  float* staged = shared_memory<float>();
  const int n = blockDim.x, i = threadIdx.x;
  for (int piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    staged[i + (kMistake == Mistake::out_of_bounds)] = x[piece * n + i];
    if (kMistake != Mistake::first_barrier) __syncthreads();
    y[piece * n + i] = staged[n - 1 - i];
    if (kMistake != Mistake::barrier) __syncthreads();
  }
}

// Sums of x and of its squares; out has two elements per block.
__global__ void sum_kernel(const float* x, float* out) {
  const float value = x[blockIdx.x * blockDim.x + threadIdx.x];
  float sums[2] = {value, value * value};
  block_sum(sums, shared_memory<float>());
  float again[2] = {sums[0], sums[1]};
  block_sum(again, shared_memory<float>());
  // Any thread may write it.
  if (threadIdx.x == blockDim.x - 1) {
    out[2 * blockIdx.x] = sums[0];
    out[2 * blockIdx.x + 1] = again[1] / blockDim.x;
  }
}

template <class T, int N>
__global__ void welford_kernel(const T* x, double* out) {
  using A = Accumulator<T>;
  const Vector<T, N> values = load_vector<N>(x + N * (blockIdx.x * blockDim.x + threadIdx.x));
  Welford<A> data;
#pragma unroll
  for (int i = 0; i < N; ++i) data.combine({1, to_accumulator(values.values[i]), 0});
  data = block_welford(data, shared_memory<Welford<A>>());
  data = threadIdx.x % 2 ? data : Welford<A>{data.count, data.mean, data.m2};
  // Every thread has the same bits: their sum over the block is a multiple.
  const double result[3] = {data.count, data.mean, data.m2};
  for (int i = 0; i < 3; ++i) out[3 * (blockIdx.x * blockDim.x + threadIdx.x) + i] = result[i];
}

__global__ void warp_kernel(int* out) {
  const int lane = threadIdx.x % kWarp;
  int* row = out + 6 * threadIdx.x;
  row[0] = __shfl_sync(0xffffffffu, lane, 5);
  row[1] = __shfl_down_sync(0xffffffffu, lane, 3);
  row[2] = __shfl_xor_sync(0xffffffffu, lane, 17);
  row[3] = __shfl_xor_sync(0xffffffffu, lane, 4, 8);
  row[4] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  // Half warps on their own.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  row[5] = __shfl_sync(half, lane, lane < 16 ? 2 : 20);
}

// out[c] = sum over the cluster of every block's values, read from the others' shared memory.
template <Mistake kMistake>
__global__ void cluster_kernel(const float* x, float* out) {
  float* staged = shared_memory<float>();
  staged[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (kMistake != Mistake::cluster_begin) cluster_sync();
  float sum = 0;
  for (int rank = 0; rank < cluster_size(); ++rank) {
    sum += cluster_map(staged, rank)[blockDim.x - 1 - threadIdx.x];
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (kMistake != Mistake::cluster_end) cluster_sync();
}

// Every block writes a value, and reads those of all others, several times.
template <Mistake kMistake>
__global__ void grid_kernel(float* values, float* out, unsigned* barrier, int rounds) {
  const int blocks = gridDim.x * gridDim.y, block = blockIdx.y * gridDim.x + blockIdx.x;
  float sum = 0;
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) values[block] = static_cast<float>(block + round);
    if (kMistake != Mistake::grid) grid_sync(barrier);
    for (int i = 0; i < blocks; ++i) sum += values[i];
    grid_sync(barrier);
  }
  out[block * blockDim.x + threadIdx.x] = sum;
}

// Doubles pieces of x, copying each one while the one before is worked on.
template <Mistake kMistake>
__global__ void pipeline_kernel(const float* x, float* y, int pieces) {
  const int n = 4 * blockDim.x, i = 4 * threadIdx.x;
  float* stages[2] = {shared_memory<float>(), shared_memory<float>() + n};
  const auto copy = [&](int piece) {
    if (piece < pieces) async_copy_16(stages[piece % 2] + i, x + piece * n + i);
    async_commit();
  };
  copy(0);
  for (int piece = 0; piece < pieces; ++piece) {
    copy(piece + 1);
    async_wait<kMistake == Mistake::early_read ? 2 : 1>();
    __syncthreads();
    // Of another thread's copy.
    const int j = n - 4 - i;
    Vector<float, 4> values = load_vector<4>(stages[piece % 2] + j);
    for (float& value : values.values) value *= 2;
    store_vector_streaming(y + piece * n + j, values);
    __syncthreads();
  }
  async_wait<0>();
}

// Counts values below a bound per block; shared counters must be zeroed first.
template <Mistake kMistake>
__global__ void count_kernel(const float* x, int* out) {
  int* counts = shared_memory<int>();
  if (kMistake != Mistake::uninitialised) {
    if (threadIdx.x == 0) counts[0] = 0;
    __syncthreads();
  }
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
    const unsigned ballot = __ballot_sync(0xffffffffu, x[blockIdx.x * blockDim.x + threadIdx.x] < 8);
    if (warp == threadIdx.x / kWarp && threadIdx.x % kWarp == 0) {
      for (int lane = 0; lane < kWarp; ++lane) counts[0] += ballot >> lane & 1;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = counts[0];
}

// Partial sums of every block; the last block to finish adds them up.
template <Mistake kMistake>
__global__ void last_block_kernel(const float* x, float* partials, unsigned* finished, float* out) {
  float* scratch = shared_memory<float>();
  float sum[1] = {load_last_use(x + blockIdx.x * blockDim.x + threadIdx.x)};
  block_sum(sum, scratch);
  const bool writes = threadIdx.x == blockDim.x - 1;
  if (writes) partials[blockIdx.x] = sum[0];
  if (kMistake != Mistake::last_block) __syncthreads();
  if (threadIdx.x == 0) scratch[0] = static_cast<float>(atomic_add(finished, 1));
  __syncthreads();
  if (scratch[0] != gridDim.x - 1) return;
  if (threadIdx.x != 0) return;
  float total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += partials[i];
  *out = total;
}

template <class T>
__global__ void convert_kernel(const T* x, float* wide, T* narrow) {
  for (int i = threadIdx.x; i < 1 << 16; i += blockDim.x) {
    wide[i] = to_accumulator(x[i]);
    narrow[i] = from_accumulator<T>(wide[i]);
  }
}

// --- Running them ----------------------------------------------------------------------------------------------------

int failures = 0;
std::string found;  // why the last kernel did not pass

void require(bool right, const char* what) {
  if (!right && found.empty()) found = what;
}

// Exactly as long as it says, of NaN at first.
template <class T>
struct Buffer {
  explicit Buffer(size_t count) : count(count) {
#ifdef NORMFUSED_EMULATOR
    data = static_cast<T*>(std::malloc(count * sizeof(T)));
#else
    if (cudaMallocManaged(&data, count * sizeof(T)) != cudaSuccess) std::abort();
#endif
    std::memset(static_cast<void*>(data), 0xff, count * sizeof(T));
  }
  Buffer(size_t count, const std::function<T(int)>& value) : Buffer(count) {
    for (size_t i = 0; i < count; ++i) data[i] = value(static_cast<int>(i));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
#ifdef NORMFUSED_EMULATOR
    std::free(data);
#else
    cudaFree(data);
#endif
  }
  T& operator[](size_t i) { return data[i]; }
  size_t count;
  T* data;
};

template <class... P, class... A>
bool run(void (*kernel)(P...), const LaunchConfig& config, A... args) {
  Status status = launch(kernel, config, nullptr, args...);
#ifndef NORMFUSED_EMULATOR
  if (status == 0) status = cudaDeviceSynchronize();
#endif
  if (status != 0 && found.empty()) found = runtime_message(status);
  return status == 0;
}

float pattern(int i) { return static_cast<float>((i * 7 + i / 13) % 17); }

template <Mistake kMistake = Mistake::none>
void test_reverse() {
  const int n = 64, pieces = 6;
  Buffer<float> x(n * pieces, pattern), y(n * pieces);
  if (!run(reverse_kernel<kMistake>, {.grid_x = 2, .block = n, .shared_bytes = n * sizeof(float), .name = "reverse"},
           x.data, y.data, pieces))
    return;
  for (int i = 0; i < n * pieces; ++i) require(y[i] == x[i / n * n + n - 1 - i % n], "reverse");
}

void test_sum() {
  for (unsigned block : {32u, 96u, kLargestBlock}) {
    const int blocks = 3;
    Buffer<float> x(blocks * block, pattern), out(2 * blocks);
    if (!run(sum_kernel,
             {.grid_x = blocks, .block = block, .shared_bytes = 2 * block / kWarp * sizeof(float), .name = "sum"},
             x.data, out.data))
      return;
    for (int b = 0; b < blocks; ++b) {
      float sum = 0, squares = 0;
      for (unsigned i = 0; i < block; ++i) sum += x[b * block + i], squares += x[b * block + i] * x[b * block + i];
      require(out[2 * b] == sum && out[2 * b + 1] == squares, "sum");
    }
  }
}

template <class T, int N>
void test_welford() {
  using A = Accumulator<T>;
  const unsigned block = 160;
  Buffer<T> x(2 * block * N, [](int i) { return from_accumulator<T>(pattern(i) + 100); });
  Buffer<double> out(2 * block * 3);
  if (!run(welford_kernel<T, N>,
           {.grid_x = 2, .block = block, .shared_bytes = block / kWarp * sizeof(Welford<A>), .name = "welford"}, x.data,
           out.data))
    return;
  for (int b = 0; b < 2; ++b) {
    Welford<double> expected;
    for (unsigned i = 0; i < block * N; ++i) expected.combine({1, double(to_accumulator(x[b * block * N + i])), 0});
    for (unsigned i = 0; i < block; ++i) {
      const double* result = &out[3 * (b * block + i)];
      require(result[0] == expected.count, "welford: count");
      require(std::fabs(result[1] - expected.mean) < 1e-5 * expected.mean, "welford: mean");
      require(std::fabs(result[2] - expected.m2) < 1e-4 * expected.m2, "welford: m2");
      require(std::memcmp(result, &out[3 * b * block], 3 * sizeof(double)) == 0,
              "welford: the same bits in every thread");
    }
  }
}

void test_warp() {
  const unsigned block = 64;
  Buffer<int> out(6 * block);
  if (!run(warp_kernel, {.block = block, .name = "warp"}, out.data)) return;
  for (unsigned i = 0; i < block; ++i) {
    const int lane = i % kWarp;
    const int expected[6] = {
        5, lane + 3 < kWarp ? lane + 3 : lane, lane ^ 17, lane ^ 4, 0x49249249, lane < 16 ? 2 : 20};
    require(std::memcmp(&out[6 * i], expected, sizeof(expected)) == 0, "warp");
  }
}

template <Mistake kMistake = Mistake::none>
void test_cluster() {
  const unsigned block = 64, cluster = 4, grid = 8;
  DeviceLimits limits;
  require(device_limits(0, &limits) == 0, "limits");
  if (limits.max_cluster < int(cluster)) return;
  Buffer<float> x(grid * block, pattern), out(grid * block);
  if (!run(cluster_kernel<kMistake>,
           {.grid_x = grid,
            .block = block,
            .cluster = cluster,
            .shared_bytes = block * sizeof(float),
            .name = "cluster"},
           x.data, out.data))
    return;
  for (unsigned i = 0; i < grid * block; ++i) {
    float sum = 0;
    for (unsigned rank = 0; rank < cluster; ++rank) {
      sum += x[(i / block / cluster * cluster + rank) * block + block - 1 - i % block];
    }
    require(out[i] == sum, "cluster");
  }
}

template <Mistake kMistake = Mistake::none>
void test_grid() {
  const unsigned block = 64, blocks = 6;
  const int rounds = 3;
  Buffer<float> values(blocks), out(blocks * block);
  Buffer<unsigned> barrier(1, [](int) { return 0u; });
  if (!run(grid_kernel<kMistake>, {.grid_x = 3, .grid_y = 2, .block = block, .cooperative = true, .name = "grid"},
           values.data, out.data, barrier.data, rounds))
    return;
  const float expected = rounds * (0 + 1 + 2 + 3 + 4 + 5) + blocks * (0 + 1 + 2);
  for (unsigned i = 0; i < blocks * block; ++i) require(out[i] == expected, "grid");
}

template <Mistake kMistake = Mistake::none>
void test_pipeline() {
  const unsigned block = 64;
  const int pieces = 5;
  Buffer<float> x(4 * block * pieces, pattern), y(4 * block * pieces);
  if (!run(pipeline_kernel<kMistake>, {.block = block, .shared_bytes = 2 * 16 * block, .name = "pipeline"}, x.data,
           y.data, pieces))
    return;
  for (size_t i = 0; i < y.count; ++i) require(y[i] == 2 * x[i], "pipeline");
}

template <Mistake kMistake = Mistake::none>
void test_count() {
  const unsigned block = 96;
  Buffer<float> x(2 * block, pattern);
  Buffer<int> out(2);
  if (!run(count_kernel<kMistake>, {.grid_x = 2, .block = block, .shared_bytes = sizeof(int), .name = "count"}, x.data,
           out.data))
    return;
  for (unsigned b = 0; b < 2; ++b) {
    int expected = 0;
    for (unsigned i = 0; i < block; ++i) expected += x[b * block + i] < 8;
    require(out[b] == expected, "count");
  }
}

template <Mistake kMistake = Mistake::none>
void test_last_block() {
  const unsigned block = 64, blocks = 7;
  Buffer<float> x(blocks * block, pattern), partials(blocks), out(1);
  Buffer<unsigned> finished(1, [](int) { return 0u; });
  if (!run(last_block_kernel<kMistake>,
           {.grid_x = blocks, .block = block, .shared_bytes = 2 * sizeof(float), .name = "last_block"}, x.data,
           partials.data, finished.data, out.data))
    return;
  float total = 0;
  for (size_t i = 0; i < x.count; ++i) total += x[i];
  require(out[0] == total, "last_block");
}

// All 2^16 values survive a conversion there and back; values in between go to the nearest, ties to even.
template <class T>
void test_conversions() {
  const auto is_nan = [](float value) { return value != value; };
  Buffer<T> x(1 << 16, [](int i) { return T{static_cast<uint16_t>(i)}; }), narrow(1 << 16);
  Buffer<float> wide(1 << 16);
  if (!run(convert_kernel<T>, {.block = 32, .name = "convert"}, x.data, wide.data, narrow.data)) return;
  for (int i = 0; i < 1 << 16; ++i) {
    if (is_nan(wide[i])) {
      require(is_nan(to_accumulator(narrow[i])), "conversion: NaN");
      continue;
    }
    require(narrow[i].bits == i, "conversion: there and back");
    // A finite positive value and the next one; infinity's place among the numbers is the next power of two.
    if (i >= 0x8000 || std::isinf(wide[i])) continue;
    const float next =
        std::isinf(wide[i + 1]) ? 2 * wide[i] - to_accumulator(T{static_cast<uint16_t>(i - 1)}) : wide[i + 1];
    const float middle = wide[i] + (next - wide[i]) / 2;
    const auto rounded = [](float value) { return int{from_accumulator<T>(value).bits}; };
    if (std::isinf(next)) continue;
    require(rounded(middle) == i + i % 2, "conversion: tie");
    require(rounded(std::nextafter(middle, 0.0f)) == i, "conversion: below the middle");
    require(rounded(std::nextafter(middle, INFINITY)) == i + 1, "conversion: above the middle");
    require(rounded(-middle) == ((i + i % 2) | 0x8000), "conversion: sign");
  }
}

void test_refusals() {
  DeviceLimits limits;
  int device;
  require(current_device(&device) == 0 && device_limits(device, &limits) == 0, "limits");
  const auto refused = [](const LaunchConfig& config) {
    const Status status = launch(warp_kernel, config, nullptr, nullptr);
    require(status != 0 && std::strlen(runtime_message(status)) > 0, "refusals");
  };
  refused({.block = 2048});
  refused({.grid_x = 0});
  refused({.grid_y = 1u << 16});
  refused({.shared_bytes = limits.shared_per_block + 1});
  refused({.grid_x = 3, .cluster = 2});
  refused({.grid_x = 1u << 16, .cooperative = true});
}

void test_all() {
  test_reverse();
  test_sum();
  test_welford<float, 1>();
  test_welford<float, 4>();
  test_welford<double, 2>();
  test_welford<BFloat16, 8>();
  test_welford<Float16, 4>();
  test_warp();
  test_cluster();
  test_grid();
  test_pipeline();
  test_count();
  test_last_block();
}

#ifdef NORMFUSED_EMULATOR
// Threads of one block at different barriers, lanes that never come, and a barrier after some have left.
__global__ void diverge_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lanes_kernel() {
  if (threadIdx.x < 16) __syncwarp();
}

__global__ void exit_kernel() {
  if (threadIdx.x == 3) return;
  __syncthreads();
}

__global__ void spin_kernel(unsigned* never) {
  while (load_acquire(never) == 0) {
  }
}

void test_reports() {
  unsigned never = 0;
  const auto reports = [](const char* expected, auto kernel, auto... args) {
    const Status status = launch(kernel, {.block = 64, .name = "wrong"}, nullptr, args...);
    require(status != 0 && std::strstr(runtime_message(status), expected), expected);
    if (!found.empty()) found += std::string(", but: ") + runtime_message(status);
  };
  emulator::clear_launches();
  reports("others wait at __syncthreads", diverge_kernel);
  reports("in __syncwarp (", lanes_kernel);
  reports("waits in __syncthreads", exit_kernel);
  reports("waits for global memory to change", spin_kernel, &never);
  require(emulator::launches().size() == 4 && emulator::launches()[2].config.block == 64, "launches are recorded");
  require(emulator::launches()[2].kernel == reinterpret_cast<const void*>(exit_kernel), "kernels are recorded");
}

struct Run {
  const char* name;
  emulator::Schedule schedule;
  uint64_t seed;
};

constexpr Run kRuns[] = {
    {"together", emulator::Schedule::together, 0},     {"warp", emulator::Schedule::warp, 0},
    {"warp, last first", emulator::Schedule::warp, 1}, {"random 1", emulator::Schedule::random, 1},
    {"random 2", emulator::Schedule::random, 2},
};
#endif

void report(const char* run) {
  if (found.empty()) return;
  std::printf("%s: %s\n", run, found.c_str());
  found.clear();
  ++failures;
}

int run_tests(const std::string& mistake) {
#ifdef NORMFUSED_EMULATOR
  const std::pair<const char*, void (*)()> mistakes[] = {
      {"barrier", test_reverse<Mistake::barrier>},
      {"first_barrier", test_reverse<Mistake::first_barrier>},
      {"out_of_bounds", test_reverse<Mistake::out_of_bounds>},
      {"early_read", test_pipeline<Mistake::early_read>},
      {"uninitialised", test_count<Mistake::uninitialised>},
      {"cluster_begin", test_cluster<Mistake::cluster_begin>},
      {"cluster_end", test_cluster<Mistake::cluster_end>},
      {"grid", test_grid<Mistake::grid>},
      {"last_block", test_last_block<Mistake::last_block>},
  };
  for (const Run& run : kRuns) {
    emulator::set_schedule(run.schedule, run.seed);
    if (mistake.empty()) {
      test_all();
      test_reports();
      report(run.name);
    }
    for (const auto& [name, test] : mistakes) {
      if (mistake != name) continue;
      test();
      report(run.name);
    }
  }
#else
  test_all();
  report("device");
#endif
  if (mistake.empty()) {
    test_conversions<BFloat16>();
    test_conversions<Float16>();
    test_refusals();
    report("host");
    return failures != 0;
  }
  return failures == 0;
}

}  // namespace
}  // namespace normfused::cuda

int main(int argc, char** argv) { return normfused::cuda::run_tests(argc > 1 ? argv[1] : ""); }
