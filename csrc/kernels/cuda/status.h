// What the CUDA entry points return. Plain C++, no CUDA header: for the binding too.
#pragma once

namespace normfused::cuda {

using Status = int;  // 0 is success; the CUDA runtime's error codes

const char* status_message(Status status);

}  // namespace normfused::cuda
