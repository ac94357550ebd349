// Launches of a stage: which kernel serves an activation and a shape.
#pragma once

#include "elements.cuh"

namespace normfused::cuda {
namespace {

// f(Act{}): kernels of their own for what is frequent.
template <class T, class F>
Status dispatch(const Stage<T>& s, F f) {
  if (s.pre_activation != Activation::identity) return f(AnyActivation{});
  switch (s.activation) {
    case Activation::identity: return f(Identity{});
    case Activation::relu: return f(ReLU{});
    case Activation::relu6: return f(ReLU6{});
    case Activation::silu: return f(SiLU{});
    default: return f(AnyActivation{});
  }
}

template <class T, class Kernel>
Status launch_stage(Kernel kernel, const Stage<T>& s, bool reduces, const char* name, void* stream) {
  LaunchConfig config = pass_config(s.pass, s.chunk, s.groups, name);
  config.shared_bytes = reduces ? s.pass.reduce_bytes : 0;
  return launch(kernel, config, stream, s);
}

// Element by element, and in float64, the activation is chosen at run time.
template <class T, class Planes, class Columns>
Status launch_activation(const Stage<T>& s, bool reduces, const char* const (&names)[3], Planes planes, Columns columns,
                         void* stream) {
  if (s.pass.shape == Shape::columns && s.pass.vector == 1) {
    return launch_stage(columns(AnyActivation{}, std::integral_constant<int, 1>{}), s, reduces, names[2], stream);
  }
  const auto launch_with = [&](auto act) {
    if (s.pass.shape == Shape::planes) return launch_stage(planes(act), s, reduces, names[0], stream);
    return launch_stage(columns(act, std::integral_constant<int, 16 / sizeof(T)>{}), s, reduces, names[1], stream);
  };
  if constexpr (sizeof(T) == 8) {
    return launch_with(AnyActivation{});
  } else {
    return dispatch(s, launch_with);
  }
}

}  // namespace
}  // namespace normfused::cuda
