#include "../target_avx2.h"
// The target comes first.
#include "../group_norm.cpp"
