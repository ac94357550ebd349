// CUDA's words for g++, and the emulator's own: device.cuh includes this file when NORMFUSED_EMULATOR is defined.
//
// Every thread of a block is a fiber. Shared memory is poisoned with NaN before a block starts and after it has ended;
// barriers and warp primitives that not all of their threads reach, at the same line, are errors. See emulator.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ __attribute__((always_inline)) inline
#define __launch_bounds__(...)

#define threadIdx (normfused::emulator::here().thread)
#define blockIdx (normfused::emulator::here().block->index)
#define blockDim (normfused::emulator::here().block->dim)
#define gridDim (normfused::emulator::here().block->grid)

namespace normfused::emulator {

using cuda::DeviceLimits;
using cuda::LaunchConfig;
using cuda::Status;

// --- For tests -------------------------------------------------------------------------------------------------------

// In which order threads advance. No single order shows every missing barrier.
enum class Schedule {
  together,  // every thread to its next barrier, then every thread to the one after it
  warp,      // one warp as far as it can go before the next; the last warp first where the seed is odd
  random,    // any thread, up to four clusters at once
};

void set_schedule(Schedule schedule, uint64_t seed = 0);

// The device to emulate; by default an H200.
void set_limits(const DeviceLimits& limits);

struct Launch {
  const void* kernel;
  LaunchConfig config;
};

// The launches since the program began or clear_launches was called.
const std::vector<Launch>& launches();
void clear_launches();

// --- For the words below ---------------------------------------------------------------------------------------------

struct Index {
  unsigned x, y, z;
};

struct Coordinates {
  Index index, dim, grid;
  unsigned cluster_rank, cluster_size;
  void* shared;
};

struct Here {
  Index thread;
  const Coordinates* block;
};

// The running thread. Const: it stays the same thread from a function's beginning to its end.
__attribute__((const)) const Here& here();

// Where a thread waits: for reports, and to tell whether threads have gone apart.
struct Site {
  const char* primitive;
  const char* file;
  int line;
};

// Runs body(context) in every thread of a grid.
Status run(const void* kernel, const LaunchConfig& config, void (*body)(void*), void* context);

void block_barrier(Site site);
void cluster_barrier(Site site);
enum class WarpOperation { sync, shuffle, ballot };
// shuffle: the value of source_lane; ballot: a bit for each lane whose value is not 0.
uint64_t warp_exchange(WarpOperation operation, unsigned mask, unsigned source_lane, uint64_t value, Site site);
// A point where another thread may go first. waiting: nothing to do before another thread has done something.
void yield(bool waiting = false);
void* peer_shared(const void* shared, int rank, Site site);

struct AsyncCopy {
  void* destination;
  const void* source;
};

void async_begin(AsyncCopy copy, Site site);
void async_close_group();
// The oldest copy in flight that is not in the newest `groups` groups; false if there is none.
bool async_next(int groups, AsyncCopy* copy);

template <class T>
__forceinline__ T shuffle(T value, unsigned mask, unsigned source_lane, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_exchange(WarpOperation::shuffle, mask, source_lane, bits, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace normfused::emulator

// --- CUDA's words ----------------------------------------------------------------------------------------------------

using std::fma;
using std::isfinite;
using std::max;
using std::min;
using std::sqrt;

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }

// The place of a call, taken by default arguments.
#define NORMFUSED_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(NORMFUSED_CALLER) { normfused::emulator::block_barrier({"__syncthreads", file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, NORMFUSED_CALLER) {
  using normfused::emulator::WarpOperation;
  normfused::emulator::warp_exchange(WarpOperation::sync, mask, 0, 0, {"__syncwarp", file, line});
}

inline unsigned __ballot_sync(unsigned mask, bool predicate, NORMFUSED_CALLER) {
  using normfused::emulator::WarpOperation;
  const auto bits =
      normfused::emulator::warp_exchange(WarpOperation::ballot, mask, 0, predicate, {"__ballot_sync", file, line});
  return static_cast<unsigned>(bits);
}

// Segments of width lanes, a power of two, are on their own.
template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = 32, NORMFUSED_CALLER) {
  const unsigned segment = threadIdx.x % 32 & -width;
  return normfused::emulator::shuffle(value, mask, segment + (source & (width - 1)), {"__shfl_sync", file, line});
}

template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, NORMFUSED_CALLER) {
  const unsigned lane = threadIdx.x % 32, end = (lane & -width) + width;
  const unsigned source = lane + delta < end ? lane + delta : lane;
  return normfused::emulator::shuffle(value, mask, source, {"__shfl_down_sync", file, line});
}

template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, NORMFUSED_CALLER) {
  const unsigned lane = threadIdx.x % 32, end = (lane & -width) + width;
  const unsigned source = (lane ^ lane_mask) < end ? lane ^ lane_mask : lane;
  return normfused::emulator::shuffle(value, mask, source, {"__shfl_xor_sync", file, line});
}

inline void __threadfence() { normfused::emulator::yield(); }

// --- What device.cuh makes of PTX and of the CUDA runtime, documented there
// --------------------------------------------

namespace normfused::cuda {

inline float to_accumulator(BFloat16 value) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16);
}

inline float to_accumulator(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  // Shifted to a float's place, the exponent is 112 too small; infinity and NaN have the largest one there is.
  const float finite = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  const float special = __builtin_bit_cast(float, magnitude << 13 | 0x7f800000u);
  return std::copysign(magnitude >= 0x7c00u ? special : finite, value.bits & 0x8000u ? -1.0f : 1.0f);
}

template <class T>
T from_accumulator(Accumulator<T> value) {
  return value;
}

template <>
inline BFloat16 from_accumulator<BFloat16>(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(std::isnan(value) ? 0x7fffu : rounded)};
}

template <>
inline Float16 from_accumulator<Float16>(float value) {
  if (std::isnan(value)) return {0x7fffu};
  const uint16_t sign = std::signbit(value) ? 0x8000u : 0u;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  // In units of the last place of a float16 of this size: 11 significant bits, and none below 2^-24.
  const int unit = std::max(magnitude == 0 ? -24 : std::ilogb(magnitude) - 10, -24);
  const auto rounded = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  return {static_cast<uint16_t>(sign | (rounded + (static_cast<uint32_t>(unit + 24) << 10)))};
}

template <class T>
T* shared_memory() {
  return static_cast<T*>(emulator::here().block->shared);
}

inline void async_copy_16(void* shared_dst, const void* global_src, NORMFUSED_CALLER) {
  emulator::async_begin({shared_dst, global_src}, {"async_copy_16", file, line});
  std::memset(shared_dst, 0xff, 16);
}

inline void async_commit() { emulator::async_close_group(); }

template <int N>
void async_wait() {
  emulator::AsyncCopy copy;
  while (emulator::async_next(N, &copy)) std::memcpy(copy.destination, copy.source, 16);
}

template <class T>
T load_last_use(const T* address) {
  return *address;
}

template <class T>
void store_streaming(T* address, T value) {
  *address = value;
}

inline unsigned atomic_add(unsigned* address, unsigned value) {
  emulator::yield();
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}

inline unsigned load_acquire(const unsigned* address) {
  emulator::yield(/*waiting=*/true);
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

inline int cluster_rank() { return emulator::here().block->cluster_rank; }
inline int cluster_size() { return emulator::here().block->cluster_size; }
inline void cluster_sync(NORMFUSED_CALLER) { emulator::cluster_barrier({"cluster_sync", file, line}); }

template <class T>
T* cluster_map(T* shared, int rank, NORMFUSED_CALLER) {
  return static_cast<T*>(emulator::peer_shared(shared, rank, {"cluster_map", file, line}));
}

const char* runtime_message(Status status);
Status current_device(int* device);
Status device_limits(int device, DeviceLimits* limits);

template <class... P, class... A>
Status launch(void (*kernel)(P...), const LaunchConfig& config, void*, A&&... args) {
  std::tuple<P...> values(std::forward<A>(args)...);
  auto body = [&] { std::apply(kernel, values); };
  const auto call = [](void* context) { (*static_cast<decltype(body)*>(context))(); };
  return emulator::run(reinterpret_cast<const void*>(kernel), config, call, &body);
}

}  // namespace normfused::cuda

#undef NORMFUSED_CALLER
