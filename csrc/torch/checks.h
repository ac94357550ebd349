// Argument checks and tensor plumbing that all operators share. Errors name the argument and its value.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

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

// A tensor's shape in a message; formatted only when the message is.
struct shape_of {
  const Tensor& tensor;
  explicit shape_of(const Tensor& t) : tensor(t) {}
};

inline std::ostream& operator<<(std::ostream& out, const shape_of& shape) {
  out << "(";
  for (int64_t d = 0; d < shape.tensor.dim(); ++d) out << (d ? ", " : "") << shape.tensor.size(d);
  return out << ")";
}

inline Activation parse_activation(const char* op, const char* argument, const std::optional<std::string>& name) {
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

// A per-channel argument as an array of the statistics' dtype: the tensor's own memory where it is one already,
// otherwise a converted copy.
class ChannelArray {
 public:
  ChannelArray(const char* op, const char* argument, const OptionalTensor& t, const Input& input);

  // Null if the argument is None.
  void* data() const { return data_; }
  // Brings what the kernel wrote back into the tensor, if it wrote into a copy.
  void write_back() const;

 private:
  OptionalTensor tensor_;
  std::vector<double> copy_;  // holds float or double
  bool wide_ = false;
  void* data_ = nullptr;
};

// Memory for a kernel's partial sums.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(bytes ? new double[bytes / sizeof(double) + 1] : nullptr) {}
  void* data() const { return memory_.get(); }

 private:
  std::unique_ptr<double[]> memory_;
};

// torch's thread pool, as the kernels want it.
void parallel_for(int64_t tasks, ParallelBody body, void* context);

}  // namespace normfused::binding
