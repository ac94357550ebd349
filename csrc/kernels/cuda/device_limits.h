// What a device allows, and what a launch asks of it. Plain C++, no CUDA: launch plans are computed and tested
// anywhere.
#pragma once

#include <cstddef>
#include <cstdint>

namespace normfused::cuda {

struct DeviceLimits {
  int compute_capability;  // 10 * major + minor
  int multiprocessors;
  int threads_per_multiprocessor;
  int blocks_per_multiprocessor;
  size_t shared_per_block;           // dynamic, after opting in
  size_t shared_per_multiprocessor;  // of which every resident block takes what it asks for plus the next
  size_t shared_reserved_per_block;
  int max_cluster;  // in blocks; beyond 8 the hardware may fit few of them. 1: no clusters
  size_t l2_bytes;
  int64_t max_grid_x;
  int64_t max_grid_y;
};

struct LaunchConfig {
  unsigned grid_x = 1;
  unsigned grid_y = 1;
  unsigned block = 32;   // threads, a multiple of 32
  unsigned cluster = 1;  // blocks of a cluster, along x; divides grid_x
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks resident at once, as grid_sync needs
  const char* name = "";     // what the emulator's reports call the launch
};

}  // namespace normfused::cuda
