// NORMFUSED_INLINE: a function called inside of a loop over elements, which vectorises only if nothing is called there.
#pragma once

#ifdef __CUDACC__
#define NORMFUSED_INLINE __host__ __device__ __forceinline__
#else
#define NORMFUSED_INLINE __attribute__((always_inline)) inline
#endif
