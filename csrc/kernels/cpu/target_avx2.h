// Compile everything that follows for AVX2 with FMA (Haswell and Zen, and newer).
#pragma once

#define NORMFUSED_INSTRUCTION_SET avx2
#define NORMFUSED_VECTOR_BYTES 32

#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
