#include "status.h"

#include "device.cuh"

namespace normfused::cuda {

const char* status_message(Status status) { return runtime_message(status); }

}  // namespace normfused::cuda
