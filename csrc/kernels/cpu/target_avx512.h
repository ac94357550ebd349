// Compile everything that follows for AVX-512 as Skylake has it (F, BW, DQ, VL).
#pragma once

#define NORMFUSED_INSTRUCTION_SET avx512
#define NORMFUSED_VECTOR_BYTES 64

#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
