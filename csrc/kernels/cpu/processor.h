// What kernels need to know of the processor.
#pragma once

#include <cstdint>

namespace normfused::cpu {

// What of its last cache a program may count on.
int64_t last_cache_bytes();
// Whether it reads a stretch of memory faster when asked for what lies some kilobytes on. (Measured: Intel's do; AMD's
// find it by themselves, and asking costs.)
bool asks_ahead();

}  // namespace normfused::cpu
