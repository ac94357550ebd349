// Every activation of both families, written once: forward(z) and backward(z, dy), the gradient of z.
//
// Comparisons are ordered so that a NaN z comes out as NaN and lets dy pass, -0.0 stays -0.0, and the gradient over a
// dead region is selected (an infinite dy there gives 0), never multiplied.
//
// kSelects: forward gives z itself or a constant that every dtype represents, so that nothing is left to round.
#pragma once

#include "exponential.h"
#include "inline.h"

// Internal linkage: these are compiled once per instruction set, and the linker must not share one copy.
namespace normfused {
namespace {

struct Identity {
  static constexpr bool kSelects = true;
  template <class A>
  NORMFUSED_INLINE static A forward(A z) {
    return z;
  }
  template <class A>
  NORMFUSED_INLINE static A backward(A, A dy) {
    return dy;
  }
};

struct ReLU {
  static constexpr bool kSelects = true;
  template <class A>
  NORMFUSED_INLINE static A forward(A z) {
    return z < A(0) ? A(0) : z;
  }
  template <class A>
  NORMFUSED_INLINE static A backward(A z, A dy) {
    return z <= A(0) ? A(0) : dy;
  }
};

struct ReLU6 {
  static constexpr bool kSelects = true;
  template <class A>
  NORMFUSED_INLINE static A forward(A z) {
    const A below = z > A(6) ? A(6) : z;
    return below < A(0) ? A(0) : below;
  }
  template <class A>
  NORMFUSED_INLINE static A backward(A z, A dy) {
    const A below = z >= A(6) ? A(0) : dy;
    return z <= A(0) ? A(0) : below;
  }
};

struct Sigmoid {
  static constexpr bool kSelects = false;
  template <class A>
  NORMFUSED_INLINE static A forward(A z) {
    return A(1) / (A(1) + exponential(-z));
  }
  template <class A>
  NORMFUSED_INLINE static A backward(A z, A dy) {
    const A s = forward(z);
    return dy * (s * (A(1) - s));
  }
};

struct SiLU {
  static constexpr bool kSelects = false;
  template <class A>
  NORMFUSED_INLINE static A forward(A z) {
    return z / (A(1) + exponential(-z));
  }
  template <class A>
  NORMFUSED_INLINE static A backward(A z, A dy) {
    const A s = Sigmoid::forward(z);
    return dy * (s * (A(1) + z * (A(1) - s)));
  }
};

struct Hardswish {
  static constexpr bool kSelects = false;
  template <class A>
  NORMFUSED_INLINE static A forward(A z) {
    return z * ReLU6::forward(z + A(3)) / A(6);
  }
  template <class A>
  NORMFUSED_INLINE static A backward(A z, A dy) {
    const A middle = z < A(3) ? dy * (z / A(3) + A(0.5)) : dy;
    return z <= A(-3) ? A(0) : middle;
  }
};

struct LeakyReLU {
  static constexpr bool kSelects = false;
  template <class A>
  NORMFUSED_INLINE static A forward(A z) {
    return z <= A(0) ? z * A(0.01) : z;
  }
  template <class A>
  NORMFUSED_INLINE static A backward(A z, A dy) {
    return z <= A(0) ? dy * A(0.01) : dy;
  }
};

}  // namespace
}  // namespace normfused
