// For the declaration of aoti_torch_get_current_cuda_stream.
#define USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../device.h"
#include "stream.h"

namespace normfused::binding::device {

const char* const kType = "cuda";
const char* const kOutOfMemory = "CUDA out of memory.";

bool holds(const Tensor& t) { return t.is_cuda(); }

CurrentStream::CurrentStream(const Tensor& x) : guard_(x.get_device_index()) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
}

}  // namespace normfused::binding::device
