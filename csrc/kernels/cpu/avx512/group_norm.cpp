#include "../target_avx512.h"
// The target comes first.
#include "../group_norm.cpp"
