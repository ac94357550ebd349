// The size of the last level of the processor's cache.
#pragma once

#include <cstdint>

namespace normfused::cpu {

int64_t last_cache_bytes();

}  // namespace normfused::cpu
