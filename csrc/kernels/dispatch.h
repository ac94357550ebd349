// From run-time enums to types, by generic lambdas.
#pragma once

#include "activations.h"
#include "types.h"

namespace normfused {
namespace {

// Calls f(Act{}) with the functor of the activation.
template <class F>
auto dispatch_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::relu: return f(ReLU{});
    case Activation::relu6: return f(ReLU6{});
    case Activation::silu: return f(SiLU{});
    case Activation::hardswish: return f(Hardswish{});
    case Activation::sigmoid: return f(Sigmoid{});
    case Activation::leaky_relu: return f(LeakyReLU{});
    case Activation::identity: break;
  }
  return f(Identity{});
}

}  // namespace
}  // namespace normfused
