// NORMFUSED_INLINE: a function called inside of a loop over elements, which vectorises only if nothing is called there.
// NORMFUSED_NOINLINE: on the CPU, one that is rare, and whose copies would be much of the code.
#pragma once

#ifdef __CUDACC__
#define NORMFUSED_INLINE __host__ __device__ __forceinline__
#else
#define NORMFUSED_INLINE __attribute__((always_inline)) inline
#define NORMFUSED_NOINLINE __attribute__((noinline))
#endif
