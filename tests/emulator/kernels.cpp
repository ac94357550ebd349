// The kernels' entry points and the emulator's controls in plain C, for ctypes.
#include "../../csrc/kernels/batch_norm.h"
#include "../../csrc/kernels/cuda/device.cuh"
#include "../../csrc/kernels/group_norm.h"

#include <string>

using namespace normfused;

extern "C" {

int batch_norm_forward(const BatchNormForward* args) { return cuda::batch_norm_forward(*args, nullptr); }
int batch_norm_backward(const BatchNormBackward* args) { return cuda::batch_norm_backward(*args, nullptr); }
int group_norm_forward(const GroupNormForward* args) { return cuda::group_norm_forward(*args, nullptr); }
int group_norm_backward(const GroupNormBackward* args) { return cuda::group_norm_backward(*args, nullptr); }

int batch_norm_forward_workspace(const BatchNormForward* args, int64_t* bytes) {
  return cuda::batch_norm_workspace(*args, bytes);
}
int batch_norm_backward_workspace(const BatchNormBackward* args, int64_t* bytes) {
  return cuda::batch_norm_workspace(*args, bytes);
}
int group_norm_forward_workspace(const GroupNormForward* args, int64_t* bytes) {
  return cuda::group_norm_workspace(*args, bytes);
}
int group_norm_backward_workspace(const GroupNormBackward* args, int64_t* bytes) {
  return cuda::group_norm_workspace(*args, bytes);
}
int count_batch(int64_t* num_batches_tracked) { return cuda::count_batch(num_batches_tracked, nullptr); }

void set_schedule(int schedule, uint64_t seed) {
  emulator::set_schedule(static_cast<emulator::Schedule>(schedule), seed);
}

void set_limits(const cuda::DeviceLimits* limits) { emulator::set_limits(*limits); }

const char* status_message(int status) { return cuda::status_message(status); }

// The names of the launches so far, one per line.
const char* launch_names() {
  static std::string names;
  names.clear();
  for (const emulator::Launch& launch : emulator::launches()) names += std::string(launch.config.name) + "\n";
  return names.c_str();
}

void clear_launches() { emulator::clear_launches(); }
}
