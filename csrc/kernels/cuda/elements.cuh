// Which elements a thread of a pass works on, and what is done to an element.
#pragma once

#include "../activations.h"
#include "stages.h"
#include "vector.cuh"

namespace normfused::cuda {

// --- Elements --------------------------------------------------------------------------------------------------------

// Bounds of what rounds to a constant; see activations.h.
template <class T>
struct Rounding {
  static constexpr Accumulator<T> kZero = 0, kSix = 6;
};
template <>
struct Rounding<BFloat16> {
  static constexpr float kZero = 0x1p-134f, kSix = 6 - 0x1p-6f;
};
template <>
struct Rounding<Float16> {
  static constexpr float kZero = 0x1p-25f, kSix = 6 - 0x1p-9f;
};

// Activations chosen at run time: where speed is not worth a kernel of its own. Only these kernels know a
// pre_activation.
struct AnyActivation {};

template <class F>
__device__ __forceinline__ auto with_activation(Activation activation, F f) {
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

template <class Act, class T, class A>
__device__ __forceinline__ T activate(A z, Activation activation) {
  if constexpr (std::is_same_v<Act, AnyActivation>) {
    return with_activation(activation, [&](auto act) { return activate<decltype(act), T>(z, activation); });
  } else {
    if constexpr (!Act::kSelects) z = to_accumulator(from_accumulator<T>(z));
    return from_accumulator<T>(Act::forward(z));
  }
}

// The gradient of z.
template <class Act, class T, class A>
__device__ __forceinline__ A activate_backward(A z, A dy, Activation activation) {
  if constexpr (std::is_same_v<Act, AnyActivation>) {
    return with_activation(activation,
                           [&](auto act) { return activate_backward<decltype(act), T>(z, dy, activation); });
  } else {
    if constexpr (!Act::kSelects) z = to_accumulator(from_accumulator<T>(z));
    return Act::backward(z, dy, Rounding<T>{});
  }
}

// Element v of x as it is normalised.
template <class Act, class T>
__device__ __forceinline__ Accumulator<T> input(const Stage<T>& s, T x) {
  if constexpr (std::is_same_v<Act, AnyActivation>) {
    if (s.pre_activation != Activation::identity) {
      x = activate<AnyActivation, T>(Accumulator<T>(to_accumulator(x)), s.pre_activation);
    }
  }
  return to_accumulator(x);
}

// The gradient of x, given that of what input() makes of it.
template <class Act, class T>
__device__ __forceinline__ Accumulator<T> input_backward(const Stage<T>& s, T x, Accumulator<T> dx) {
  if constexpr (std::is_same_v<Act, AnyActivation>) {
    if (s.pre_activation != Activation::identity) {
      return activate_backward<AnyActivation, T>(Accumulator<T>(to_accumulator(x)), dx, s.pre_activation);
    }
  }
  return dx;
}

// An element of a per-channel array, A or of the 16-bit type that A computes.
template <class A>
__device__ __forceinline__ A load_channel(const void* array, Dtype dtype, int64_t channel) {
  if (dtype == Dtype::bfloat16) return to_accumulator(static_cast<const BFloat16*>(array)[channel]);
  if (dtype == Dtype::float16) return to_accumulator(static_cast<const Float16*>(array)[channel]);
  return static_cast<const A*>(array)[channel];
}

__device__ __forceinline__ void store_channel(void* array, Dtype dtype, int64_t channel, double value) {
  const auto single = static_cast<float>(value);
  switch (dtype) {
    case Dtype::float64: static_cast<double*>(array)[channel] = value; break;
    case Dtype::float32: static_cast<float*>(array)[channel] = single; break;
    case Dtype::bfloat16: static_cast<BFloat16*>(array)[channel] = from_accumulator<BFloat16>(single); break;
    case Dtype::float16: static_cast<Float16*>(array)[channel] = from_accumulator<Float16>(single); break;
  }
}

template <class A>
struct ChannelParameters {
  A mean, invstd, weight, scale, bias;

  // The same operations everywhere: the backward must find the forward's z, to the bit.
  __device__ __forceinline__ A z(A x) const { return fma(x - mean, scale, bias); }
};

template <class A>
struct GradientCoefficients {
  A offset, slope;
  bool through_statistics;

  __device__ __forceinline__ A dx(A x, A dz, const ChannelParameters<A>& p) const {
    return p.invstd * (dz * p.weight - (offset + (x - p.mean) * p.invstd * slope));
  }
};

template <class T, class A = Accumulator<T>>
__device__ __forceinline__ ChannelParameters<A> channel_parameters(const Stage<T>& s, A mean, A invstd,
                                                                   int64_t channel) {
  const A weight = s.weight ? load_channel<A>(s.weight, s.parameter_dtype, channel) : A(1);
  const A bias = s.bias ? load_channel<A>(s.bias, s.parameter_dtype, channel) : A(0);
  return {mean, invstd, weight, invstd * weight, bias};
}

template <class T, class A = Accumulator<T>>
__device__ __forceinline__ ChannelParameters<A> load_parameters(const Stage<T>& s, int64_t matrix, int64_t channel) {
  const int64_t unit = matrix * s.groups + channel / s.depth();
  return channel_parameters<T>(s, s.mean[unit], s.invstd[unit], channel);
}

template <class T, class A = Accumulator<T>>
__device__ __forceinline__ GradientCoefficients<A> load_coefficients(const Stage<T>& s, int64_t matrix,
                                                                     int64_t channel) {
  if (s.offset == nullptr) return {0, 0, false};
  const int64_t unit = matrix * s.groups + channel / s.depth();
  return {s.offset[unit], s.slope[unit], true};
}

// --- Blocks ----------------------------------------------------------------------------------------------------------

// What a block works on: a tile of channels of a matrix, in a part of its rows.
struct BlockWork {
  int64_t matrix, channel, tile_channels, split;
};

// backwards: the last elements first, which the pass before has left in L2.
template <class T>
__device__ __forceinline__ BlockWork block_work(const Stage<T>& s, bool backwards) {
  const int64_t channels = s.chunk.groups * s.depth(), first = s.chunk.group * s.depth();
  const int64_t tiles = s.pass.tiles(channels);
  const unsigned x = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const unsigned y = backwards ? gridDim.y - 1 - blockIdx.y : blockIdx.y;
  const int64_t tile = x % tiles, size = s.pass.shape == Shape::planes ? 1 : s.pass.tile_channels;
  return {s.chunk.matrix + x / tiles, first + tile * size, min(size, channels - tile * size), y};
}

// --- Planes ----------------------------------------------------------------------------------------------------------

// Elements [offset + first, offset + last); all V of them at an aligned address if `whole`.
struct Slot {
  int64_t offset = 0;
  int first = 0, last = 0;
  bool whole = false;
  int64_t row = 0;
};

template <int V, class T>
__device__ __forceinline__ Vector<T, V> load_slot(const T* base, const Slot& slot) {
  if (slot.whole) return load_vector<V>(base + slot.offset);
  Vector<T, V> vector = {};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (v >= slot.first && v < slot.last) vector.values[v] = base[slot.offset + v];
  }
  return vector;
}

template <int V, class T>
__device__ __forceinline__ void store_slot(T* base, const Slot& slot, const Vector<T, V>& vector) {
  if (slot.whole) return store_vector(base + slot.offset, vector);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (v >= slot.first && v < slot.last) base[slot.offset + v] = vector.values[v];
  }
}

// Slot `index` of the row that begins at `start`.
template <int V>
__device__ __forceinline__ Slot slot_of(const Pass& pass, int64_t start, int64_t index) {
  // The first slot of a row begins before it where the row is not aligned.
  const int64_t inside = index * V - (pass.aligned ? start % V : 0);
  const int64_t first = max(-inside, int64_t(0)), last = min(pass.view.group - inside, int64_t(V));
  return {start + inside, static_cast<int>(first), static_cast<int>(last), pass.aligned && first == 0 && last == V};
}

// f(slots, index) for this thread's slots of a block, kBatch at a time; those that are not there are empty.
// index is the first one's among those of the block, the others are blockDim.x apart.
template <int V, int kBatch, class F>
__device__ __forceinline__ void for_each_slot(const Pass& pass, const BlockWork& work, F f) {
  const View& view = pass.view;
  const int64_t length = view.group, row_stride = view.channels * length;
  const int64_t base = work.matrix * view.rows * row_stride + work.channel * length;
  const int64_t begin = work.split * pass.per_split;
  const int64_t end = min(begin + pass.per_split, view.rows * pass.slots_per_row);
  int64_t row = (begin + threadIdx.x) / pass.slots_per_row;
  int64_t index = (begin + threadIdx.x) % pass.slots_per_row;
  const int64_t row_step = blockDim.x / pass.slots_per_row, index_step = blockDim.x % pass.slots_per_row;
  for (int64_t i = begin + threadIdx.x; i < end; i += kBatch * blockDim.x) {
    Slot slots[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (i + u * blockDim.x < end) {
        slots[u] = slot_of<V>(pass, base + row * row_stride, index);
        slots[u].row = row;
      }
      row += row_step;
      index += index_step;
      if (index >= pass.slots_per_row) {
        index -= pass.slots_per_row;
        ++row;
      }
    }
    f(slots, static_cast<int>(i - begin));
  }
}

// --- Columns ---------------------------------------------------------------------------------------------------------

// A thread's V adjacent columns of a tile, and its rows.
template <int V>
struct Columns {
  int64_t base, row_stride, row, end;
  int row_step, column, row_group;
  int64_t channel[V];
  bool active;

  __device__ __forceinline__ Columns(const Pass& pass, const BlockWork& work) {
    const View& view = pass.view;
    const int group = static_cast<int>(view.group);
    row_stride = view.channels * view.group;
    row_group = threadIdx.x / pass.tile_vectors;
    column = threadIdx.x % pass.tile_vectors * V;
    base = work.matrix * view.rows * row_stride + work.channel * view.group + column;
    row_step = pass.row_groups;
    row = work.split * pass.per_split + row_group;
    end = min((work.split + 1) * pass.per_split, view.rows);
    active = row_group < pass.row_groups && column < work.tile_channels * view.group;
#pragma unroll
    for (int v = 0; v < V; ++v) channel[v] = work.channel + (column + v) / group;
  }

  __device__ __forceinline__ int64_t offset(int64_t r) const { return base + r * row_stride; }
};

// Rows that a row group of a block has.
__device__ __forceinline__ int64_t rows_of(const Pass& pass, const BlockWork& work, int row_group) {
  const int64_t begin = work.split * pass.per_split + row_group;
  const int64_t end = min((work.split + 1) * pass.per_split, pass.view.rows);
  return end > begin ? (end - begin + pass.row_groups - 1) / pass.row_groups : 0;
}

// f(row, K) for this thread's rows, K = kBatch of them at a time, row_step apart, and then one by one.
template <int kBatch, int V, class F>
__device__ __forceinline__ void for_each_row(const Columns<V>& c, F f) {
  if (!c.active) return;
  const int64_t step = c.row_step;
  int64_t row = c.row;
  for (; row + (kBatch - 1) * step < c.end; row += kBatch * step) f(row, std::integral_constant<int, kBatch>{});
  for (; row < c.end; row += step) f(row, std::integral_constant<int, 1>{});
}

// --- Vectors -------------------------------------------------------------------------------------------------------

// y at element v of vectors.
template <class Act, class T, class A, int V>
__device__ __forceinline__ T output(const Stage<T>& s, const ChannelParameters<A>& p, const Vector<T, V>& x,
                                    const Vector<T, V>& residual, int v) {
  A z = p.z(input<Act>(s, x.values[v]));
  if (s.residual) z += to_accumulator(residual.values[v]);
  return activate<Act, T>(z, s.activation);
}

// The gradient of z at element v of vectors.
template <class Act, class T, class A, int V>
__device__ __forceinline__ A gradient(const Stage<T>& s, const ChannelParameters<A>& p, const Vector<T, V>& x,
                                      const Vector<T, V>& dy, const Vector<T, V>& residual, int v) {
  A z = p.z(input<Act>(s, x.values[v]));
  if (s.residual) z += to_accumulator(residual.values[v]);
  return activate_backward<Act, T>(z, A(to_accumulator(dy.values[v])), s.activation);
}

// Puts dx in the place of x, and dz in the place of dy, at element v.
template <class Act, class T, class A, int V>
__device__ __forceinline__ void differentiate(const Stage<T>& s, const ChannelParameters<A>& p,
                                              const GradientCoefficients<A>& coefficients, Vector<T, V>& x,
                                              Vector<T, V>& dy, const Vector<T, V>& residual, int v) {
  const A dz = gradient<Act>(s, p, x, dy, residual, v);
  const A dx = coefficients.through_statistics ? coefficients.dx(input<Act>(s, x.values[v]), dz, p) : dz * p.scale;
  x.values[v] = from_accumulator<T>(input_backward<Act>(s, x.values[v], dx));
  dy.values[v] = from_accumulator<T>(dz);
}

}  // namespace normfused::cuda
