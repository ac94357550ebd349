// Vectors as wide as the instruction set that is compiled for. Loops over n elements run on whole vectors, the last of
// which overlaps the one before it where n is not a multiple, and on single values where not even one is filled.
#pragma once

#include <cstdint>

#include "../lanes.h"

// Set with the target. (GCC 12 does not define __AVX2__ and the like for a target that a pragma sets.)
#ifndef NORMFUSED_VECTOR_BYTES
#define NORMFUSED_VECTOR_BYTES 16
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace normfused {
namespace {

constexpr int kVectorBytes = NORMFUSED_VECTOR_BYTES;

// kCount values of type A.
template <class A, int kCount>
struct VectorOf {
  typedef A type __attribute__((vector_size(kCount * sizeof(A))));
};
template <class A>
using Vector = typename VectorOf<A, kVectorBytes / sizeof(A)>::type;

// clang-format off
template <>
struct Lanes<Vector<float>> {
  using type = float;
  using integer = Vector<int32_t>;
  static constexpr int kCount = kVectorBytes / 4;

  using V = Vector<float>;
  // Subtracting a zero changes nothing, not even -0.
  NORMFUSED_INLINE static V constant(float value) { return value - V{}; }
  NORMFUSED_INLINE static integer to_integer(V v) { return __builtin_convertvector(v, integer); }
  // One instruction each on x86, with the operands in the order that keeps a NaN; GCC does not find it by itself.
#if NORMFUSED_VECTOR_BYTES == 64
  // value * 2^n for integral n, rounded once.
  static constexpr bool kScales = true;
  NORMFUSED_INLINE static V scale(V value, V n) {
    return V(_mm512_maskz_scalef_ps(0xffff, __m512(value), __m512(n)));
  }
  NORMFUSED_INLINE static V at_least(V bound, V b) { return V(_mm512_maskz_max_ps(0xffff, __m512(bound), __m512(b))); }
  NORMFUSED_INLINE static V at_most(V bound, V b) { return V(_mm512_maskz_min_ps(0xffff, __m512(bound), __m512(b))); }
#elif NORMFUSED_VECTOR_BYTES == 32
  NORMFUSED_INLINE static V at_least(V bound, V b) { return V(_mm256_max_ps(__m256(bound), __m256(b))); }
  NORMFUSED_INLINE static V at_most(V bound, V b) { return V(_mm256_min_ps(__m256(bound), __m256(b))); }
#elif defined(__SSE2__)
  NORMFUSED_INLINE static V at_least(V bound, V b) { return V(_mm_max_ps(__m128(bound), __m128(b))); }
  NORMFUSED_INLINE static V at_most(V bound, V b) { return V(_mm_min_ps(__m128(bound), __m128(b))); }
#else
  NORMFUSED_INLINE static V at_least(V bound, V b) { return bound > b ? bound : b; }
  NORMFUSED_INLINE static V at_most(V bound, V b) { return bound < b ? bound : b; }
#endif
#if NORMFUSED_VECTOR_BYTES != 64
  static constexpr bool kScales = false;
  NORMFUSED_INLINE static V scale(V value, V) { return value; }
#endif
};
// clang-format on

template <>
struct Lanes<Vector<double>> {
  using type = double;
  using integer = Vector<int64_t>;
  static constexpr int kCount = kVectorBytes / 8;

  using V = Vector<double>;
  NORMFUSED_INLINE static V constant(double value) { return value - V{}; }
  NORMFUSED_INLINE static V at_least(V bound, V b) { return bound > b ? bound : b; }
  NORMFUSED_INLINE static V at_most(V bound, V b) { return bound < b ? bound : b; }
  template <class F>
  NORMFUSED_INLINE static V each(V v, F f) {
    for (int i = 0; i < kCount; ++i) v[i] = f(v[i]);
    return v;
  }
};

// T without reference and const.
template <class T>
struct Plain {
  using type = T;
};
template <class T>
struct Plain<T&> : Plain<T> {};
template <class T>
struct Plain<const T> : Plain<T> {};
template <class T>
using lane_type = typename Plain<T>::type;

template <class A>
constexpr int kLanes = Lanes<Vector<A>>::kCount;

// Which of a vector's lanes a loop counts: all of them, or the last ones where it overlaps the vector before it. Called
// with a vector, it makes the others 0.
struct AllLanes {
  template <class V>
  NORMFUSED_INLINE V operator()(V v) const {
    return v;
  }
};
template <class A>
class LastLanes {
  using V = Vector<A>;
  using Int = typename Lanes<V>::integer;

 public:
  NORMFUSED_INLINE explicit LastLanes(int64_t n) {
    Int lane;
    for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
    counted_ = lane >= static_cast<typename Lanes<A>::integer>(kLanes<A> - n) - Int{};
  }
  NORMFUSED_INLINE V operator()(V v) const { return counted_ ? v : V{}; }

 private:
  Int counted_;
};

// f(first element, V{}, lanes to count) over n elements, where V is a vector or A.
template <class A, class F>
NORMFUSED_INLINE void for_each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, Vector<A>{}, AllLanes{});
  if (i == n) return;
  if (i > 0) return f(n - kLanes<A>, Vector<A>{}, LastLanes<A>(n - i));
  for (; i < n; ++i) f(i, A{}, AllLanes{});
}

// f(first element, V{}), where it does no harm to see elements twice.
template <class A, class F>
NORMFUSED_INLINE void for_each_vector_overlapping(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, Vector<A>{});
  if (i == n) return;
  if (i > 0) return f(n - kLanes<A>, Vector<A>{});
  for (; i < n; ++i) f(i, A{});
}

// The sum of a vector's lanes, halves added to halves.
template <class A, int kCount>
NORMFUSED_INLINE A sum_of_lanes(const typename VectorOf<A, kCount>::type& v) {
  if constexpr (kCount == 2) {
    return v[0] + v[1];
  } else {
    using Half = typename VectorOf<A, kCount / 2>::type;
    Half low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return sum_of_lanes<A, kCount / 2>(low + high);
  }
}

}  // namespace
}  // namespace normfused
