// Element types in memory and the arithmetic type they are computed in; conversions are plain integer arithmetic that
// vectorises on every instruction set.
#pragma once

#include <cstdint>

#include "../inline.h"

namespace normfused {
namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
// The type that T is computed in: double for double, float for everything else.
template <class T>
using arithmetic_t = typename Arithmetic<T>::type;

NORMFUSED_INLINE float load(float value) { return value; }
NORMFUSED_INLINE double load(double value) { return value; }

NORMFUSED_INLINE float load(BFloat16 value) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16);
}

NORMFUSED_INLINE float load(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  // The exponent bias differs by 112; multiplying by 2^112 also normalises denormals.
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t finite = __builtin_bit_cast(uint32_t, scaled);
  const uint32_t bits = magnitude >= (0x7c00u << 13) ? (magnitude | 0x7f800000u) : finite;
  return __builtin_bit_cast(float, bits | sign);
}

// store<T>(value): value rounded to T, to nearest, ties to even.
template <class T>
NORMFUSED_INLINE T store(arithmetic_t<T> value) {
  return value;
}

template <>
NORMFUSED_INLINE BFloat16 store<BFloat16>(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = 0x7fc0u | (bits >> 16);
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

template <>
NORMFUSED_INLINE Float16 store<Float16>(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: move the exponent bias from 127 to 15 and round off 13 bits.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 2^-1 makes the float adder round at a denormal's last bit, 2^-24.
  const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
  const uint32_t denormal = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000u;
  const uint32_t finite = magnitude < (113u << 23) ? denormal : normal;
  // From 65520 on everything rounds to infinity.
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite))};
}

// store<T>(value) for a value that T represents exactly.
template <class T>
NORMFUSED_INLINE T store_exact(arithmetic_t<T> value) {
  return store<T>(value);
}

template <>
NORMFUSED_INLINE BFloat16 store_exact<BFloat16>(float value) {
  return {static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value) >> 16)};
}

// value as it would be read back after a store: what native's separate BatchNorm hands to the activation.
template <class T>
NORMFUSED_INLINE arithmetic_t<T> rounded(arithmetic_t<T> value) {
  return load(store<T>(value));
}

}  // namespace
}  // namespace normfused
