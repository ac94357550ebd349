// The device as the kernels see it. This file alone names CUDA's headers and PTX, and alone knows that the kernels can
// also run on the CPU, under the emulator of tests/emulator.
//
// Rules that let a kernel run in both: dynamic shared memory only, launch() only, one-dimensional blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#include "../inline.h"
#include "device_limits.h"
#include "status.h"

namespace normfused::cuda {

constexpr int kWarp = 32;

// Storage of the 16-bit types; arithmetic happens in their accumulator type.
struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
// The type that T is computed in: double for double, float for everything else.
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

NORMFUSED_INLINE float to_accumulator(float value) { return value; }
NORMFUSED_INLINE double to_accumulator(double value) { return value; }

}  // namespace normfused::cuda

#ifdef NORMFUSED_EMULATOR
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <set>

namespace normfused::cuda {

// --- 16-bit conversions ----------------------------------------------------------------------------------------------

NORMFUSED_INLINE float to_accumulator(BFloat16 value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }
NORMFUSED_INLINE float to_accumulator(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

// value rounded to T, to nearest, ties to even; NaN stays NaN.
template <class T>
NORMFUSED_INLINE T from_accumulator(Accumulator<T> value) {
  return value;
}
template <>
NORMFUSED_INLINE BFloat16 from_accumulator<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
NORMFUSED_INLINE Float16 from_accumulator<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

// --- Memory ----------------------------------------------------------------------------------------------------------

// The start of the block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char normfused_shared[];
  return reinterpret_cast<T*>(normfused_shared);
}

// Starts a copy of 16 bytes, both ends 16-byte aligned, past L1 and registers.
__device__ __forceinline__ void async_copy_16(void* shared_dst, const void* global_src) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared_dst))),
      "l"(__cvta_generic_to_global(global_src))
      : "memory");
}

// Closes a group: the copies that this thread has started since the last group.
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the newest N groups of this thread have landed. Other threads see them after a barrier.
template <int N>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <size_t kBytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// A load of global memory that is not needed again soon, of 1, 2, 4, 8 or 16 bytes: the first to leave the caches.
template <class T>
__device__ __forceinline__ T load_last_use(const T* address) {
  using W = typename Word<sizeof(T)>::type;
  return __builtin_bit_cast(T, __ldcs(reinterpret_cast<const W*>(address)));
}

// A store that is not read again soon, likewise.
template <class T>
__device__ __forceinline__ void store_streaming(T* address, T value) {
  using W = typename Word<sizeof(T)>::type;
  __stcs(reinterpret_cast<W*>(address), __builtin_bit_cast(W, value));
}

// Adds to global memory and returns the old value. Releases what the block wrote before its last barrier, and acquires
// what was released by those who added before.
__device__ __forceinline__ unsigned atomic_add(unsigned* address, unsigned value) {
  unsigned old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(address)), "r"(value)
               : "memory");
  return old;
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(address)) : "memory");
  return value;
}

// --- Clusters: from sm_90 on. Before, every block is a cluster of its own.
// --------------------------------------------

__device__ __forceinline__ int cluster_rank() {
  int rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ int cluster_size() {
  int size = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

// A barrier of all threads of the cluster. The last access to another block's shared memory needs one after it, lest
// that block has exited.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Where block `rank` of the cluster has what this block has at `shared`.
template <class T>
__device__ __forceinline__ T* cluster_map(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  return shared;
#endif
}

// --- Host: limits and launches
// ----------------------------------------------------------------------------------------

inline const char* runtime_message(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

inline Status current_device(int* device) { return cudaGetDevice(device); }

static __global__ void probe_kernel() {}

// 8 is portable; whether there are more, the current device has to say. 1 where the driver has compiled code for less
// than sm_90: it knows no clusters.
inline int largest_cluster() {
  cudaFuncAttributes code;
  if (cudaFuncGetAttributes(&code, probe_kernel) != cudaSuccess || code.ptxVersion < 90 || code.binaryVersion < 90) {
    cudaGetLastError();
    return 1;
  }
  int size = 8;
  cudaLaunchConfig_t config = {};
  config.gridDim = config.blockDim = dim3(1);
  if (cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess ||
      cudaOccupancyMaxPotentialClusterSize(&size, probe_kernel, &config) != cudaSuccess) {
    cudaGetLastError();
  }
  return size;
}

inline Status query_limits(int device, DeviceLimits* limits) {
  int major, minor, shared_per_block, shared_per_multiprocessor, shared_reserved, l2_bytes, grid_x, grid_y;
  const std::pair<int*, cudaDeviceAttr> attributes[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&minor, cudaDevAttrComputeCapabilityMinor},
      {&limits->multiprocessors, cudaDevAttrMultiProcessorCount},
      {&limits->threads_per_multiprocessor, cudaDevAttrMaxThreadsPerMultiProcessor},
      {&limits->blocks_per_multiprocessor, cudaDevAttrMaxBlocksPerMultiprocessor},
      {&shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {&shared_reserved, cudaDevAttrReservedSharedMemoryPerBlock},
      {&l2_bytes, cudaDevAttrL2CacheSize},
      {&grid_x, cudaDevAttrMaxGridDimX},
      {&grid_y, cudaDevAttrMaxGridDimY},
  };
  for (const auto& [value, attribute] : attributes) {
    if (const Status status = cudaDeviceGetAttribute(value, attribute, device)) return status;
  }
  limits->compute_capability = 10 * major + minor;
  limits->shared_per_block = shared_per_block;
  limits->shared_per_multiprocessor = shared_per_multiprocessor;
  limits->shared_reserved_per_block = shared_reserved;
  limits->l2_bytes = l2_bytes;
  limits->max_grid_x = grid_x;
  limits->max_grid_y = grid_y;
  limits->max_cluster = major >= 9 ? largest_cluster() : 1;
  return cudaSuccess;
}

// The limits of a device, which must be the current one. Queried once.
inline Status device_limits(int device, DeviceLimits* limits) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(device); found != known.end()) {
    *limits = found->second;
    return cudaSuccess;
  }
  const Status status = query_limits(device, limits);
  if (status == cudaSuccess) known[device] = *limits;
  return status;
}

// Allows a kernel all the shared memory and the largest clusters of the current device. Done once. What asks for so
// much needs no L1.
inline Status lift_limits(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int> > lifted;
  int device;
  DeviceLimits limits;
  if (const Status status = current_device(&device)) return status;
  const std::lock_guard lock(mutex);
  if (lifted.count({kernel, device})) return cudaSuccess;
  if (const Status status = device_limits(device, &limits)) return status;
  const int shared_bytes = static_cast<int>(limits.shared_per_block);
  if (const Status status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)) {
    return status;
  }
  if (const Status status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                 cudaSharedmemCarveoutMaxShared)) {
    return status;
  }
  if (limits.max_cluster > 8) {
    const Status status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status != cudaSuccess) return status;
  }
  lifted.insert({kernel, device});
  return cudaSuccess;
}

inline Status launch_pointers(const void* kernel, const LaunchConfig& config, void* stream, void** args) {
  constexpr size_t kSharedWithoutAsking = 48 << 10;
  constexpr unsigned kClusterWithoutAsking = 8;
  if (config.shared_bytes > kSharedWithoutAsking || config.cluster > kClusterWithoutAsking) {
    if (const Status status = lift_limits(kernel)) return status;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(config.grid_x, config.grid_y);
  launch.blockDim = dim3(config.block);
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = static_cast<cudaStream_t>(stream);
  launch.attrs = attributes;
  if (config.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {config.cluster, 1, 1};
  }
  if (config.cooperative) {
    cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  const Status status = cudaLaunchKernelExC(&launch, kernel, args);
  // Reported once, by us: later calls of others must not find it.
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// Launches kernel(args...) on a stream, args converted to the kernel's parameter types.
template <class... P, class... A>
Status launch(void (*kernel)(P...), const LaunchConfig& config, void* stream, A&&... args) {
  std::tuple<P...> values(std::forward<A>(args)...);
  return std::apply(
      [&](P&... value) {
        void* pointers[] = {&value..., nullptr};
        return launch_pointers(reinterpret_cast<const void*>(kernel), config, stream, pointers);
      },
      values);
}

}  // namespace normfused::cuda

#endif

namespace normfused::cuda {

// A barrier of all blocks of a cooperative launch. *barrier, in global memory, must be 0 at the launch; it counts
// arrivals, and every `blocks` of them let a barrier pass.
__device__ __forceinline__ void grid_sync(unsigned* barrier) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned blocks = gridDim.x * gridDim.y;
    const unsigned arrived = atomic_add(barrier, 1);
    const unsigned awaited = (arrived / blocks + 1) * blocks;
    while (load_acquire(barrier) < awaited) {
    }
  }
  __syncthreads();
}

}  // namespace normfused::cuda
