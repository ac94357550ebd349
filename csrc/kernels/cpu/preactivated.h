// Elements that an activation acts on as they are read: pre_activation(x) is in registers only, in memory is x itself.
#pragma once

#include "../activations.h"
#include "storage.h"

namespace normfused {
namespace {

// In memory a T; what load gives of it is Pre::forward of the value there.
template <class T, class Pre>
struct Preactivated {
  static_assert(Pre::kSelects, "what is loaded must be a T: nothing rounds it");
  T stored;
};

template <class T, class Pre>
struct Arithmetic<Preactivated<T, Pre>> : Arithmetic<T> {};

template <class X>
struct Element {
  using type = X;
};
template <class T, class Pre>
struct Element<Preactivated<T, Pre>> {
  using type = T;
};
// What an X is in memory.
template <class X>
using element_t = typename Element<X>::type;

template <class X>
NORMFUSED_INLINE const X* read_as(const element_t<X>* stored) {
  return reinterpret_cast<const X*>(stored);
}

template <class V, class T, class Pre>
NORMFUSED_INLINE V load(const Preactivated<T, Pre>* x) {
  return Pre::forward(load<V>(&x->stored));
}

// The gradient of what is in memory at x, where that of what load gives is g.
template <class T, class V>
NORMFUSED_INLINE V gradient_of_stored(const T*, V g) {
  return g;
}
template <class T, class Pre, class V>
NORMFUSED_INLINE V gradient_of_stored(const Preactivated<T, Pre>* x, V g) {
  return Pre::backward(load<V>(&x->stored), g, Rounding<T>{});
}

}  // namespace
}  // namespace normfused
