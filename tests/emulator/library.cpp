// normfused_emulated::*: the CUDA operators over CPU tensors, through the binding that a GPU gets.
#include "../../csrc/torch/cuda/launch_path.h"
#include "../../csrc/torch/cuda/stream.h"
#include "../../csrc/torch/device.h"

namespace normfused::binding {
namespace device {

const char* const kType = "cpu";
const char* const kOutOfMemory = "CUDA out of memory.";

bool holds(const Tensor& t) { return t.is_cpu(); }

CurrentStream::CurrentStream(const Tensor&) {}

}  // namespace device

STABLE_TORCH_LIBRARY(normfused_emulated, m) {
  define_operators(m);
  define_launch_path(m);
}

STABLE_TORCH_LIBRARY_IMPL(normfused_emulated, CompositeExplicitAutograd, m) { implement_launch_path(m); }

STABLE_TORCH_LIBRARY_IMPL(normfused_emulated, CPU, m) { implement_operators(m); }

}  // namespace normfused::binding
