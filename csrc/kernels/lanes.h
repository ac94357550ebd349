// Arithmetic that is written once, for a single value and for a vector of them (the vector extension of GCC and Clang,
// whose operators and ?: work lane by lane).
#pragma once

#include <cstdint>

#include "inline.h"

// Internal linkage: these are compiled once per instruction set, and the linker must not share one copy.
namespace normfused {
namespace {

// V as one value or as a vector: its lanes and the types that go with them. cpu/vector.h adds the vectors.
template <class V>
struct Lanes;

template <class A, class Int>
struct SingleLane {
  using type = A;       // of a lane
  using integer = Int;  // as many signed integers of the same size
  static constexpr int kCount = 1;

  NORMFUSED_INLINE static A constant(A value) { return value; }
  // b, or the bound that it is beyond. A NaN stays NaN, -0 stays -0.
  NORMFUSED_INLINE static A at_least(A bound, A b) { return bound > b ? bound : b; }
  NORMFUSED_INLINE static A at_most(A bound, A b) { return bound < b ? bound : b; }
  static constexpr bool kScales = false;
  NORMFUSED_INLINE static A scale(A value, A) { return value; }
  NORMFUSED_INLINE static Int to_integer(A value) { return static_cast<Int>(value); }
  template <class F>
  NORMFUSED_INLINE static A each(A value, F f) {
    return f(value);
  }
};
template <>
struct Lanes<float> : SingleLane<float, int32_t> {};
template <>
struct Lanes<double> : SingleLane<double, int64_t> {};

// The value in every lane.
template <class V>
NORMFUSED_INLINE V constant(typename Lanes<V>::type value) {
  return Lanes<V>::constant(value);
}

}  // namespace
}  // namespace normfused
