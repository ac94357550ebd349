// Argument checks and tensor plumbing that all operators share. Errors name the argument and its value.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../kernels/types.h"

namespace normfused::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws "normfused::op: <parts>" unless ok.
template <class... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (ok) [[likely]] {
    return;
  }
  std::ostringstream message;
  message << "normfused::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A tensor's shape or device in a message; formatted only when the message is.
struct shape_of {
  const Tensor& tensor;
  explicit shape_of(const Tensor& t) : tensor(t) {}
};

inline std::ostream& operator<<(std::ostream& out, const shape_of& shape) {
  out << "(";
  for (int64_t d = 0; d < shape.tensor.dim(); ++d) out << (d ? ", " : "") << shape.tensor.size(d);
  return out << ")";
}

struct device_of {
  const Tensor& tensor;
  explicit device_of(const Tensor& t) : tensor(t) {}
};

inline std::ostream& operator<<(std::ostream& out, const device_of& device) {
  if (device.tensor.is_cpu()) return out << "cpu";
  return out << (device.tensor.is_cuda() ? "cuda:" : "device ") << device.tensor.get_device_index();
}

template <class Name>
Activation parse_activation(const char* op, const char* argument, const std::optional<Name>& name) {
  if (!name) return Activation::identity;
  if (*name == "relu6") return Activation::relu6;
  if (*name == "relu") return Activation::relu;
  if (*name == "silu") return Activation::silu;
  if (*name == "hardswish") return Activation::hardswish;
  if (*name == "sigmoid") return Activation::sigmoid;
  if (*name == "leaky_relu") return Activation::leaky_relu;
  check(false, op, argument, " must be relu, relu6, silu, hardswish, sigmoid, leaky_relu or None, got '", *name, "'");
  return Activation::identity;
}

// What counts as the memory format of a tensor that is dense in both: PyTorch's batch_norm takes it for contiguous, its
// group_norm goes by the strides.
enum class Ambiguous { contiguous, by_strides };

// x, seen as N x C x S in the memory format it has; copied only if it is dense in neither.
struct Input {
  Tensor tensor;
  ScalarType scalar_type;
  Dtype dtype;
  Extent extent;
  bool channels_last;

  Input(const char* op, const char* argument, const Tensor& x, Ambiguous ambiguous);

  // The dtype of statistics and per-channel arithmetic.
  ScalarType statistics_type() const { return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float; }
  // A fresh tensor of this shape, dtype and memory format.
  Tensor empty_like() const;
  // An output of this dtype that the caller did not ask for.
  Tensor empty_output() const;
  // A fresh vector or matrix of the statistics' dtype.
  Tensor empty_statistics(int64_t n) const;
  Tensor empty_statistics(int64_t n, int64_t m) const;
  // t, which must have this shape and dtype, in this memory format.
  Tensor match(const char* op, const char* argument, const Tensor& t) const;
};

// Two per-channel arguments that the kernels take as arrays of one dtype.
class ChannelArrays {
 public:
  ChannelArrays(const char* op, const char* first_argument, const OptionalTensor& first, const char* second_argument,
                const OptionalTensor& second, const Input& input, bool may_be_narrow = true);

  // Null if the argument is None.
  void* first() const { return first_.data; }
  void* second() const { return second_.data; }
  // The arrays have x's own 16-bit dtype; otherwise that of the statistics.
  bool narrow() const { return narrow_; }
  // Brings what the kernel wrote back into the tensors, where it wrote into copies.
  void write_back() const;

 private:
  struct Array {
    OptionalTensor tensor, copy;
    void* data = nullptr;
  };
  Array array(const char* op, const char* argument, const OptionalTensor& t, const Input& input) const;

  bool narrow_;
  Array first_, second_;
};

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType scalar_type,
                     const Tensor& like);
Tensor empty_vector(int64_t n, ScalarType scalar_type, const Tensor& like);

// num_batches_tracked must be one int64 on the device of x.
void check_count(const char* op, const Tensor& num_batches_tracked, const Tensor& x);

// argument must be on the device of x.
void check_device(const char* op, const char* argument, const Tensor& t, const Tensor& x);

}  // namespace normfused::binding
