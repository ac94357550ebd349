// exp as straight-line code for vectors (the C library's is a call per element). A GPU has one of its own.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace normfused {
namespace {

// exp(x) in single precision, to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for exp(r), and the
// exponent n put in by two multiplications, so that overflow ends in inf and underflow passes through the denormals.
// NaN stays NaN.
template <class V>
NORMFUSED_INLINE V exponential(V x) {
#ifdef __CUDA_ARCH__
  return exp(x);
#else
  using Integers = typename Lanes<V>::integer;
  if constexpr (sizeof(typename Lanes<V>::type) == 8) {
    return Lanes<V>::each(x, [](double value) { return __builtin_exp(value); });
  } else {
    // Outside of these bounds the result is inf or 0 anyway, and n must fit the two exponents below.
    const V t = Lanes<V>::at_least(constant<V>(-150.0f), Lanes<V>::at_most(constant<V>(128.0f), x));
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    const V shifted = t * constant<V>(1.44269504088896341f) + constant<V>(12582912.0f);
    const V n = shifted - constant<V>(12582912.0f);
    // ln 2 in two parts, the first with trailing zeros, so that n * first is exact.
    const V r = (t - n * constant<V>(0.693145751953125f)) - n * constant<V>(1.42860677e-6f);
    V p = constant<V>(1.9875691500e-4f);
    p = p * r + constant<V>(1.3981999507e-3f);
    p = p * r + constant<V>(8.3334519073e-3f);
    p = p * r + constant<V>(4.1665795894e-2f);
    p = p * r + constant<V>(1.6666665459e-1f);
    p = p * r + constant<V>(5.0000001201e-1f);
    p = (p * r) * r + r + constant<V>(1.0f);
    if constexpr (Lanes<V>::kScales) return Lanes<V>::scale(p, n);
    const V number = n == n ? n : constant<V>(0);
    const Integers exponent = Lanes<V>::to_integer(number), half = exponent >> 1;
    const V first = __builtin_bit_cast(V, (half + 127) << 23);
    const V second = __builtin_bit_cast(V, (exponent - half + 127) << 23);
    return p * first * second;
  }
#endif
}

}  // namespace
}  // namespace normfused
