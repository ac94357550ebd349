// N adjacent elements, loaded and stored as one access.
#pragma once

#include "device.cuh"

namespace normfused::cuda {

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0, "no such access");
  T values[N];
};

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* address) {
  return *reinterpret_cast<const Vector<T, N>*>(address);
}

template <class T, int N>
__device__ __forceinline__ void store_vector(T* address, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(address) = vector;
}

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_vector_last_use(const T* address) {
  return load_last_use(reinterpret_cast<const Vector<T, N>*>(address));
}

template <class T, int N>
__device__ __forceinline__ void store_vector_streaming(T* address, const Vector<T, N>& vector) {
  store_streaming(reinterpret_cast<Vector<T, N>*>(address), vector);
}

}  // namespace normfused::cuda
