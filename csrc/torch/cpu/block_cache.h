// Memory of large CPU outputs that are gone, kept for the next ones.
//
// The C library gives large blocks back to the system when they are freed, and a fresh one costs a page fault and a
// zeroed page for every page that is written: more than the arithmetic of a whole layer. As CUDA's allocator does, we
// keep freed blocks, up to a limit. The pages of one that stays idle are offered to the system (MADV_FREE), which takes
// them when it is short of memory.
#pragma once

#include "../checks.h"

namespace normfused::binding {

// A tensor like aoti_torch_empty_strided's, of `bytes` in all, in a block from the cache if it is large.
Tensor empty_cached(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType scalar_type,
                    const Tensor& like, int64_t bytes);

// Gives all idle blocks back; returns how many bytes that were.
int64_t empty_cache();
// Idle blocks of more than `bytes` in all are given back, the oldest first. 0 keeps none.
void set_cache_limit(int64_t bytes);

}  // namespace normfused::binding
