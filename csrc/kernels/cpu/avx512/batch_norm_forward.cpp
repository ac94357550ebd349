#if defined(__x86_64__)
#include "../target_avx512.h"
// The target comes first.
#include "../batch_norm_forward.cpp"
#endif
