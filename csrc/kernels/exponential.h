// exp as straight-line code that compilers vectorise in a plain loop (the C library's is a call per element). A GPU has
// one of its own, faster still.
#pragma once

#include <cstdint>

#include "inline.h"

namespace normfused {
namespace {

// exp(x) to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for exp(r), and the exponent n put in by two
// multiplications, so that overflow ends in inf and underflow passes through the denormals. NaN stays NaN.
NORMFUSED_INLINE float exponential(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  // Outside of these bounds the result is inf or 0 anyway, and n must fit the two exponents below.
  const float bounded = x > 128.0f ? 128.0f : x;
  const float t = bounded < -150.0f ? -150.0f : bounded;
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
  const float shifted = t * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // ln 2 in two parts, the first with trailing zeros, so that n * first is exact.
  const float r = (t - n * 0.693145751953125f) - n * 1.42860677e-6f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const int32_t exponent = n == n ? static_cast<int32_t>(n) : 0;
  const int32_t half = exponent >> 1;
  const float first = __builtin_bit_cast(float, (half + 127) << 23);
  const float second = __builtin_bit_cast(float, (exponent - half + 127) << 23);
  return p * first * second;
#endif
}

NORMFUSED_INLINE double exponential(double x) { return __builtin_exp(x); }

}  // namespace
}  // namespace normfused
