// Element types in memory, the arithmetic type they are computed in, and the conversions between them: integer
// arithmetic that reads the same for one value and for a vector, or the processor's own where it has one.
#pragma once

#include <cstdint>

#include "vector.h"

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

template <class T>
constexpr bool kIsHalf = false;
template <>
inline constexpr bool kIsHalf<Float16> = true;
template <class T>
constexpr bool kIsBFloat16 = false;
template <>
inline constexpr bool kIsBFloat16<BFloat16> = true;

// Bounds of what rounds to a constant: kZero the greatest z that becomes zero, kSix the least that becomes six (ties go
// to even, which both are).
template <class T>
struct Rounding {
  static constexpr arithmetic_t<T> kZero = 0, kSix = 6;
};
template <>
struct Rounding<BFloat16> {
  static constexpr float kZero = 0x1p-134f, kSix = 6 - 0x1p-6f;
};
template <>
struct Rounding<Float16> {
  static constexpr float kZero = 0x1p-25f, kSix = 6 - 0x1p-9f;
};

// Integers of 16 bits to 32 and back, and half precision, by the processor's own instructions.
#if NORMFUSED_VECTOR_BYTES == 64
using ShortVector = __m256i;
NORMFUSED_INLINE Vector<uint32_t> extend(__m256i bits) {
  return Vector<uint32_t>(_mm512_maskz_cvtepu16_epi32(0xffff, bits));
}
NORMFUSED_INLINE __m256i truncate(Vector<uint32_t> v) { return _mm512_maskz_cvtepi32_epi16(0xffff, __m512i(v)); }
NORMFUSED_INLINE Vector<float> widen_half(__m256i bits) { return Vector<float>(_mm512_maskz_cvtph_ps(0xffff, bits)); }
NORMFUSED_INLINE __m256i narrow_half(Vector<float> v) {
  return _mm512_maskz_cvtps_ph(0xffff, __m512(v), _MM_FROUND_TO_NEAREST_INT);
}
constexpr bool kConvertsHalf = true;

// bfloat16 is the upper half of a float: moving 16-bit lanes up and down takes one instruction.
NORMFUSED_INLINE Vector<float> widen_bfloat16(__m256i bits) {
  const __m512i up = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,  //
                                      7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return Vector<float>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, up, _mm512_castsi256_si512(bits)));
}
// To nearest, ties to even; a NaN keeps its upper half.
NORMFUSED_INLINE __m256i narrow_bfloat16(Vector<float> v) {
  const __m512i bits = __m512i(v);
  const __mmask16 ordered = _mm512_cmp_ps_mask(__m512(v), __m512(v), _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(ordered, bits, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_mask_add_epi32(bits, ordered, bits, _mm512_set1_epi32(0x7fff));
  const __m512i whole = _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
  const __m512i down = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  //
                                        31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i narrowed = _mm512_maskz_permutexvar_epi16(0xffff, down, whole);
  __m256i low;
  __builtin_memcpy(&low, &narrowed, sizeof low);
  return low;
}
constexpr bool kConvertsBFloat16 = true;
#elif NORMFUSED_VECTOR_BYTES == 32
using ShortVector = __m128i;
NORMFUSED_INLINE Vector<uint32_t> extend(__m128i bits) { return Vector<uint32_t>(_mm256_cvtepu16_epi32(bits)); }
NORMFUSED_INLINE __m128i truncate(Vector<uint32_t> v) {
  // Packs within halves, whose middle quarters then change places.
  const __m256i packed = _mm256_packus_epi32(__m256i(v), __m256i(v));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
NORMFUSED_INLINE Vector<float> widen_half(__m128i bits) { return Vector<float>(_mm256_cvtph_ps(bits)); }
NORMFUSED_INLINE __m128i narrow_half(Vector<float> v) { return _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT); }
constexpr bool kConvertsHalf = true;
#else
using ShortVector = VectorOf<uint16_t, kLanes<float>>::type;
NORMFUSED_INLINE Vector<uint32_t> extend(ShortVector bits) { return __builtin_convertvector(bits, Vector<uint32_t>); }
NORMFUSED_INLINE ShortVector truncate(Vector<uint32_t> v) { return __builtin_convertvector(v, ShortVector); }
NORMFUSED_INLINE Vector<float> widen_half(ShortVector) { return Vector<float>{}; }
NORMFUSED_INLINE ShortVector narrow_half(Vector<float>) { return ShortVector{}; }
constexpr bool kConvertsHalf = false;
#endif

#if NORMFUSED_VECTOR_BYTES != 64
NORMFUSED_INLINE Vector<float> widen_bfloat16(ShortVector) { return Vector<float>{}; }
NORMFUSED_INLINE ShortVector narrow_bfloat16(Vector<float>) { return ShortVector{}; }
constexpr bool kConvertsBFloat16 = false;
#endif

#if defined(__SSE2__)
// A cache line, 64 bytes, to an aligned address. In quarters: a load that spans two stores waits until both are in L1.
NORMFUSED_INLINE void stream_line(const void* from, void* to) {
  for (int i = 0; i < 4; ++i)
    _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
}
#endif

template <class Bits>
NORMFUSED_INLINE Bits bit_load(const void* x) {
  Bits bits;
  __builtin_memcpy(&bits, x, sizeof bits);
  return bits;
}

// Bits of 16-bit elements, low in 32-bit integers, to floats. U is uint32_t or a vector of them.
template <class V, class U>
NORMFUSED_INLINE V widen(U bits, BFloat16) {
  return __builtin_bit_cast(V, bits << 16);
}

template <class V, class U>
NORMFUSED_INLINE V widen(U bits, Float16) {
  const U sign = (bits & 0x8000u) << 16;
  const U magnitude = (bits & 0x7fffu) << 13;
  // The exponent bias differs by 112; multiplying by 2^112 also normalises denormals.
  const V scaled = __builtin_bit_cast(V, magnitude) * 0x1p112f;
  const U finite = __builtin_bit_cast(U, scaled);
  const U special = magnitude | 0x7f800000u;
  return __builtin_bit_cast(V, (magnitude >= (0x7c00u << 13) ? special : finite) | sign);
}

// And back, to nearest, ties to even.
template <class U, class V>
NORMFUSED_INLINE U narrow(V value, BFloat16) {
  const U bits = __builtin_bit_cast(U, value);
  // What arithmetic gives is a quiet NaN, whose upper half is one by itself.
  return (value == value ? bits + (((bits >> 16) & 1u) + 0x7fffu) : bits) >> 16;
}

template <class U, class V>
NORMFUSED_INLINE U narrow(V value, Float16) {
  const U bits = __builtin_bit_cast(U, value);
  const U sign = (bits >> 16) & 0x8000u;
  const U magnitude = bits & 0x7fffffffu;
  // Normal results: move the exponent bias from 127 to 15 and round off 13 bits.
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 2^-1 makes the float adder round at a denormal's last bit, 2^-24.
  const V shifted = __builtin_bit_cast(V, magnitude) + 0.5f;
  const U denormal = __builtin_bit_cast(U, shifted) - 0x3f000000u;
  const U finite = magnitude < (113u << 23) ? denormal : normal;
  // From 65520 on everything rounds to infinity.
  const U infinity = U{} + 0x7c00u, nan = U{} + 0x7e00u;
  const U special = magnitude > 0x7f800000u ? nan : infinity;
  return sign | (magnitude >= 0x477ff000u ? special : finite);
}

// Of one value: called, since loops over less than a vector are rare, and small this way.
template <class T>
NORMFUSED_NOINLINE float widen_one(T x) {
  return widen<float>(static_cast<uint32_t>(x.bits), T{});
}
template <class T>
NORMFUSED_NOINLINE T narrow_one(float value) {
  return {static_cast<uint16_t>(narrow<uint32_t>(value, T{}))};
}

// load<V>(x): the element at x as V = arithmetic_t<T>, or the next elements as a vector.
template <class V, class T>
NORMFUSED_INLINE V load(const T* x) {
  constexpr int kCount = Lanes<V>::kCount;
  if constexpr (sizeof(T) == sizeof(typename Lanes<V>::type)) {
    V v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
  } else if constexpr (kCount == 1) {
    return widen_one(*x);
  } else if constexpr (kConvertsHalf && kIsHalf<T>) {
    return widen_half(bit_load<ShortVector>(x));
  } else if constexpr (kConvertsBFloat16 && kIsBFloat16<T>) {
    return widen_bfloat16(bit_load<ShortVector>(x));
  } else {
    return widen<V>(extend(bit_load<ShortVector>(x)), T{});
  }
}

// Stores value, rounded to T.
template <class T, class V>
NORMFUSED_INLINE void store(T* y, V value) {
  constexpr int kCount = Lanes<V>::kCount;
  if constexpr (sizeof(T) == sizeof(typename Lanes<V>::type)) {
    __builtin_memcpy(y, &value, sizeof value);
  } else if constexpr (kCount == 1) {
    *y = narrow_one<T>(value);
  } else if constexpr (kConvertsHalf && kIsHalf<T>) {
    const auto bits = narrow_half(value);
    __builtin_memcpy(y, &bits, sizeof bits);
  } else if constexpr (kConvertsBFloat16 && kIsBFloat16<T>) {
    const auto bits = narrow_bfloat16(value);
    __builtin_memcpy(y, &bits, sizeof bits);
  } else {
    const ShortVector bits = truncate(narrow<Vector<uint32_t>>(value, T{}));
    __builtin_memcpy(y, &bits, sizeof bits);
  }
}

// Copies past the caches: the lines of `to` are neither read before they are written nor kept. flush() has to follow
// before another thread reads them.
template <class T>
void stream(const T* from, T* to, int64_t n) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t into = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % 64 / sizeof(T));
  const int64_t head = into == 0 ? 0 : kLine - into < n ? kLine - into : n;
  __builtin_memcpy(to, from, head * sizeof(T));
  int64_t i = head;
  for (; i + kLine <= n; i += kLine) stream_line(from + i, to + i);
  __builtin_memcpy(to + i, from + i, (n - i) * sizeof(T));
#else
  __builtin_memcpy(to, from, n * sizeof(T));
#endif
}

NORMFUSED_INLINE void flush() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// value as it would be read back after a store: what native's separate BatchNorm hands to the activation.
template <class T, class V>
NORMFUSED_INLINE V rounded(V value) {
  if constexpr (sizeof(T) == sizeof(typename Lanes<V>::type)) {
    return value;
  } else if constexpr (Lanes<V>::kCount == 1) {
    return widen_one(narrow_one<T>(value));
  } else if constexpr (kConvertsHalf && kIsHalf<T>) {
    return widen_half(narrow_half(value));
  } else if constexpr (kConvertsBFloat16 && kIsBFloat16<T>) {
    return widen_bfloat16(narrow_bfloat16(value));
  } else {
    return widen<V>(narrow<Vector<uint32_t>>(value, T{}), T{});
  }
}

}  // namespace
}  // namespace normfused
