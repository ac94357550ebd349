// Where CUDA kernels run. The emulator has an implementation of its own, over CPU tensors.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace normfused::binding::device {

// Makes the device of x the current one for its lifetime, and knows the stream that is current there.
class CurrentStream {
 public:
  explicit CurrentStream(const torch::stable::Tensor& x);
  void* get() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

}  // namespace normfused::binding::device
