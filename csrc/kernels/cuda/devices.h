// Limits of known devices, by architecture: plans for them are shown and tested where there is no GPU.
#pragma once

#include <cstring>

#include "device_limits.h"

namespace normfused::cuda {

struct KnownDevice {
  const char* architecture;
  const char* name;
  DeviceLimits limits;
};

// Compute capability, multiprocessors, threads and blocks of one, shared memory of a block, of a multiprocessor and
// reserved, the largest portable cluster, L2, grid.
constexpr KnownDevice kKnownDevices[] = {
    {"sm_80", "A100", {80, 108, 2048, 32, 163 << 10, 164 << 10, 1 << 10, 1, 40 << 20, 2147483647, 65535}},
    {"sm_86", "RTX 3090", {86, 82, 1536, 16, 99 << 10, 100 << 10, 1 << 10, 1, 6 << 20, 2147483647, 65535}},
    {"sm_89", "RTX 4090", {89, 128, 1536, 24, 99 << 10, 100 << 10, 1 << 10, 1, 72 << 20, 2147483647, 65535}},
    {"sm_90", "H100", {90, 132, 2048, 32, 227 << 10, 228 << 10, 1 << 10, 8, 50 << 20, 2147483647, 65535}},
    {"sm_100", "B200", {100, 148, 2048, 32, 227 << 10, 228 << 10, 1 << 10, 8, 126 << 20, 2147483647, 65535}},
};

// Null if there is none of that name.
inline const KnownDevice* known_device(const char* architecture) {
  for (const KnownDevice& device : kKnownDevices) {
    if (std::strcmp(device.architecture, architecture) == 0) return &device;
  }
  return nullptr;
}

}  // namespace normfused::cuda
