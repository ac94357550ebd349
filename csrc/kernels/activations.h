// Every activation of both families, written once: forward(z) and backward(z, dy), the gradient of z. V is float or
// double, or on the CPU a vector of them.
//
// Comparisons are ordered so that a NaN z comes out as NaN and lets dy pass, -0.0 stays -0.0, and the gradient over a
// dead region is selected (an infinite dy there gives 0), never multiplied.
//
// Native rounds z to the tensors' dtype before its activation sees it. kSelects: forward gives z or a constant that
// every dtype represents, so that rounding may come after; backward then takes `rounding`, whose kZero is the greatest
// z that rounds to zero and kSix the least that rounds to six. The others are given a z that is rounded already.
// kExponential: takes an exponential, which costs more than all the rest.
#pragma once

#include "exponential.h"
#include "lanes.h"

// Internal linkage: these are compiled once per instruction set, and the linker must not share one copy.
namespace normfused {
namespace {

struct Identity {
  static constexpr bool kSelects = true, kExponential = false;
  template <class V>
  NORMFUSED_INLINE static V forward(V z) {
    return z;
  }
  template <class V, class Rounding>
  NORMFUSED_INLINE static V backward(V, V dy, Rounding) {
    return dy;
  }
};

struct ReLU {
  static constexpr bool kSelects = true, kExponential = false;
  template <class V>
  NORMFUSED_INLINE static V forward(V z) {
    return Lanes<V>::at_least(constant<V>(0), z);
  }
  template <class V, class Rounding>
  NORMFUSED_INLINE static V backward(V z, V dy, Rounding rounding) {
    return z <= constant<V>(rounding.kZero) ? constant<V>(0) : dy;
  }
};

struct ReLU6 {
  static constexpr bool kSelects = true, kExponential = false;
  template <class V>
  NORMFUSED_INLINE static V forward(V z) {
    return Lanes<V>::at_least(constant<V>(0), Lanes<V>::at_most(constant<V>(6), z));
  }
  template <class V, class Rounding>
  NORMFUSED_INLINE static V backward(V z, V dy, Rounding rounding) {
    const V below = z >= constant<V>(rounding.kSix) ? constant<V>(0) : dy;
    return z <= constant<V>(rounding.kZero) ? constant<V>(0) : below;
  }
};

struct Sigmoid {
  static constexpr bool kSelects = false, kExponential = true;
  template <class V>
  NORMFUSED_INLINE static V forward(V z) {
    return constant<V>(1) / (constant<V>(1) + exponential(-z));
  }
  template <class V, class Rounding>
  NORMFUSED_INLINE static V backward(V z, V dy, Rounding) {
    // s (1 - s) without the difference, which is 0 from z = 17 on in float; even in z.
    const V e = exponential(z < constant<V>(0) ? z : -z), s = constant<V>(1) / (constant<V>(1) + e);
    return dy * (e * s * s);
  }
};

struct SiLU {
  static constexpr bool kSelects = false, kExponential = true;
  template <class V>
  NORMFUSED_INLINE static V forward(V z) {
    return z / (constant<V>(1) + exponential(-z));
  }
  template <class V, class Rounding>
  NORMFUSED_INLINE static V backward(V z, V dy, Rounding) {
    const V s = Sigmoid::forward(z);
    return dy * (s * (constant<V>(1) + z * (constant<V>(1) - s)));
  }
};

struct Hardswish {
  static constexpr bool kSelects = false, kExponential = false;
  template <class V>
  NORMFUSED_INLINE static V forward(V z) {
    return z * ReLU6::forward(z + constant<V>(3)) / constant<V>(6);
  }
  template <class V, class Rounding>
  NORMFUSED_INLINE static V backward(V z, V dy, Rounding) {
    const V middle = z < constant<V>(3) ? dy * (z / constant<V>(3) + constant<V>(0.5)) : dy;
    return z <= constant<V>(-3) ? constant<V>(0) : middle;
  }
};

struct LeakyReLU {
  static constexpr bool kSelects = false, kExponential = false;
  template <class V>
  NORMFUSED_INLINE static V forward(V z) {
    return z <= constant<V>(0) ? z * constant<V>(0.01) : z;
  }
  template <class V, class Rounding>
  NORMFUSED_INLINE static V backward(V z, V dy, Rounding) {
    return z <= constant<V>(0) ? dy * constant<V>(0.01) : dy;
  }
};

}  // namespace
}  // namespace normfused
